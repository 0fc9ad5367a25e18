"""Structured filter pruning: parameters and spec. Torch is imported only when a model is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from advplug.contracts import Defense, DefenseCaps, Param, Spec, Stack, Tune, Tuned
from advplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advplug.train import Training

SLOWER = 0.1
"""Fine-tuning's learning rate as a share of the one the model was trained with."""


def prune(
    ratio: Annotated[float, Param("share of the filters that goes from each convolution; 0: none", ge=0, lt=1)] = 0.2,
    layers: Annotated[
        Stack | None, Param("where, as (layer3+layer4); none: layer4, or the last stage where there is none")
    ] = None,
    epochs: Annotated[int, Param("fine-tuning after pruning", ge=0)] = 6,
    lr: Annotated[float | None, Param("peak rate of fine-tuning; none: a tenth of the training's", gt=0)] = None,
) -> Defense:
    """Removes the filters of smallest l1 norm, with all that depends on them, then fine-tunes.

    `Tune.apply` raises UsageError where a layer is unknown or nothing in it can be removed.
    """
    names = _names(layers)

    def apply(model: nn.Module, training: Training) -> Tuned:
        import numpy as np

        from advplug.defenses.pruning import PROBES, shrink

        x = training.data.batch(np.arange(min(PROBES, len(training.data)))).x
        structure, facts = shrink(model, x, ratio, names)
        if structure and epochs:
            schedule = training.schedule
            model = training.fit(model, schedule=replace(schedule, epochs=epochs, lr=lr or SLOWER * schedule.lr))
        return Tuned(model, structure, facts)

    def rebuild(model: nn.Module, structure: Mapping[str, Tensor]) -> nn.Module:
        from advplug.defenses.pruning import rebuild

        return rebuild(model, structure)

    return (Tune(apply, rebuild),)


def _names(layers: Stack | None) -> tuple[str, ...]:
    for part in layers or ():
        if part.params:
            raise UsageError(f"prune: '{part}' is no layer name; write layers={part.name}")
    return tuple(part.name for part in layers or ())


DEFENSES: list[Spec] = [
    Spec(
        "prune",
        "advplug.builtin.prune:prune",
        DefenseCaps(("tune",), needs_data=True),
        "Structured l1 pruning: whole filters are removed, then fine-tuning",
        "Li et al. 2016, arXiv 1608.08710; coupled layers: Fang et al. 2023, arXiv 2301.12900",
    )
]
