"""Balls: distance, membership, projection, starts, directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from advplug.ball import SPARSITY, TOLERANCE, direction, distance, inside, project, random_start
from advplug.errors import UsageError
from advplug.rng import Stream

NORMS = ("linf", "l2", "l1")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, str, float]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(2, 3), (3, 1, 4, 4), (1, 3, 8, 8)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.rand(shape, generator=g, dtype=dtype)
    if draw(st.booleans()):
        x = x.round()
    x_adv = x + draw(st.sampled_from([1e-3, 0.1, 1.0, 10.0])) * torch.randn(shape, generator=g, dtype=dtype)
    eps = draw(st.sampled_from([0.0, 1e-4, 8 / 255, 0.3, 1.0, 2.5]))
    return x, x_adv, draw(st.sampled_from(NORMS)), eps


@given(cases())
@settings(max_examples=150)
def test_projection_is_inside_idempotent_and_typed(case: tuple[Tensor, Tensor, str, float]) -> None:
    x, x_adv, norm, eps = case
    p = project(x, x_adv, norm, eps)
    assert p.dtype == x.dtype
    assert p.shape == x.shape
    assert p.min() >= 0
    assert p.max() <= 1
    assert inside(x, p, norm, eps).all()
    torch.testing.assert_close(project(x, p, norm, eps), p, rtol=0, atol=2 * TOLERANCE)
    if eps == 0:
        assert torch.equal(p, x)


@given(cases())
@settings(max_examples=80)
def test_l1_projection_is_the_nearest_point(case: tuple[Tensor, Tensor, str, float]) -> None:
    """Against bisection on the threshold, an independent way to the same point."""
    x, x_adv, _, eps = case
    x, x_adv = x.double().flatten(1), x_adv.double().flatten(1)
    u = x_adv - x
    room = torch.where(u > 0, 1 - x, x)
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), u.abs().amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.minimum((u.abs() - middle).clamp_min(0), room).sum(1, keepdim=True) > eps
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    fits = torch.minimum(u.abs(), room).sum(1, keepdim=True) <= eps
    kept = torch.minimum((u.abs() - torch.where(fits, 0.0, high)).clamp_min(0), room)
    torch.testing.assert_close(project(x, x_adv, "l1", eps), x + kept * u.sign(), rtol=0, atol=1e-9)


def test_distance_and_inside() -> None:
    x = torch.zeros(1, 1, 2, 2)
    x_adv = torch.tensor([[[[0.1, 0.0], [0.2, 0.2]]]])
    assert distance(x, x_adv, "linf").item() == pytest.approx(0.2)
    assert distance(x, x_adv, "l2").item() == pytest.approx(0.3)
    assert distance(x, x_adv, "l1").item() == pytest.approx(0.5)
    assert inside(x, x_adv, "l2", 0.3).item()
    assert not inside(x, x_adv, "l2", 0.2999).item()
    assert not inside(x, x - 1e-4, "linf", 0.1).item()
    assert not inside(x, x + float("nan"), "linf", 0.1).item()
    with pytest.raises(UsageError, match="norm 'l7' is unknown"):
        distance(x, x, "l7")


@pytest.mark.parametrize("norm", NORMS)
def test_starts_fill_the_ball_and_belong_to_the_image(norm: str) -> None:
    x = torch.full((400, 1, 2, 2), 0.5, dtype=torch.float64)
    index = torch.arange(400)
    start = random_start(x, index, norm, 0.2, Stream(1, "t"), "start", 0)
    assert inside(x, start, norm, 0.2).all()
    radius = distance(x, start, norm) / 0.2
    # Uniform in d dimensions: radius ** d is uniform on (0, 1).
    assert (radius**4).mean().item() == pytest.approx(0.5, abs=0.06)
    assert (start - x).mean(0).abs().max() < 0.02
    rows = torch.tensor([7, 399, 0])
    again = random_start(x[rows], index[rows], norm, 0.2, Stream(1, "t"), "start", 0)
    assert torch.equal(again, start[rows])
    other = random_start(x, index, norm, 0.2, Stream(1, "t"), "start", 1)
    assert not torch.equal(other, start)
    assert torch.equal(random_start(x, index, norm, 0.0, Stream(1, "t")), x)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_beats_random_ones(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64)
    best = direction(gradient, norm)
    assert distance(torch.zeros_like(best), best, norm) == pytest.approx(torch.ones(5, dtype=torch.float64))
    gain = (best * gradient).flatten(1).sum(1)
    for _ in range(50):
        other = torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64)
        other = other / distance(torch.zeros_like(other), other, norm).view(-1, 1, 1, 1)
        assert (gain >= (other * gradient).flatten(1).sum(1)).all()
    assert torch.equal(direction(torch.zeros(2, 3), norm), torch.zeros(2, 3))


def test_small_gradients_keep_their_direction_in_float32() -> None:
    tiny = torch.tensor([[3e-25, 4e-25]])
    torch.testing.assert_close(direction(tiny, "l2"), torch.tensor([[0.6, 0.8]]))


def test_l1_direction_is_sparse_and_passes_over_saturated_pixels() -> None:
    gradient = torch.arange(1.0, 301.0)[None]
    x = torch.full((1, 300), 0.5)
    x[0, -1] = 1.0
    step = direction(gradient, "l1", x)
    assert int((step != 0).sum()) == round(SPARSITY * 300)
    assert step[0, -1] == 0
    assert step[0, 296:299].tolist() == pytest.approx([1 / 3] * 3)
