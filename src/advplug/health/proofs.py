"""Checks of certificates against what attacks found."""

from __future__ import annotations

import numpy as np

from advplug.health.facts import INAPPLICABLE, PASSED, SIGNIFICANCE, UNCHECKED, Group, Outcome, inversion


def below_certified(group: Group) -> Outcome:
    """Attacks break more of the proven images than the proofs' own error explains (binomial test), or robust accuracy
    is significantly lower than certified accuracy at the same norm and radius (paired).

    Images that are not answered without attack are left out of the latter: a decision by fewer draws than a proof
    abstains more often. Cohen et al. 2019 (arXiv:1902.02918), theorem 1: no change within the radius alters the answer.
    """
    if group.certified is None:
        return INAPPLICABLE
    if not group.findings:
        return UNCHECKED
    proven, n = group.certified, len(group.certified)
    broken, robust, answered = (np.zeros(n, dtype=bool), np.ones(n, dtype=bool), np.ones(n, dtype=bool))
    for f in group.findings:
        e = f.evidence
        for success in (s for s in (e.adaptive, e.static, e.bare) if s is not None):
            broken |= e.attacked & (success.mean(axis=1) > 0.5)
            robust &= e.robust(success).mean(axis=1) >= 0.5
        if e.rejected is not None:
            answered &= e.rejected.mean(axis=1) < 0.5
    wrong, proofs = int((proven & broken).sum()), int(proven.sum())
    if _at_least(wrong, proofs, group.proof_error) < SIGNIFICANCE:
        detail = f"{wrong} of {proofs} images that are proven right at this budget are broken"
        return Outcome("tripped", f"{detail}; {group.proof_error * proofs:.2g} wrong proofs are expected")
    what = "certified accuracy is above what attacks leave"
    return inversion(proven & answered, robust & answered, what) if proofs else PASSED


def _at_least(k: int, n: int, p: float) -> float:
    """The probability of `k` or more among `n` where each has probability `p`."""
    from scipy.stats import binom

    return float(binom.sf(k - 1, n, p))
