"""Balls: distance, membership, projection, starts, directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from advplug.ball import SPARSITY, TOLERANCE, direction, distance, in_box, inside, project, random_start, within
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
@settings(max_examples=60)
def test_what_is_inside_stays_put_and_nothing_moves_further_than_it_has_to(
    case: tuple[Tensor, Tensor, str, float],
) -> None:
    x, x_adv, norm, eps = case
    p = project(x, x_adv, norm, eps)
    there = p if norm == "l2" else torch.where(torch.rand_like(p) < 0.5, p, x)
    if inside(x, there, norm, max(eps - 1e-5, 0)).all():
        assert torch.equal(project(x, there, norm, eps), there)
    # No coordinate goes beyond where it was headed, or turns round.
    room = (x_adv - x).abs() + 4 * TOLERANCE
    assert ((p - x).abs() <= room).all()
    assert ((p - x) * (x_adv - x) >= -TOLERANCE).all()


@given(cases(), st.integers(0, 20))
@settings(max_examples=60)
def test_l0_keeps_the_pixels_that_changed_most(case: tuple[Tensor, Tensor, str, float], count: int) -> None:
    """A pixel is all of its channels; vectors are pixels of one channel."""
    x, x_adv, _, _ = case
    headed = x_adv.clamp(0, 1)
    p = project(x, x_adv, "l0", count + 0.5)
    change, kept = (((t - x).abs() if x.dim() == 2 else (t - x).abs().amax(1)).flatten(1) for t in (headed, p))
    for row, (strength, left) in enumerate(zip(change, kept, strict=True)):
        stays = left > 0
        assert int(stays.sum()) == min(count, int((strength > TOLERANCE).sum()))
        assert torch.equal(left[stays], strength[stays])
        if bool(stays.any()) and not bool(stays.all()):
            assert strength[stays].min() >= strength[~stays].max()
        moved = stays if x.dim() == 2 else stays.view(x.shape[2:]).expand(x.shape[1:])
        assert torch.equal(p[row], torch.where(moved, headed[row], x[row]))
    assert torch.equal(distance(x, p, "l0"), (kept > 0).sum(1).to(x.dtype))
    assert inside(x, p, "l0", count).all()


def test_l0_counts_pixels_once_and_no_rounding() -> None:
    x = torch.full((2, 3, 2, 2), 0.5)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0], x_adv[0, 1, 0, 0], x_adv[0, 2, 1, 1], x_adv[0, 1, 0, 1] = 0.6, 0.3, 0.9, 0.5 + 5e-7
    assert distance(x, x_adv, "l0").tolist() == [2, 0]
    assert distance(x[:, 0, 0], x_adv[:, 0, 0], "l0").tolist() == [1, 0]
    one, two = (project(x, x_adv, "l0", k) for k in (1, 3))
    assert (one != x).nonzero().tolist() == [[0, 2, 1, 1]]
    assert (two != x).nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 1]]


def test_projections_by_hand() -> None:
    x = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.9, 0.5, 0.1]], dtype=torch.float64)
    x_adv = torch.tensor([[0.9, 0.2, 0.6], [0.6, 0.5, 0.5], [1.5, 0.5, 0.1]], dtype=torch.float64)
    # Soft threshold .1 leaves (.3, -.2, 0); the second is inside; the box ends the third.
    l1 = [[0.8, 0.3, 0.5], [0.6, 0.5, 0.5], [1.0, 0.5, 0.1]]
    torch.testing.assert_close(project(x, x_adv, "l1", 0.5), torch.tensor(l1, dtype=torch.float64))
    shorter = 0.26**0.5 / 2
    l2 = project(x, x_adv, "l2", shorter)
    torch.testing.assert_close(l2[0], x[0] + (x_adv[0] - x[0]) / 2)
    assert l2[1].tolist() == [0.6, 0.5, 0.5]
    torch.testing.assert_close(l2[2], torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    linf = [[0.7, 0.3, 0.6], [0.6, 0.5, 0.5], [1.0, 0.5, 0.1]]
    torch.testing.assert_close(project(x, x_adv, "linf", 0.2), torch.tensor(linf, dtype=torch.float64))


def test_tolerance_is_relative_to_one_plus_the_budget_and_of_each_image_alone() -> None:
    edge = 1.0 + 2 * TOLERANCE
    sizes = torch.tensor([edge, edge + 1e-9, edge - 1e-9, float("nan")], dtype=torch.float64)
    assert within(sizes, 1.0).tolist() == [True, False, True, False]
    pixels = torch.tensor([[0, -TOLERANCE], [0, 1 + TOLERANCE], [0.5, -2e-6], [0.5, 1 + 2e-6], [0, 1.5], [0, 1]])
    assert in_box(pixels.double()).tolist()[2:] == [False, False, False, True]
    exact = torch.tensor([[-TOLERANCE, 1 + TOLERANCE]], dtype=torch.float64)
    assert in_box(exact).tolist() == [True]


def test_unknown_norms_are_named_with_the_known_ones() -> None:
    x = torch.zeros(1, 2)
    for use in (
        lambda: project(x, x, "l7", 1.0),
        lambda: direction(x, "l7"),
        lambda: random_start(x, torch.zeros(1), "l7", 1.0, Stream(0)),
        lambda: distance(x, x, "l7"),
    ):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == "norm 'l7' is unknown; choose from linf, l2, l1, l0"


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
    assert random_start(x[:0], index[:0], norm, 0.2, Stream(1, "t")).shape == (0, 1, 2, 2)
    # Drawn in the images' own precision.
    assert (start.float().double() != start).any()
    assert random_start(x.float(), index, norm, 0.2, Stream(1, "t")).dtype == torch.float32


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
    beside_large = torch.tensor([[3e-25, 4e-25], [-4e3, 3e3]])
    torch.testing.assert_close(direction(beside_large, "l2"), torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))


def test_l1_direction_is_sparse_and_passes_over_saturated_pixels() -> None:
    gradient = torch.arange(1.0, 301.0)[None]
    x = torch.full((1, 300), 0.5)
    x[0, -1] = 1.0
    step = direction(gradient, "l1", x)
    assert int((step != 0).sum()) == round(SPARSITY * 300)
    assert step[0, -1] == 0
    assert step[0, 296:299].tolist() == pytest.approx([1 / 3] * 3)
    assert step[0].sum() == pytest.approx(1)
    both = direction(torch.cat([gradient, -gradient]), "l1")
    assert both.sum(1).tolist() == pytest.approx([1, -1])


def test_an_l1_step_takes_one_coordinate_of_few_that_has_somewhere_to_go() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5], [0.0, 1.0, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0, 1.0]])
    gradient = torch.tensor([[-5, 0.4, 5, -0.3, 0.2], [0.1, -0.2, 0.05, 0, 0], [-1, -2, 3, 0.5, 1]])
    assert direction(gradient, "l1", x).tolist() == [[0, 1, 0, 0, 0], [0, -1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert direction(gradient, "l1").tolist()[2] == [0, 0, 1, 0, 0]
