"""What was observed of a victim whose training set was attacked, and the figures that follow. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from advplug.builtin.metrics import share
from advplug.estimate import Estimate, paired_difference
from advplug.evidence import Array
from advplug.stored.columns import packed, unpacked


@dataclass(frozen=True)
class PoisonEvidence:
    """What a poisoned victim answers, and what the same model does that was trained on the clean data.

    `n` images, `d` fresh decisions of each; answers are classes, -1 where there is none:
    index, y (n,): position and true class; wanted (n,): what the trigger asks for; clean, triggered (n, d): answers
    without and with the trigger; reference_clean, reference_triggered (n,): those of the clean model. For `k` targets
    likewise: target_index, target_y, target_wanted, target_reference (k,), target (k, d). Without a trigger or
    targets their columns are empty. `reaches`: the share of the trigger that reaches the first layer with weights,
    NaN where that could not be seen. `poisons` of `rows` training images were added or changed.
    """

    index: Array
    y: Array
    wanted: Array
    clean: Array
    triggered: Array
    reference_clean: Array
    reference_triggered: Array
    target_index: Array
    target_y: Array
    target_wanted: Array
    target: Array
    target_reference: Array
    reaches: float
    poisons: int
    rows: int

    @property
    def backdoor(self) -> bool:
        return self.triggered.size > 0

    @property
    def aims(self) -> bool:
        return self.target.size > 0

    @property
    def gains(self) -> Array:
        """(n,) bool: images that are not of the class wanted already."""
        return np.asarray(self.wanted != self.y)

    def to_bytes(self) -> bytes:
        return packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> PoisonEvidence:
        return unpacked(cls, data)


def measured(e: PoisonEvidence) -> dict[str, Estimate | None]:
    """The figures. Success of a trigger is over the images whose true class is not the one wanted."""
    y = e.y[:, None]
    values = {
        "clean_accuracy": share(e.clean == y),
        "clean_model_accuracy": share((e.reference_clean == e.y)[:, None]),
        "attack_success_rate": None,
        "clean_model_success_rate": None,
        "triggered_accuracy": None,
        "poison_success_rate": None,
        "clean_model_poison_success_rate": None,
    }
    if e.backdoor:
        gains, wanted = e.gains, e.wanted[e.gains, None]
        values["attack_success_rate"] = share(e.triggered[gains] == wanted)
        values["clean_model_success_rate"] = share(e.reference_triggered[gains, None] == wanted)
        values["triggered_accuracy"] = share(e.triggered == y)
    if e.aims:
        wanted = e.target_wanted[:, None]
        values["poison_success_rate"] = share(e.target == wanted)
        values["clean_model_poison_success_rate"] = share(e.target_reference[:, None] == wanted)
    return values


def differences(e: PoisonEvidence, undefended: PoisonEvidence) -> dict[str, Estimate | None]:
    """Defended minus undefended, over the same images: clean accuracy, and success of the trigger or the targets."""
    found: dict[str, Estimate | None] = {"clean_accuracy": None}
    if np.array_equal(e.index, undefended.index) and np.array_equal(e.y, undefended.y):
        found["clean_accuracy"] = _paired(e.clean == e.y[:, None], undefended.clean == undefended.y[:, None])
        if e.backdoor and undefended.backdoor:
            rows, wanted = e.gains, e.wanted[e.gains, None]
            found["attack_success_rate"] = _paired(e.triggered[rows] == wanted, undefended.triggered[rows] == wanted)
    if e.aims and np.array_equal(e.target_index, undefended.target_index):
        wanted = e.target_wanted[:, None]
        found["poison_success_rate"] = _paired(e.target == wanted, undefended.target == wanted)
    return found


def _paired(ours: Array, theirs: Array) -> Estimate | None:
    return paired_difference(ours.mean(axis=1), theirs.mean(axis=1))
