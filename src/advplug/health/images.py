"""Checks of the images that an attack returns: inside the budget, fit for a file, the best that it saw."""

from __future__ import annotations

from advplug.health.facts import INAPPLICABLE, MIN_IMAGES, PASSED, UNCHECKED, Group, Outcome

LOST = 0.15
"""Share of the images whose success may vanish in rounding."""


def perturbation_violation(group: Group) -> Outcome:
    """Any returned image outside the perturbation set or [0, 1], beyond float tolerance."""
    for f in group.findings:
        if f.evidence.violations:
            detail = f"{f.evidence.violations} images lay outside the budget, by up to {f.evidence.worst_violation:.3g}"
            return Outcome("tripped", f"{f.attack}: {detail}; they were projected back")
    return PASSED if group.findings else UNCHECKED


def lost_in_rounding(group: Group) -> Outcome:
    """Robust accuracy rises by more than 15 points, and 2 images, once images are stored in 8 bits.

    A budget between two levels (0.1 is 25.5 of them) loses up to a level by itself, and what is found just inside the
    ball leaves no room to be pushed further: 10 points on a sound network whose accuracy falls steeply there. Attacks
    for the smallest change are left out for the latter reason.
    """
    seen = [f for f in group.findings if f.evidence.rounded is not None and f.evidence.found is None]
    if not seen:
        return INAPPLICABLE
    for f in seen:
        assert f.evidence.rounded is not None
        gained = f.evidence.robust(f.evidence.rounded).mean(1) - f.evidence.robust(f.evidence.adaptive).mean(1)
        if gained.sum() >= MIN_IMAGES and gained.mean() > LOST:
            return Outcome("tripped", f"{f.attack}: {100 * gained.mean():.1f} points of its success vanish in 8 bits")
    return PASSED


def silent_success(group: Group) -> Outcome:
    """An attack fooled a deterministic victim on its way and returned an image that does not: on 2 images, and 1 % of
    those attacked, or more.

    Pintor et al. 2022 (arXiv:2106.09947), indicator I3. A randomised victim is fooled on the way by luck, too.
    """
    once = [f for f in group.findings if f.evidence.found is None and f.evidence.draws == 1]
    gradient = [f for f in once if f.gradient and not f.evidence.minimised]
    seen = [f for f in gradient if f.evidence.any_iterate is not None]
    if not seen:
        return UNCHECKED if gradient else INAPPLICABLE
    for f in seen:
        e = f.evidence
        assert e.any_iterate is not None
        lost = int((e.attacked & e.any_iterate.astype(bool) & ~e.adaptive[:, 0].astype(bool)).sum())
        if lost >= max(MIN_IMAGES, 0.01 * e.attacked.sum()):
            return Outcome("tripped", f"{f.attack} came across {lost} successes that it did not return")
    return PASSED
