"""Signs that a number should not be believed: one function a check, one table of them, and the verdict.

Every check has a fixed level (`CHECKS`), a threshold (stated in its docstring) and a source. A check that
lacks its evidence is `unchecked`, never passed; one that makes no sense for a group is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from advplug.contracts import Strength
from advplug.health import attacks, gradients, images, proofs, victims
from advplug.health.facts import MIN_IMAGES, SIGNIFICANCE, Audit, Check, Finding, Group, Outcome, tripped
from advplug.results import Flag, Verdict

__all__ = [
    "CHECKS", "MIN_IMAGES", "SIGNIFICANCE", "Audit", "Check", "Finding", "Group", "Outcome", "examine", "verdict",
]  # fmt: skip


CHECKS: dict[str, Check[Group]] = {
    "zero-gradients": Check(
        gradients.zero_gradients,
        "error",
        "look for detached, quantised or saturated parts; declare a surrogate (BPDA)",
        cell=True,
    ),
    "nonfinite-gradients": Check(
        gradients.nonfinite_gradients,
        "error",
        "look for divisions by zero or logs of zero in the model",
        cell=True,
    ),
    "gradient-mismatch": Check(
        gradients.gradient_mismatch,
        "error",
        "look for detached or rounded parts and custom backward passes; a stand-in has to be declared (BPDA)",
        required=False,
    ),
    "saturated-logits": Check(
        gradients.saturated_logits,
        "error",
        "attack with loss=margin or loss=dlr, or run the standard protocol; scale the logits down",
    ),
    "randomised-without-eot": Check(
        gradients.randomised_without_eot,
        "error",
        "declare the part that draws as a stochastic wrap with draws of 20 or more",
    ),
    "perturbation-violation": Check(
        images.perturbation_violation,
        "error",
        "the attack ignores its budget: check its units and clipping",
        cell=True,
    ),
    "lost-in-rounding": Check(
        images.lost_in_rounding,
        "info",
        "quote robust_accuracy_8bit where images are stored in 8 bits",
        cell=True,
    ),
    "silent-success": Check(
        images.silent_success,
        "error",
        "return the best image of the run, not the last one",
        cell=True,
    ),
    "static-beats-adaptive": Check(
        attacks.static_beats_adaptive,
        "error",
        "the adaptive attack is weaker than a transferred one: declare gradients, or run an attack that follows them",
        cell=True,
    ),
    "black-box-beats-white-box": Check(
        attacks.black_box_beats_white_box,
        "error",
        "gradients mislead or are masked: declare a surrogate (BPDA)",
        required=False,
    ),
    "one-step-beats-iterative": Check(
        attacks.one_step_beats_iterative,
        "error",
        "masked gradients, or too few or too small steps",
    ),
    "noise-beats-attack": Check(
        attacks.noise_beats_attack,
        "error",
        "the attack does worse than chance: gradients mislead it",
    ),
    "rises-with-budget": Check(
        attacks.rises_with_budget,
        "error",
        "the attack fails to use a larger budget: gradients mislead it",
    ),
    "unbounded-attack-fails": Check(
        attacks.unbounded_attack_fails,
        "error",
        "with every pixel free no model can hold: gradients mislead or vanish",
    ),
    "not-converged": Check(
        attacks.not_converged,
        "warn",
        "give the attack more steps or restarts, or run the standard protocol",
    ),
    "near-chance": Check(
        victims.near_chance,
        "error",
        "train the model: robustness of a guess means nothing",
    ),
    "batch-dependent": Check(
        victims.batch_dependent,
        "error",
        "use batch-norm statistics from training (eval mode), not of the batch",
    ),
    "probabilities": Check(
        victims.probabilities,
        "error",
        "return the logits before the softmax",
    ),
    "undeclared-normalisation": Check(
        victims.undeclared_normalisation,
        "error",
        "put the normalisation inside the model, so that it takes pixels in [0, 1]",
    ),
    "below-certified": Check(
        proofs.below_certified,
        "error",
        "no attack can break what is proven: the proof is of another model, other noise or other pixels",
    ),
    "defense-adds-nothing": Check(
        victims.defense_adds_nothing,
        "info",
        "more images narrow the interval",
        required=False,
    ),
}
"""Every check by name. A tripped `error` makes the verdict `not trustworthy`, a `warn` at best an `upper bound`; an
`info` says something of the model or the defense and leaves the verdict alone."""


def examine(group: Group, cell: bool = False) -> tuple[tuple[Flag, ...], tuple[str, ...]]:
    """(flags of tripped checks, names of checks that lacked evidence); `cell` runs the per-attack checks only."""
    return tripped({name: check for name, check in CHECKS.items() if check.cell or not cell}, group)


def verdict(group: Group, flags: Sequence[Flag], unchecked: Sequence[str]) -> Verdict | None:
    """How far the group's worst case can be believed; None where nothing was measured.

    `not trustworthy`: a check of level error tripped. `trusted`: APGD-strength evidence, no attack that failed,
    every required check run, and none of level error or warn tripped. Otherwise an `upper bound`: a stronger attack
    may still lower the number.
    """
    if not group.findings:
        return None
    levels = {f.level for f in flags}
    if "error" in levels:
        return "not trustworthy"
    missing = any(CHECKS[name].required for name in unchecked)
    strong = any(f.strength is Strength.STRONG for f in group.findings)
    return "trusted" if strong and group.complete and not missing and "warn" not in levels else "upper bound"
