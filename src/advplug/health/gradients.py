"""Checks of the gradients that an attack follows: there, finite, right, and averaged where they are random."""

from __future__ import annotations

import numpy as np

from advplug.contracts import Gradient
from advplug.health.facts import INAPPLICABLE, PASSED, UNCHECKED, Group, Outcome, broken, inversion, no_audit

WRONG, SHARE_WRONG = 1e-2, 0.1
"""Relative error of a directional derivative, and the share of images that may exceed it."""
SHARE_SATURATED = 0.1
"""Fewer saturated images than this explain no failure."""
APART = 1e-4
"""Largest distance of repeated answers, as unit vectors, of a deterministic model (AutoAttack's figure)."""


def zero_gradients(group: Group) -> Outcome:
    """At least 1 % of the attacked images survive with a vanishing gradient in half of their steps or more.

    Croce & Hein 2020 (arXiv:2003.01690, AutoAttack's zero-gradient flag); Carlini et al. 2019, section 4.
    """
    seen = [f for f in group.findings if f.gradient and f.evidence.zero_gradient is not None]
    if not seen:
        return UNCHECKED if group.uses_gradients else INAPPLICABLE
    for f in seen:
        e = f.evidence
        assert e.zero_gradient is not None
        assert e.steps is not None
        left = np.ones(e.n, dtype=bool) if e.minimised else e.attacked & ~(e.adaptive.mean(axis=1) > 0.5)
        stuck = left & (e.zero_gradient > 0)
        stuck &= e.zero_gradient * 2 >= np.maximum(e.steps, 1)
        if stuck.sum() >= max(1, 0.01 * e.attacked.sum()):
            share = f"{int(stuck.sum())} of {int(e.attacked.sum())} attacked images"
            return Outcome("tripped", f"{f.attack} had no gradient to follow on {share}: masked gradients")
    return PASSED


def nonfinite_gradients(group: Group) -> Outcome:
    """Any step with a NaN or infinite gradient. Carlini et al. 2019, section 4."""
    seen = [f for f in group.findings if f.gradient and f.evidence.nonfinite is not None]
    if not seen:
        return UNCHECKED if group.uses_gradients else INAPPLICABLE
    for f in seen:
        assert f.evidence.nonfinite is not None
        bad = int((f.evidence.nonfinite > 0).sum())
        if bad:
            return Outcome("tripped", f"{f.attack} met NaN or infinite gradients on {bad} of {f.evidence.n} images")
    return PASSED


def gradient_mismatch(group: Group) -> Outcome:
    """On more than 10 % of up to 32 images autograd's derivative in a random direction is not the difference quotient.

    Both are taken in float64 at interior points near the images; a relative error over 1 %, or both being zero,
    counts. It sees what detaches, quantises or misdirects only a part of the gradient. A declared stand-in (BPDA) is
    meant to differ and is left to the other checks. Finite differences as a test of gradients: Athalye et al. 2018
    (arXiv:1802.00420), section 4.1; the thresholds are this project's.
    """
    audit = group.audit
    if not group.uses_gradients or (audit is not None and audit.gradient != Gradient.EXACT):
        return INAPPLICABLE
    if audit is None or audit.mismatch is None or not len(audit.mismatch):
        return UNCHECKED
    wrong = int((audit.mismatch > WRONG).sum())
    if wrong > SHARE_WRONG * len(audit.mismatch):
        share = f"{wrong} of {len(audit.mismatch)} images"
        return Outcome("tripped", f"the gradient differs from finite differences of the logits on {share}")
    return PASSED


def saturated_logits(group: Group) -> Outcome:
    """Cross-entropy has no gradient to give on 10 % of the images or more, and the margin loss breaks what the
    attacks do not.

    An image counts where the probability of its label is 1 in float32 (logits about 17 apart). Many a sound network
    is as sure as that, hence the second condition: 10 steps of PGD on the margin, which has no such limit, succeed
    where the group fails (paired). Carlini & Wagner 2017 (arXiv:1608.04644), section V.B; Croce & Hein 2020, section 4.
    """
    audit = group.audit
    if audit is None or audit.saturated is None:
        return no_audit(group)
    share = float(audit.saturated.mean()) if len(audit.saturated) else 0.0
    if not group.uses_gradients or group.minimised:
        return INAPPLICABLE
    if share < SHARE_SATURATED:
        return PASSED
    if audit.margin is None:
        return UNCHECKED
    what = f"cross-entropy is exactly 0 on {100 * share:.0f} % of the images and the margin loss beats the attacks"
    return inversion(audit.margin, broken(group.findings, audit.rows), what)


def randomised_without_eot(group: Group) -> Outcome:
    """Answers to the same images differ by more than 1e-4 although no part is declared randomised, or an attack on a
    declared one takes its gradient from a single draw.

    Distance of unit-normalised logits over five passes, as in AutoAttack's check of randomised defenses (Croce &
    Hein 2020); expectation over transformations: Athalye et al. 2018, arXiv:1802.00420.
    """
    audit = group.audit
    if audit is None:
        return UNCHECKED
    if not audit.stochastic:
        if audit.spread is None:
            return UNCHECKED
        if audit.spread > APART:
            detail = f"the same images get logits that lie {audit.spread:.2g} apart, and nothing is declared random"
            return Outcome("tripped", detail)
        return PASSED
    if audit.attacked_spread is not None and audit.attacked_spread <= APART:
        return PASSED  # what is drawn is behind the stand-in that attackers follow
    for f in group.findings:
        if f.gradient and max(f.draws, audit.draws) < 2:
            return Outcome("tripped", f"{f.attack} follows the gradient of a single draw of a randomised victim")
    return PASSED
