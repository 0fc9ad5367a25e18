"""Checks of attacks on training data, one function each, in one table; and their verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from advplug.estimate import paired_p_value
from advplug.evidence import Array
from advplug.health.facts import INAPPLICABLE, PASSED, UNCHECKED, Check, Outcome, tripped
from advplug.health.victims import chance
from advplug.poisons.evidence import PoisonEvidence, differences
from advplug.results import Flag, Verdict

TAKEN = 0.05
"""Level of the exact paired test that an attack took: five targets of five reach it."""
REACHES = 0.1
"""Share of a trigger that has to reach the first layer with weights."""


@dataclass(frozen=True)
class Look:
    """What a check sees: a victim's evidence and that of the undefended one on the same poisons, where there is any."""

    own: PoisonEvidence
    undefended: PoisonEvidence | None
    defended: bool


def did_not_take(look: Look) -> Outcome:
    """The undefended model does not do what the poison asks for more often than the clean model does.

    Exact paired test (McNemar, one-sided) at level 0.05, over the triggered images and over the targets, each part
    for itself. What does not work without a defense says nothing of one.
    """
    e = look.undefended
    if e is None:
        return UNCHECKED
    failed = []
    if e.backdoor:
        rows = e.gains
        hit = e.triggered[rows] == e.wanted[rows, None]
        failed += _not_above(hit, e.reference_triggered[rows] == e.wanted[rows], "triggered images")
    if e.aims:
        hit = e.target == e.target_wanted[:, None]
        failed += _not_above(hit, e.target_reference == e.target_wanted, "targets")
    return Outcome("tripped", "; ".join(failed)) if failed else PASSED


def _not_above(hit: Array, reference: Array, what: str) -> list[str]:
    """(m, d) bits of the poisoned and (m,) of the clean model; a sentence where the first are not more."""
    most = 2 * hit.sum(axis=1) > hit.shape[1]
    p = paired_p_value(int((most & ~reference).sum()), int((reference & ~most).sum()))
    if p < TAKEN:
        return []
    return [
        f"without a defense {most.sum()} of {len(most)} {what} are taken for what was asked, "
        f"by the clean model {reference.sum()} (p = {p:.2g})"
    ]


def trigger_destroyed(look: Look) -> Outcome:
    """Less than a tenth of the trigger reaches the first layer with weights.

    Measured on the first images: the change that the trigger makes to that layer's input, in units of the input's own
    spread, against the same of the pixels. A trigger that resizing, cropping or filtering removes is none; what holds
    against it may fall to one that survives.
    """
    if not look.own.backdoor:
        return INAPPLICABLE
    reaches = look.own.reaches
    if not np.isfinite(reaches):
        return UNCHECKED
    if reaches >= REACHES:
        return PASSED
    return Outcome("tripped", f"{100 * reaches:.1f} % of the trigger reaches the first layer with weights")


def near_chance(look: Look) -> Outcome:
    """The lower bound of clean accuracy lies under c + 0.2 (1 - c), with c the largest class's share."""
    return chance(look.own.y, look.own.clean == look.own.y[:, None])


def defense_adds_nothing(look: Look) -> Outcome:
    """The 95 % interval of the paired difference of success to the undefended model holds 0 or lies above it."""
    if not look.defended:
        return INAPPLICABLE
    if look.undefended is None:
        return UNCHECKED
    found = differences(look.own, look.undefended)
    told = []
    for name, what in (("attack_success_rate", "triggered images"), ("poison_success_rate", "targets")):
        d = found.get(name)
        if d is not None and d.high is not None and d.low is not None and d.high >= 0:
            interval = f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            told.append(f"no lower success is shown on {what}: {interval}")
    return Outcome("tripped", "; ".join(told)) if told else PASSED


CHECKS: Mapping[str, Check[Look]] = {
    "attack-did-not-take": Check(
        did_not_take,
        "error",
        "raise the number of poisons or make the trigger plainer: no defense can be judged on this",
    ),
    "trigger-destroyed": Check(
        trigger_destroyed, "error", "use a trigger that survives what is done to the pixels, larger or elsewhere"
    ),
    "near-chance": Check(near_chance, "error", "train the model: what a guess is taken for means nothing"),
    "defense-adds-nothing": Check(defense_adds_nothing, "info", "more images narrow the interval"),
}
"""Every check of attacks on training data, by name. A tripped `error` makes the verdict `not trustworthy`."""


def examined(look: Look) -> tuple[tuple[Flag, ...], Verdict]:
    """The flags, and the verdict: of an undefended model it may be `trusted`, of a defended one at best an `upper
    bound` of what it holds, since the poison was made without knowing the defense."""
    flags, unchecked = tripped(CHECKS, look)
    if any(flag.level == "error" for flag in flags):
        return flags, "not trustworthy"
    return flags, "upper bound" if look.defended or unchecked else "trusted"


def why_bound(defense: str) -> str:
    """Why a verdict is an upper bound. Of an undefended model it can only be that a check lacked its evidence."""
    return "not checked: trigger-destroyed" if defense == "none" else "the poison was made without knowing the defense"
