"""The built-in plugins, registered through the hooks that every plugin uses. Importing it imports no torch."""

from __future__ import annotations

from advplug.contracts import Spec
from advplug.hooks import hookimpl


@hookimpl
def advplug_attacks() -> list[Spec]:
    from advplug.builtin import autoattack, blackbox, geometric, gradient, noise, transfer

    return [
        *autoattack.ATTACKS,
        *blackbox.ATTACKS,
        *geometric.ATTACKS,
        *gradient.ATTACKS,
        *noise.ATTACKS,
        *transfer.ATTACKS,
    ]


@hookimpl
def advplug_defenses() -> list[Spec]:
    from advplug.builtin import advtrain, detectors, preprocessing, prune, randomised, scores, smoothing

    return [
        *advtrain.DEFENSES,
        *detectors.DEFENSES,
        *preprocessing.DEFENSES,
        *prune.DEFENSES,
        *randomised.DEFENSES,
        *scores.DEFENSES,
        *smoothing.DEFENSES,
    ]


@hookimpl
def advplug_models() -> list[Spec]:
    from advplug.builtin import models

    return models.MODELS


@hookimpl
def advplug_datasets() -> list[Spec]:
    from advplug.builtin import datasets

    return datasets.DATASETS


@hookimpl
def advplug_metrics() -> list[Spec]:
    from advplug.builtin import metrics

    return metrics.METRICS


@hookimpl
def advplug_trackers() -> list[Spec]:
    from advplug.builtin import trackers

    return trackers.TRACKERS
