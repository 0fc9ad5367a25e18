"""What an attack returned, measured before anything is clipped."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from advplug.ball import TOLERANCE, in_box, within
from advplug.contracts import Ball, Batch, Crafted, MinimumNorm, Threat
from advplug.craft import checked
from advplug.perturbations import Patch, Unrestricted, beyond

EIGHTH = Fraction(1, 8)


def batch(value: float = 0.5) -> Batch:
    return Batch(torch.full((2, 1, 2, 2), value), torch.zeros(2, dtype=torch.long), torch.arange(2))


def test_the_box_and_the_budget_have_one_tolerance() -> None:
    x = torch.tensor([[0.0, 1.0], [-2 * TOLERANCE, 0.5], [0.5, 1 + 2 * TOLERANCE], [0.5, torch.nan]])
    assert in_box(x).tolist() == [True, False, False, False]
    assert in_box(x[:1] + TOLERANCE / 2).all()
    assert within(torch.tensor([1.0, 1 + TOLERANCE, 1 + 3 * TOLERANCE, torch.nan]), 1).tolist() == [
        True, True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("allowed", "change", "most"),
    [
        (Ball("linf", EIGHTH), 0.125, 0.0),
        (Ball("linf", EIGHTH), 0.25, 0.125),
        (Ball("l1", EIGHTH), 0.25, 0.875),
        (Ball("linf", Fraction(1)), 0.75, 0.25),
        (MinimumNorm("l2", EIGHTH), 0.25, -0.25),
        (MinimumNorm("l2", EIGHTH), 0.75, 0.25),
        (Patch(Fraction(1, 2)), 0.25, 0.5),
        (Unrestricted(), 0.625, 0.125),
    ],
)
def test_how_far_an_image_is_outside(allowed: Ball | Patch | Unrestricted, change: float, most: float) -> None:
    x = batch().x
    x_adv = x.clone()
    x_adv[1] += change
    found = beyond(allowed, x, x_adv)
    assert found[0] <= 0
    assert found[1] == most
    assert (most > 0) == (not allowed.check(x, x_adv)[1])


@pytest.mark.parametrize("allowed", [Ball("linf", EIGHTH), MinimumNorm("linf", EIGHTH)])
def test_what_left_the_set_is_counted_measured_and_brought_back(allowed: Ball) -> None:
    part = batch(0.75)
    x_adv = part.x.clone()
    x_adv[0] += 0.5
    x, count, worst = checked(Crafted(x_adv), part, Threat(allowed))
    # A search for the smallest change left [0, 1] by 0.25; that it went beyond the budget is no fault.
    assert (count, worst) == (1, 0.25 if isinstance(allowed, MinimumNorm) else 0.375)
    assert torch.equal(x[1], part.x[1])
    assert x[0].unique().tolist() == ([0.75] if isinstance(allowed, MinimumNorm) else [0.875])
