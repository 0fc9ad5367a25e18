"""Checks of the victim itself: what it knows, what it depends on, what it answers with, what its defense adds."""

from __future__ import annotations

import numpy as np

from advplug.estimate import rate
from advplug.evidence import Array
from advplug.health.facts import INAPPLICABLE, PASSED, UNCHECKED, Group, Outcome, inversion


def near_chance(group: Group) -> Outcome:
    """The lower bound of clean accuracy lies under c + 0.2 (1 - c), with c the largest class's share."""
    if not group.findings:
        return UNCHECKED
    e = group.findings[0].evidence
    return chance(e.y, e.clean)


def chance(y: Array, right: Array) -> Outcome:
    """Trips where `right` (n, d) is hardly more often than the largest class of `y` (n,) would be by itself."""
    largest = np.bincount(y).max() / len(y)
    clean = rate(float(right.mean(axis=1).sum()), len(y))
    assert clean is not None
    assert clean.low is not None
    asked = largest + 0.2 * (1 - largest)
    if clean.low < asked:
        detail = f"clean accuracy {100 * clean.value:.1f} % (at least {100 * clean.low:.1f} %) is near chance"
        alone = f"always answering the largest class gives {100 * largest:.1f} %"
        return Outcome("tripped", f"{detail}; {alone}, and at least {100 * asked:.1f} % are asked for")
    return PASSED


def batch_dependent(group: Group) -> Outcome:
    """An image's logits change with the other images of its batch (f(x)[i] against f(x[i]))."""
    if group.batch_dependent is None:
        return UNCHECKED
    if group.batch_dependent:
        return Outcome("tripped", "an image's logits depend on the rest of its batch: accuracy is not a property of it")
    return PASSED


def probabilities(group: Group) -> Outcome:
    """What the attacks take for logits are probabilities: all in [0, 1] and summing to 1, up to 1e-5.

    Losses take the softmax again, and their gradients vanish. AutoAttack's check (Croce & Hein 2020).
    """
    if group.audit is None or group.audit.probabilities is None:
        return UNCHECKED
    if group.audit.probabilities:
        return Outcome("tripped", "the model answers with probabilities, on which losses have hardly a gradient")
    return PASSED


def undeclared_normalisation(group: Group) -> Outcome:
    """The model is right on significantly more of the first images once they are standardised (paired).

    Tried: zero mean and unit variance a channel, (x - 0.5) / 0.5, and 255 x. It sees a model that was trained on
    other pixels than [0, 1] and loses accuracy on these, whose budgets would mean something else. It does not see
    one that reads both scales as well, for which nothing is wrong, and one that is near chance on all of them, which
    `near-chance` reports. The check is this project's.
    """
    audit = group.audit
    if audit is None or audit.plain is None or audit.normalised is None:
        return UNCHECKED
    what = "the model is right more often on standardised pixels than on pixels in [0, 1]"
    return inversion(audit.normalised, audit.plain, what)


def defense_adds_nothing(group: Group) -> Outcome:
    """The 95 % interval of the paired difference to the undefended baseline holds 0 or lies below it.

    Bonett & Price 2012 for the interval. It says something of the defense, not of the evaluation.
    """
    if not group.defended:
        return INAPPLICABLE
    if group.difference is None or group.difference.low is None or group.difference.high is None:
        return UNCHECKED
    d = group.difference
    assert d.low is not None
    assert d.high is not None
    if d.low > 0:
        return PASSED
    interval = f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    if group.minimised:
        interval = f"{d.value:+.3f} cosine [{d.low:+.3f}, {d.high:+.3f}]"
    what = "similarity under attack" if group.minimised else "robust accuracy"
    said = f"the defense lowers {what}" if d.high < 0 else "no difference to the undefended model is shown"
    return Outcome("tripped", f"{said}: {interval}")
