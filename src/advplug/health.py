"""Signs that a number should not be believed: one function a check, and the verdict over all of them.

Every check has a fixed level (`CHECKS`), a threshold (stated in its docstring) and a source. A check that
lacks its evidence is `unchecked`, never passed; one that makes no sense for a group is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from advplug.contracts import Strength
from advplug.estimate import paired_p_value, rate
from advplug.evidence import Array, Evidence
from advplug.results import Flag, Level, Verdict

State = Literal["passed", "tripped", "unchecked", "inapplicable"]
SIGNIFICANCE = 0.01
"""Level of the exact paired tests (Carlini et al. 2019 ask for per-example comparison, arXiv:1902.06705)."""
MIN_IMAGES = 2
"""Fewer discordant images than this are never called a sign."""


@dataclass(frozen=True)
class Outcome:
    """What a check found; `detail` says it in a sentence with numbers."""

    state: State
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """One attack's evidence with what the check has to know of the attack."""

    attack: str
    strength: Strength
    gradient: bool
    evidence: Evidence


@dataclass(frozen=True)
class Audit:
    """What the audit observed on a few images of a group, whatever attacks the group holds.

    `rows` (m,) are positions in the evaluated subset; every other array is (m,) bool: success of sign noise,
    of one gradient step, and of a short iterative attack run cold at half and at the full budget.
    """

    rows: Array
    attacked: Array
    noise: Array
    one_step: Array | None = None
    cold_half: Array | None = None
    cold_full: Array | None = None


@dataclass(frozen=True)
class Group:
    """A victim under one threat: every attack that was run, the audit if there was one, facts of the victim.

    `complete` says that no attack that was asked for failed.
    """

    findings: Sequence[Finding]
    audit: Audit | None = None
    batch_dependent: bool | None = None
    defended: bool = False
    complete: bool = True


def _inversion(weak: Array, strong: Array, what: str) -> Outcome:
    """Trips where `weak` breaks images that `strong` does not, significantly more often than the reverse."""
    only_weak, only_strong = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    p = paired_p_value(only_weak, only_strong)
    if only_weak >= MIN_IMAGES and p < SIGNIFICANCE:
        return Outcome("tripped", f"{what}: {only_weak} of {len(weak)} images against {only_strong} (p = {p:.2g})")
    return Outcome("passed")


def _broken(findings: Sequence[Finding], rows: Array) -> Array:
    """(m,): broken by any of the attacks, by majority of the draws."""
    return np.asarray(np.logical_or.reduce([f.evidence.adaptive[rows].mean(axis=1) > 0.5 for f in findings]))


def zero_gradients(group: Group) -> Outcome:
    """At least 1 % of the attacked images survive with a vanishing gradient in half of their steps or more.

    Croce & Hein 2020 (arXiv:2003.01690, AutoAttack's zero-gradient flag); Carlini et al. 2019, section 4.
    """
    seen = [f for f in group.findings if f.gradient and f.evidence.zero_gradient is not None]
    if not seen:
        return Outcome("unchecked" if any(f.gradient for f in group.findings) else "inapplicable")
    for f in seen:
        e = f.evidence
        assert e.zero_gradient is not None
        assert e.steps is not None
        stuck = e.attacked & ~(e.adaptive.mean(axis=1) > 0.5) & (e.zero_gradient > 0)
        stuck &= e.zero_gradient * 2 >= np.maximum(e.steps, 1)
        if stuck.sum() >= max(1, 0.01 * e.attacked.sum()):
            share = f"{int(stuck.sum())} of {int(e.attacked.sum())} attacked images"
            return Outcome("tripped", f"{f.attack} had no gradient to follow on {share}: masked gradients")
    return Outcome("passed")


def nonfinite_gradients(group: Group) -> Outcome:
    """Any step with a NaN or infinite gradient. Carlini et al. 2019, section 4."""
    seen = [f for f in group.findings if f.gradient and f.evidence.nonfinite is not None]
    if not seen:
        return Outcome("unchecked" if any(f.gradient for f in group.findings) else "inapplicable")
    for f in seen:
        assert f.evidence.nonfinite is not None
        bad = int((f.evidence.nonfinite > 0).sum())
        if bad:
            return Outcome("tripped", f"{f.attack} met NaN or infinite gradients on {bad} of {f.evidence.n} images")
    return Outcome("passed")


def perturbation_violation(group: Group) -> Outcome:
    """Any returned image outside the perturbation set or [0, 1], beyond float tolerance."""
    for f in group.findings:
        if f.evidence.violations:
            detail = f"{f.evidence.violations} images lay outside the budget, by up to {f.evidence.worst_violation:.3g}"
            return Outcome("tripped", f"{f.attack}: {detail}; they were projected back")
    return Outcome("passed" if group.findings else "unchecked")


def lost_in_rounding(group: Group) -> Outcome:
    """Robust accuracy rises by more than 5 points, and 2 images, once images are stored in 8 bits.

    A budget between two levels (0.1 is 25.5 of them) loses up to a level by itself, hence not 1 point. Attacks for
    the smallest change are left out: what they find just below the budget leaves no room to be pushed further.
    """
    seen = [f for f in group.findings if f.evidence.rounded is not None and f.evidence.found is None]
    if not seen:
        return Outcome("inapplicable")
    for f in seen:
        assert f.evidence.rounded is not None
        gained = f.evidence.robust(f.evidence.rounded).mean(1) - f.evidence.robust(f.evidence.adaptive).mean(1)
        if gained.sum() >= MIN_IMAGES and gained.mean() > 0.05:
            return Outcome("tripped", f"{f.attack}: {100 * gained.mean():.1f} points of its success vanish in 8 bits")
    return Outcome("passed")


def static_beats_adaptive(group: Group) -> Outcome:
    """Images crafted on the undefended model break the defense where the adaptive attack does not.

    Tramer et al. 2020 (arXiv:2002.08347), Carlini et al. 2019: transfer must not beat white box.
    """
    if not group.defended:
        return Outcome("inapplicable")
    seen = [f for f in group.findings if f.evidence.static is not None or f.evidence.bare is not None]
    if not seen:
        return Outcome("unchecked")
    adaptive = _broken(seen, np.arange(seen[0].evidence.n))
    for f in seen:
        for origin, success in (("static", f.evidence.static), ("bare", f.evidence.bare)):
            if success is not None:
                found = _inversion(success.mean(1) > 0.5, adaptive, f"{origin} {f.attack} beats the adaptive attacks")
                if found.state == "tripped":
                    return found
    return Outcome("passed")


def near_chance(group: Group) -> Outcome:
    """The lower bound of clean accuracy lies under c + 0.2 (1 - c), with c the largest class's share."""
    if not group.findings:
        return Outcome("unchecked")
    e = group.findings[0].evidence
    largest = np.bincount(e.y).max() / e.n
    clean = rate(float(e.clean.mean(axis=1).sum()), e.n)
    assert clean is not None
    assert clean.low is not None
    if clean.low < largest + 0.2 * (1 - largest):
        detail = f"clean accuracy {100 * clean.value:.1f} % (at least {100 * clean.low:.1f} %) is near chance"
        return Outcome("tripped", f"{detail}; always answering the largest class gives {100 * largest:.1f} %")
    return Outcome("passed")


def batch_dependent(group: Group) -> Outcome:
    """An image's logits change with the other images of its batch (f(x)[i] against f(x[i]))."""
    if group.batch_dependent is None:
        return Outcome("unchecked")
    if group.batch_dependent:
        return Outcome("tripped", "an image's logits depend on the rest of its batch: accuracy is not a property of it")
    return Outcome("passed")


def one_step_beats_iterative(group: Group) -> Outcome:
    """One gradient step breaks images that the iterative attacks do not. Athalye et al. 2018 (arXiv:1802.00420)."""
    iterative = [f for f in group.findings if f.gradient and f.strength >= Strength.ITERATIVE]
    if not iterative:
        return Outcome("unchecked" if any(f.gradient for f in group.findings) else "inapplicable")
    steps = [f for f in group.findings if f.gradient and f.strength is Strength.ONE_STEP]
    if group.audit is not None and group.audit.one_step is not None:
        return _inversion(
            group.audit.one_step,
            _broken(iterative, group.audit.rows),
            "one gradient step beats the iterative attacks",
        )
    if not steps:
        return Outcome("unchecked")
    rows = np.arange(iterative[0].evidence.n)
    return _inversion(_broken(steps, rows), _broken(iterative, rows), "one gradient step beats the iterative attacks")


def noise_beats_attack(group: Group) -> Outcome:
    """Random noise of the same size breaks images that the attacks do not. Carlini et al. 2019, section 5."""
    attacks = [f for f in group.findings if f.strength > Strength.FLOOR]
    if not attacks:
        return Outcome("inapplicable")
    if group.audit is None:
        return Outcome("unchecked")
    return _inversion(group.audit.noise, _broken(attacks, group.audit.rows), "random noise beats the attacks")


def rises_with_budget(group: Group) -> Outcome:
    """Run cold, a short attack breaks images at half the budget that it does not break at the full one.

    Carlini et al. 2019, section 5: accuracy must fall with eps.
    """
    if group.audit is None or group.audit.cold_half is None or group.audit.cold_full is None:
        return Outcome("unchecked" if any(f.gradient for f in group.findings) else "inapplicable")
    return _inversion(group.audit.cold_half, group.audit.cold_full, "half the budget breaks more than the full one")


@dataclass(frozen=True)
class Check:
    """A check with its fixed level; `cell` checks look at one attack, the others at the whole group."""

    run: Callable[[Group], Outcome]
    level: Level
    cell: bool
    advice: str


CHECKS: dict[str, Check] = {
    "zero-gradients": Check(
        zero_gradients,
        "error",
        True,
        "look for detached, quantised or saturated parts; declare a surrogate (BPDA)",
    ),
    "nonfinite-gradients": Check(
        nonfinite_gradients, "error", True, "look for divisions by zero or logs of zero in the model"
    ),
    "perturbation-violation": Check(
        perturbation_violation, "error", True, "the attack ignores its budget: check its units and clipping"
    ),
    "lost-in-rounding": Check(
        lost_in_rounding, "warn", True, "quote robust_accuracy_8bit where images are stored in 8 bits"
    ),
    "static-beats-adaptive": Check(
        static_beats_adaptive,
        "error",
        True,
        "the adaptive attack is weaker than a transferred one: declare gradients",
    ),
    "near-chance": Check(near_chance, "error", False, "train the model: robustness of a guess means nothing"),
    "batch-dependent": Check(
        batch_dependent,
        "error",
        False,
        "use batch-norm statistics from training (eval mode), not of the batch",
    ),
    "one-step-beats-iterative": Check(
        one_step_beats_iterative, "error", False, "masked gradients, or too few or too small steps"
    ),
    "noise-beats-attack": Check(
        noise_beats_attack, "error", False, "the attack does worse than chance: gradients mislead it"
    ),
    "rises-with-budget": Check(
        rises_with_budget, "error", False, "the attack fails to use a larger budget: gradients mislead it"
    ),
}
"""Every check by name, with its fixed level. A tripped `error` makes the verdict `not trustworthy`."""


def examine(group: Group, cell: bool = False) -> tuple[tuple[Flag, ...], tuple[str, ...]]:
    """(flags of tripped checks, names of checks that lacked evidence); `cell` runs the per-attack checks only."""
    flags, unchecked = [], []
    for name, check in CHECKS.items():
        if cell and not check.cell:
            continue
        outcome = check.run(group)
        if outcome.state == "tripped":
            flags.append(Flag(name, check.level, outcome.detail))
        elif outcome.state == "unchecked":
            unchecked.append(name)
    return tuple(flags), tuple(unchecked)


def verdict(group: Group, flags: Sequence[Flag], unchecked: Sequence[str]) -> Verdict | None:
    """How far the group's worst case can be believed; None where nothing was measured.

    `not trustworthy`: a check of level error tripped. `trusted`: APGD-strength evidence, no attack that failed,
    and every check run and passed. Otherwise an `upper bound`: a stronger attack may still lower the number.
    """
    if not group.findings:
        return None
    if any(f.level == "error" for f in flags):
        return "not trustworthy"
    strong = any(f.strength is Strength.STRONG for f in group.findings)
    return "trusted" if strong and group.complete and not unchecked else "upper bound"
