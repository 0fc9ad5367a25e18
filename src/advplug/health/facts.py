"""What the checks look at: attacks with their evidence, the audit's observations, and the two common comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from advplug.contracts import Gradient, Strength
from advplug.estimate import Estimate, paired_p_value
from advplug.evidence import Array, Evidence
from advplug.results import Flag, Level

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


PASSED, UNCHECKED, INAPPLICABLE = Outcome("passed"), Outcome("unchecked"), Outcome("inapplicable")


Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """A check with its fixed level and what to do about it.

    `cell` checks look at one attack, the others at the whole group; `required` ones have to run for `trusted`.
    """

    run: Callable[[Subject], Outcome]
    level: Level
    advice: str
    cell: bool = False
    required: bool = True


def tripped(checks: Mapping[str, Check[Subject]], subject: Subject) -> tuple[tuple[Flag, ...], tuple[str, ...]]:
    """(flags of tripped checks, names of checks that lacked evidence)."""
    outcomes = {name: check.run(subject) for name, check in checks.items()}
    flags = tuple(Flag(n, checks[n].level, o.detail) for n, o in outcomes.items() if o.state == "tripped")
    return flags, tuple(n for n, o in outcomes.items() if o.state == "unchecked")


@dataclass(frozen=True)
class Finding:
    """One attack's evidence with what the checks have to know of the attack.

    `gradient`: it follows the victim's gradient; `draws`: of how many samples it makes one by itself.
    """

    attack: str
    strength: Strength
    gradient: bool
    evidence: Evidence
    draws: int = 1


@dataclass(frozen=True)
class Audit:
    """What the audit observed on a few images of a group.

    `rows` (m,) are positions in the evaluated subset, all right without attack. Bits (m,), None where a probe did
    not run: success of sign noise (`noise`), of one gradient step (`one_step`), of a short iterative attack run
    cold at half and at the full budget (`cold_half`, `cold_full`) and at L-inf 0.5 (`unbounded`), of that attack on
    the margin loss (`margin`), of random search (`black_box`); `saturated`: the probability of the label is 1 in
    float32. `probed` are those of the rows that the group's attacks left standing and that an attack of
    `longer_steps` steps was run on, `longer` those of them that it broke.

    `plain` and `normalised` (k,): the model is right on the first images, as they are and standardised, the best
    way of standardising. `mismatch` (q,): relative errors of directional derivatives. `spread`: how far repeated
    answers lie apart, as unit vectors; `attacked_spread`: those that attackers of a randomised victim differentiate.
    `probabilities`: the logits are probabilities.
    `gradient`, `stochastic`, `draws`, `rejects`: what the victim declares. `level`: quick or full; `forward`,
    `backward`: images that the audit sent through the victim.
    """

    rows: Array
    noise: Array | None = None
    one_step: Array | None = None
    cold_half: Array | None = None
    cold_full: Array | None = None
    unbounded: Array | None = None
    margin: Array | None = None
    black_box: Array | None = None
    saturated: Array | None = None
    probed: Array | None = None
    longer: Array | None = None
    longer_steps: int = 0
    plain: Array | None = None
    normalised: Array | None = None
    mismatch: Array | None = None
    spread: float | None = None
    attacked_spread: float | None = None
    probabilities: bool | None = None
    gradient: str = Gradient.EXACT
    stochastic: bool = False
    draws: int = 1
    rejects: bool = False
    level: str = "quick"
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Group:
    """A victim under one threat: every attack that was run, the audit if there was one, facts of the victim.

    Where similarities are minimised, the audit's bits are similarities (m,) instead, and `difference` is one of them.

    `complete` says that no attack that was asked for failed; `difference` is the worst case's to the undefended
    baseline's, over the same images. `certified` (n,): proven right under this threat, each proof wrong with
    probability `proof_error`.
    """

    findings: Sequence[Finding]
    audit: Audit | None = None
    batch_dependent: bool | None = None
    defended: bool = False
    complete: bool = True
    targeted: bool = False
    difference: Estimate | None = None
    certified: Array | None = None
    proof_error: float = 0.0

    @property
    def minimised(self) -> bool:
        return any(f.evidence.minimised for f in self.findings)

    @property
    def uses_gradients(self) -> bool:
        return any(f.gradient for f in self.findings)

    @property
    def iterative(self) -> list[Finding]:
        """The gradient attacks of more than one step."""
        return [f for f in self.findings if f.gradient and f.strength >= Strength.ITERATIVE]


CLOSER = 0.01
"""Cosine by which a similarity has to be lower to count as lower."""


def lower(weak: Array, strong: Array, what: str) -> Outcome:
    """As `inversion`, of similarities (m,): trips where `weak` pushes images further down than `strong` does."""
    return inversion(weak < strong - CLOSER, strong < weak - CLOSER, what)


def outdone(group: Group, probe: Array, findings: Sequence[Finding], rows: Array, what: str) -> Outcome:
    """Trips where an audit's probe of the images at `rows` does significantly better than the attacks."""
    if group.minimised:
        return lower(probe, lowest(findings, rows), what)
    return inversion(probe, broken(findings, rows), what)


def lowest(findings: Sequence[Finding], rows: Array) -> Array:
    """(m,): the lowest similarity that any of the attacks reached, crafted on the victim itself."""
    found = [f.evidence.similarity(f.evidence.cosine_adaptive) for f in findings]
    return np.asarray(np.min([s[rows] for s in found if s is not None], axis=0))


def inversion(weak: Array, strong: Array, what: str) -> Outcome:
    """Trips where `weak` breaks images that `strong` does not, significantly more often than the reverse."""
    only_weak, only_strong = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    p = paired_p_value(only_weak, only_strong)
    if only_weak >= MIN_IMAGES and p < SIGNIFICANCE:
        return Outcome("tripped", f"{what}: {only_weak} of {len(weak)} images against {only_strong} (p = {p:.2g})")
    return PASSED


ALL, CHOICE, REPORT = slice(None), slice(0, None, 2), slice(1, None, 2)
"""Halves of a randomised victim's draws: images are picked out by the one and looked at by the other, since what was
picked for being unbroken is broken more often when it is asked again."""


def broken(findings: Sequence[Finding], rows: Array, draws: slice = ALL) -> Array:
    """(m,): broken by any of the attacks, by majority of the draws; nothing is by no draw."""
    votes = [f.evidence.adaptive[rows][:, draws] for f in findings]
    return np.asarray(np.logical_or.reduce([2 * v.sum(axis=1) > max(v.shape[1], 1) for v in votes]))


def no_audit(group: Group) -> Outcome:
    """Of a check of gradients that the audit makes, where it did not: a group without gradients needs none."""
    return UNCHECKED if group.uses_gradients else INAPPLICABLE
