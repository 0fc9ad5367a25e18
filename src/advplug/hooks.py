"""The hooks a plugin implements, each optional. Register a module under the entry-point group `advplug`."""

from __future__ import annotations

import pluggy

from advplug.contracts import Spec

GROUP = "advplug"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Hooks:
    """Every hook returns a list of `Spec`; targets are imported only when one is used."""

    @hookspec
    def advplug_attacks(self) -> list[Spec]:  # type: ignore[empty-body]
        """Attacks. A factory returns an `EvasionAttack`; caps are `AttackCaps`."""

    @hookspec
    def advplug_defenses(self) -> list[Spec]:  # type: ignore[empty-body]
        """Defenses. A factory returns a tuple of stages; caps are `DefenseCaps`."""

    @hookspec
    def advplug_models(self) -> list[Spec]:  # type: ignore[empty-body]
        """Models. A factory returns a `ModelSource`; caps are `ModelCaps`."""

    @hookspec
    def advplug_datasets(self) -> list[Spec]:  # type: ignore[empty-body]
        """Datasets. A factory returns a `DatasetSource`; caps are `DatasetCaps`."""

    @hookspec
    def advplug_metrics(self) -> list[Spec]:  # type: ignore[empty-body]
        """Metrics. A factory returns a `Metric`; caps are `MetricCaps`."""

    @hookspec
    def advplug_trackers(self) -> list[Spec]:  # type: ignore[empty-body]
        """Trackers. A factory returns a `Tracker`; caps are `TrackerCaps`."""


KINDS = {
    "attack": "advplug_attacks",
    "defense": "advplug_defenses",
    "model": "advplug_models",
    "dataset": "advplug_datasets",
    "metric": "advplug_metrics",
    "tracker": "advplug_trackers",
}
