"""One plugin of every kind. This module is imported whenever plugins are listed, so it imports no torch."""

from __future__ import annotations

from dataclasses import replace

from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetCaps,
    DefenseCaps,
    Gradient,
    MetricCaps,
    ModelCaps,
    Spec,
    Strength,
    TrackerCaps,
)
from advplug.hooks import hookimpl

HOME = "advplug_example"


@hookimpl
def advplug_attacks() -> list[Spec]:
    noise = AttackCaps(Access.DECISION, frozenset({"linf"}), strength=Strength.FLOOR, stochastic=True)
    transfer = replace(noise, norms=frozenset({"linf", "l2"}))
    return [
        Spec("example-noise", f"{HOME}.attacks:noise", noise, "the first of a few sign patterns that fools"),
        Spec("example-transfer", f"{HOME}.attacks:transfer", transfer, "crafted on another victim"),
    ]


@hookimpl
def advplug_defenses() -> list[Spec]:
    quantise = DefenseCaps(("wrap",), gradient=Gradient.BPDA)
    blur = DefenseCaps(("wrap",), stochastic=True)
    return [
        Spec("example-quantise", f"{HOME}.defenses:quantise", quantise, "rounds pixels to a few bits"),
        Spec("example-gaussian", f"{HOME}.defenses:gaussian", blur, "adds Gaussian noise to the input"),
        Spec("example-smooth-labels", f"{HOME}.defenses:smooth_labels", DefenseCaps(("objective",)),
             "trains with label smoothing", paper="Szegedy et al. 2016, arXiv:1512.00567, section 7"),
        Spec("example-thin", f"{HOME}.defenses:thin", DefenseCaps(("data",)), "trains on a share of the images"),
    ]  # fmt: skip


@hookimpl
def advplug_models() -> list[Spec]:
    return [Spec("example-linear", f"{HOME}.sources:linear", ModelCaps(), "logistic regression on the pixels")]


@hookimpl
def advplug_datasets() -> list[Spec]:
    return [Spec("example-bars", f"{HOME}.sources:bars", DatasetCaps(embedded=True), "a noisy bar, named by its row")]


@hookimpl
def advplug_metrics() -> list[Spec]:
    caps = MetricCaps(("weakest_class_accuracy",))
    return [Spec("example-weakest-class", f"{HOME}.metrics:weakest_class", caps, "the class that is attacked best")]


@hookimpl
def advplug_trackers() -> list[Spec]:
    return [Spec("example-count", f"{HOME}.trackers:count", TrackerCaps(), "writes down how many cells a run has")]
