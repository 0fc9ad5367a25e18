"""Checks of an attack by what weaker, longer or other attacks do on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from advplug.contracts import Strength
from advplug.estimate import rate
from advplug.evidence import Array
from advplug.health.facts import (
    CHOICE,
    CLOSER,
    INAPPLICABLE,
    MIN_IMAGES,
    PASSED,
    REPORT,
    UNCHECKED,
    Finding,
    Group,
    Outcome,
    broken,
    inversion,
    lower,
    lowest,
    no_audit,
    outdone,
)

QUERIES = 1000
"""Questions an image that a random search must have asked before its failure says anything."""
LEFT_TO_SEARCH = 0.002
"""The share of images that random search may break after all gradients failed (AutoAttack's figure)."""
CONVERGED = 0.01
"""By how much twice the steps may lower the accuracy."""


def static_beats_adaptive(group: Group) -> Outcome:
    """Images crafted on the undefended model break the defense where the adaptive attack does not.

    Tramer et al. 2020 (arXiv:2002.08347), Carlini et al. 2019: transfer must not beat white box.
    """
    if not group.defended:
        return INAPPLICABLE
    seen = [f for f in group.findings if f.evidence.static is not None or f.evidence.bare is not None]
    if not seen:
        return UNCHECKED
    if group.minimised:
        return _static_goes_lower(seen)
    adaptive = broken(seen, np.arange(seen[0].evidence.n))
    for f in seen:
        for origin, success in (("static", f.evidence.static), ("bare", f.evidence.bare)):
            if success is not None:
                found = inversion(success.mean(1) > 0.5, adaptive, f"{origin} {f.attack} beats the adaptive attacks")
                if found.state == "tripped":
                    return found
    return PASSED


def _static_goes_lower(seen: Sequence[Finding]) -> Outcome:
    adaptive = lowest(seen, np.arange(seen[0].evidence.n))
    for f in seen:
        for origin, cosine in (("static", f.evidence.cosine_static), ("bare", f.evidence.cosine_bare)):
            similarity = f.evidence.similarity(cosine)
            if similarity is not None:
                found = lower(similarity, adaptive, f"{origin} {f.attack} goes lower than the adaptive attacks")
                if found.state == "tripped":
                    return found
    return PASSED


def black_box_beats_white_box(group: Group) -> Outcome:
    """An attack that sees only scores, labels or another model breaks images that the iterative gradient attacks do
    not.

    Random search with at least 1000 questions an image runs in full audits; black-box cells of the group count, too,
    and so does the random search that ends AutoAttack: more than 0.2 % of the images, at the lower end of the 95 %
    interval, must not be left to it. Without any it stays unchecked, which does not stand in the way of trust.
    Carlini et al. 2019, section 4; Athalye et al. 2018, section 3.1; AutoAttack's warning (Croce & Hein 2020).
    """
    if not group.iterative or group.minimised:
        return INAPPLICABLE
    white = np.logical_or.reduce([_by_gradient(f) for f in group.iterative])
    evident = not bool((group.iterative[0].evidence.attacked & ~white).any())
    # What may be left to the search of a cascade, since no gradient was tried on it since.
    left = np.zeros(len(white), dtype=bool)
    for f in (f for f in group.iterative if f.evidence.black_box is not None):
        at = np.asarray(f.evidence.black_box, dtype=int)
        # Of a series, what one budget left to it: at larger ones no gradient was tried on these images.
        late = int(np.bincount(at[(at > 0) & ~white]).max(initial=0))
        found_rate = rate(late, int(f.evidence.attacked.sum()))
        if late >= MIN_IMAGES and found_rate is not None and (found_rate.low or 0.0) > LEFT_TO_SEARCH:
            detail = f"random search breaks {late} of {found_rate.n} images that no gradient of {f.attack} broke"
            return Outcome("tripped", detail)
        evident |= _asked_enough(f)
        left |= at > 0
    for f in (f for f in group.findings if not f.gradient and f.strength > Strength.FLOOR):
        found = inversion(broken([f], np.arange(f.evidence.n)) & ~left, white, f"{f.attack} beats the gradient attacks")
        if found.state == "tripped":
            return found
        evident |= f.evidence.queries is None or _asked_enough(f)  # a transfer asks nothing
    audit = group.audit
    if audit is not None and audit.black_box is not None:
        evident = True
        what = f"random search with {QUERIES} questions beats the gradient attacks"
        found = inversion(audit.black_box & ~left[audit.rows], white[audit.rows], what)
        if found.state == "tripped":
            return found
    return PASSED if evident else UNCHECKED


def _by_gradient(f: Finding) -> Array:
    """(n,): broken by the attack's gradients, not by a part that does without."""
    found = broken([f], np.arange(f.evidence.n))
    return found if f.evidence.black_box is None else found & ~f.evidence.black_box.astype(bool)


def _asked_enough(f: Finding) -> bool:
    return f.evidence.queries is not None and bool(f.evidence.queries.max(initial=0) >= QUERIES)


def one_step_beats_iterative(group: Group) -> Outcome:
    """One gradient step breaks images that the iterative attacks do not. Athalye et al. 2018 (arXiv:1802.00420)."""
    iterative = group.iterative
    if not iterative:
        return no_audit(group)
    what = "one gradient step beats the iterative attacks"
    if group.audit is not None and group.audit.one_step is not None:
        return outdone(group, group.audit.one_step, iterative, group.audit.rows, what)
    steps = [f for f in group.findings if f.gradient and f.strength is Strength.ONE_STEP]
    if not steps or group.minimised:
        return UNCHECKED
    rows = np.arange(iterative[0].evidence.n)
    return inversion(broken(steps, rows), broken(iterative, rows), what)


def noise_beats_attack(group: Group) -> Outcome:
    """Random noise of the same size breaks images that the attacks do not. Carlini et al. 2019, section 5."""
    attacks = [f for f in group.findings if f.strength > Strength.FLOOR]
    if not attacks:
        return INAPPLICABLE
    if group.audit is None or group.audit.noise is None:
        return UNCHECKED
    return outdone(group, group.audit.noise, attacks, group.audit.rows, "random noise beats the attacks")


def rises_with_budget(group: Group) -> Outcome:
    """Run cold, a short attack breaks images at half the budget that it does not break at the full one.

    Carlini et al. 2019, section 5: accuracy must fall with eps.
    """
    if group.audit is None or group.audit.cold_half is None or group.audit.cold_full is None:
        return no_audit(group)
    compare = lower if group.minimised else inversion
    return compare(group.audit.cold_half, group.audit.cold_full, "half the budget breaks more than the full one")


def unbounded_attack_fails(group: Group) -> Outcome:
    """With L-inf 0.5 allowed, a short attack leaves more images right than the largest class holds among them.

    That ball contains the all-grey image, which gets one answer, so no model can be right on more: whatever is left
    above is the attack's failure. It makes no sense for targeted goals, for similarities, and for victims
    that may refuse to answer. Carlini et al. 2019, section 5; Athalye et al. 2018, section 3.1.
    """
    audit = group.audit
    if group.targeted or group.minimised or (audit is not None and audit.rejects):
        return INAPPLICABLE
    if audit is None or audit.unbounded is None or not group.findings:
        return no_audit(group)
    left = int((~audit.unbounded).sum())
    most = int(np.bincount(group.findings[0].evidence.y[audit.rows]).max(initial=0))
    if left > most:
        detail = f"{left} of {len(audit.rows)} images withstand changes up to 0.5, where at most {most} can"
        return Outcome("tripped", detail)
    return PASSED


def not_converged(group: Group) -> Outcome:
    """Twice the steps lowers the accuracy by more than 1 point, or the mean similarity by more than 0.01.

    The group's strongest gradient attack is run anew with twice its steps on images that the group left standing (an
    attack of several parts, or of another library: APGD with twice its steps). Few images are left of 64, so the
    lower end of the 95 % interval of the drop must exceed 1 point: at least 3 of 64. Carlini et al. 2019, section 5.
    """
    audit = group.audit
    if not group.iterative:
        return INAPPLICABLE
    if audit is None or audit.probed is None or audit.longer is None:
        return UNCHECKED
    if group.minimised:
        return _goes_on_falling(group, audit.probed, audit.longer, audit.rows, audit.longer_steps)
    left = ~broken(group.findings, audit.rows, CHOICE)
    sample = left & audit.probed
    if not left.any():
        return PASSED
    if not sample.any():
        return UNCHECKED
    again = broken(group.findings, audit.rows, REPORT)
    more = max(0, int((sample & audit.longer & ~again).sum()) - int((sample & again & ~audit.longer).sum()))
    share = float(left.mean())
    found = rate(more, int(sample.sum()))
    assert found is not None
    assert found.low is not None
    if more >= MIN_IMAGES and found.low * share > CONVERGED:
        detail = f"{audit.longer_steps} steps break {more} of {int(sample.sum())} images that are left"
        return Outcome("tripped", f"{detail}, about {100 * found.value * share:.1f} points of the accuracy")
    return PASSED


def _goes_on_falling(group: Group, probed: Array, longer: Array, rows: Array, steps: int) -> Outcome:
    if not probed.any():
        return UNCHECKED
    fall = float((lowest(group.findings, rows) - longer)[probed].mean())
    if fall > CLOSER:
        return Outcome("tripped", f"{steps} steps lower the mean similarity by another {fall:.3f}")
    return PASSED
