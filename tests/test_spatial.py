"""The spatial attack: where pixels go, which transformation is chosen, and what is allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advplug.attacks.spatial import Ranges, Spatial, _cross_entropy, transformed
from advplug.builtin.geometric import _effort, spatial
from advplug.contracts import Batch, Crafted, Targeted, Threat, Trace, Untargeted, Wrap
from advplug.errors import UsageError
from advplug.testing import check_attack
from advplug.victim import Victim
from cli_tools import CNN, QUICK, evaluate
from linear import Function, stream

ONE = Fraction(1)


def dot(row: int, column: int, shape: tuple[int, int, int] = (1, 7, 7), dtype: torch.dtype = torch.float32) -> Tensor:
    """An image that is black but for one white pixel, in every channel."""
    x = torch.zeros(1, *shape, dtype=dtype)
    x[0, :, row, column] = 1
    return x


def moved(x: Tensor, *values: float) -> Tensor:
    return transformed(x, torch.tensor([values], dtype=torch.float64))


def looks_at(row: int, column: int, channel: int = 0) -> Victim:
    """Class 1 once that pixel is brighter than 1/2, class 0 before."""

    def logits(x: Tensor) -> Tensor:
        value = x[:, channel, row, column] - 0.5
        return torch.stack([torch.zeros_like(value), value], 1)

    return Victim(Function(logits), 2)


def batch_of(x: Tensor, y: int = 0) -> Batch:
    return Batch(x, torch.full((len(x),), y), torch.arange(len(x)) + 100)


def run(attack: Any, victim: Victim, batch: Batch, eps: Fraction = ONE, **threat: Any) -> Crafted:
    allowed = attack.perturbation("spatial", eps)
    made = attack(victim, batch, Threat(allowed, threat.pop("goal", Untargeted()), **threat), stream())
    assert allowed.check(batch.x, made.x, made.applied).all()
    return made


def trace_of(made: Crafted) -> Trace:
    assert made.trace is not None
    return made.trace


# --- where pixels go ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_shifts_are_exact_in_both_directions(channels: int, dtype: torch.dtype) -> None:
    x = torch.rand(2, channels, 9, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for right, down in ((0, 0), (2, 0), (0, 3), (-1, -2), (5, -8), (6, 0), (0, 9)):
        expected = torch.zeros_like(x)
        rows, columns = 9 - abs(down), 6 - abs(right)
        if rows > 0 and columns > 0:
            to = (max(down, 0), max(right, 0))
            start = (max(-down, 0), max(-right, 0))
            piece = x[..., start[0] : start[0] + rows, start[1] : start[1] + columns]
            expected[..., to[0] : to[0] + rows, to[1] : to[1] + columns] = piece
        values = torch.tensor([[right, down, 0, 0]] * 2, dtype=torch.float64)
        assert torch.equal(transformed(x, values), expected)
        # Interpolation agrees with it: the angle is none, but not seen to be.
        near = transformed(x, values + torch.tensor([0, 0, 1e-9, 0], dtype=torch.float64))
        torch.testing.assert_close(near, expected, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-9)


def test_fractions_of_pixels_are_shared_between_neighbours() -> None:
    x = moved(dot(3, 3, (3, 7, 5)), 0.25, -1.5, 0, 0)
    for channel in range(3):
        expected = torch.zeros(7, 5)
        expected[1, 3] = expected[2, 3] = 0.5 * 0.75
        expected[1, 4] = expected[2, 4] = 0.5 * 0.25
        torch.testing.assert_close(x[0, channel], expected, rtol=0, atol=1e-6)


def test_positive_angles_turn_counter_clockwise() -> None:
    right_of_middle = dot(3, 5)
    for angle, place in ((90, (1, 3)), (-90, (5, 3)), (180, (3, 1))):
        torch.testing.assert_close(moved(right_of_middle, 0, 0, angle, 0), dot(*place), rtol=0, atol=1e-6)
    # Turned first, then shifted.
    torch.testing.assert_close(moved(right_of_middle, 2, 1, 90, 0), dot(2, 5), rtol=0, atol=1e-6)


def test_rotation_agrees_with_the_plane_and_keeps_lengths_in_oblong_images() -> None:
    """A linear ramp, turned, is a ramp in the turned direction, wherever the source lies inside the image."""
    height, width, angle = 11, 17, 30.0
    along, across = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - 5, torch.arange(width, dtype=torch.float64) - 8, indexing="ij"
    )
    ramp = (0.5 + 0.02 * across + 0.01 * along)[None, None]
    made = moved(ramp, 0, 0, angle, 0.25)[0, 0]
    a = math.radians(angle)
    source_across = (math.cos(a) * across - math.sin(a) * along) / 1.25
    source_along = (math.sin(a) * across + math.cos(a) * along) / 1.25
    inside = (source_across.abs() <= 8) & (source_along.abs() <= 5)
    assert inside.sum() > 90
    expected = 0.5 + 0.02 * source_across + 0.01 * source_along
    torch.testing.assert_close(made[inside], expected[inside], rtol=0, atol=1e-12)
    outside = (source_across.abs() >= 9) | (source_along.abs() >= 6)
    assert outside.any()
    assert (made[outside] == 0).all()


def test_growth_moves_pixels_away_from_the_middle() -> None:
    row = moved(dot(3, 5), 0, 0, 0, 0.5)[0, 0, 3]
    assert row.argmax().item() == 6
    row = moved(dot(3, 5), 0, 0, 0, -0.5)[0, 0, 3]
    assert row.argmax().item() == 4
    grey = torch.full((1, 1, 8, 8), 0.5)
    half = moved(grey, 0, 0, 0, -0.5)[0, 0]
    torch.testing.assert_close(half[2:6, 2:6], torch.full((4, 4), 0.5))
    assert half[0].sum() == half[:, 7].sum() == 0


def test_each_image_has_its_own_and_the_batch_does_not_matter() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.rand(5, 3, 8, 8, generator=g)
    values = torch.rand(5, 4, generator=g, dtype=torch.float64) * torch.tensor([3, 3, 60, 0.4]) - 0.2
    values[2] = 0
    values[3] = torch.tensor([1, 0, 0, 0])
    together = transformed(x, values)
    assert torch.equal(together[2], x[2])
    for i in range(5):
        torch.testing.assert_close(transformed(x[i : i + 1], values[i : i + 1])[0], together[i], rtol=0, atol=1e-6)


# --- what is allowed ---


def test_the_set_re_applies_what_was_done() -> None:
    allowed = Spatial(Fraction(1, 2), Ranges(shift=0.25, angle=20, scale=0.1))
    x = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    # 12 wide, 8 high: 3 pixels across and 2 along, at budget 1.
    cases = [((1.5, 0, 0, 0), 0.5), ((0, -1, 0, 0), 0.5), ((0, 0, 10, 0), 0.5), ((0, 0, 0, -0.05), 0.5),
             ((3, 0, 0, 0), 1.0), ((0, 1.5, 0, 0), 0.75), ((1, 1, -15, 0.01), 0.75), ((0, 0, 0, 0), 0.0)]  # fmt: skip
    for values, share in cases:
        applied = torch.tensor([values], dtype=torch.float64)
        made = transformed(x, applied)
        assert allowed.measure(x, made, applied).item() == pytest.approx(share, abs=1e-6)
        assert allowed.check(x, made, applied).item() is (share <= 0.5)
        assert allowed.check(x, made).item() is (share == 0)
        assert not allowed.check(x, (made + 0.001).clamp(0, 1), applied).item()
        assert allowed.measure(x, made * float("nan"), applied).item() == math.inf


def test_a_number_without_a_range_must_not_change() -> None:
    allowed = Spatial(ONE, Ranges(shift=0.0, angle=20))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for values in ((1.0, 0, 0, 0), (0, 0, 0, 0.1)):
        applied = torch.tensor([values])
        assert not allowed.check(x, transformed(x, applied), applied).item()


def test_shifts_are_whole_pixels_at_least_one() -> None:
    for side, pixels in ((28, 3), (32, 3), (8, 1), (3, 1), (224, 22)):
        assert Ranges().limits(side, 5)[1].item() == pixels
    assert Ranges(shift=0).limits(8, 8)[:2].tolist() == [0, 0]


# --- the search ---


@pytest.mark.parametrize("params", [{}, {"scale": 0.2, "scales": 3}, {"method": "random", "scale": 0.1}])
def test_conformance(params: dict[str, Any]) -> None:
    check_attack("spatial", **params)


@pytest.mark.parametrize(("scale", "count"), [(0.0, 775), (0.2, 5 * 775)])
def test_the_grid_has_all_combinations_once(scale: float, count: int) -> None:
    x = torch.zeros(1, 1, 32, 32)
    asked = []

    def logits(z: Tensor) -> Tensor:
        asked.append(len(z))
        return torch.stack([torch.ones(len(z)), torch.zeros(len(z))], 1)

    made = run(spatial(scale=scale), Victim(Function(logits), 2), batch_of(x))
    assert trace_of(made).queries is not None
    assert trace_of(made).queries.tolist() == [count]  # type: ignore[union-attr]
    assert count <= sum(asked) < 1.2 * count
    table = spatial(scale=scale)._table(batch_of(x), 1.0, stream())[0]
    assert len(torch.unique(table, dim=0)) == count
    assert table[0].tolist() == [0, 0, 0, 0]
    for column, values in enumerate(([-3, -1.5, 0, 1.5, 3], [-3, -1.5, 0, 1.5, 3], list(range(-30, 31, 2)))):
        torch.testing.assert_close(table[:, column].unique(), torch.tensor(values).double(), rtol=0, atol=1e-9)
    assert len(table[:, 3].unique()) == (5 if scale else 1)


@pytest.mark.parametrize("ranges", [{"angle": 0}, {"shift": 0}, {"shift": 0, "angle": 0, "scale": 0.3}, {"scale": 0.3}])
def test_the_forecast_counts_what_is_on_the_grid(ranges: dict[str, float]) -> None:
    attack = spatial(**ranges)  # type: ignore[arg-type]
    table = attack._table(batch_of(torch.rand(1, 1, 28, 28)), 1.0, stream())
    settings = {"shift": 0.1, "angle": 30.0, "scale": 0.0, "scales": 5, "method": "grid", "tries": 10} | ranges
    assert _effort(settings) == (table.shape[1] + 1, 0)


def test_agrees_with_a_search_image_by_image_and_try_by_try() -> None:
    with stream().as_global("net"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    batch = replace(batch_of(x), y=net(x).argmax(1))
    attack = spatial(shift=0, angle=8, method="random", tries=60)
    made = run(attack, Victim(net, 5, batch_size=16), batch)
    assert made.applied is not None
    table, fooled = attack._table(batch, 1.0, stream()), []
    for i, y in enumerate(batch.y):
        tried = torch.cat([transformed(x[i : i + 1], values[None]) for values in table[i]])
        with torch.no_grad():
            logits = net(tried)
        hit = logits.argmax(1) != y
        loss = nn.functional.cross_entropy(logits, y.expand(len(tried)), reduction="none")
        best = hit.int().argmax() if hit.any() else loss.argmax()
        assert torch.equal(made.applied[i], table[i, best])
        torch.testing.assert_close(made.x[i], tried[best], rtol=0, atol=1e-6)
        fooled.append(bool(hit.any()))
    assert 0 < sum(fooled) < 6
    assert trace_of(made).any_iterate.tolist() == fooled  # type: ignore[union-attr]


@pytest.mark.parametrize(("place", "axis", "sign"), [((2, 5), 0, 1), ((2, 1), 0, -1), ((4, 3), 1, 1), ((0, 3), 1, -1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_finds_the_one_shift_that_fools(channels: int, place: tuple[int, int], axis: int, sign: int) -> None:
    """A dot at (2, 3) has to go to the pixel that the victim looks at, two away."""
    batch = batch_of(dot(2, 3, (channels, 8, 8)))
    made = run(spatial(shift=0.25, angle=0), looks_at(*place, channel=channels - 1), batch)
    assert trace_of(made).any_iterate.all()  # type: ignore[union-attr]
    assert made.applied is not None
    assert made.applied[0, axis].item() == 2 * sign
    assert made.applied[0, 2:].tolist() == [0, 0]
    assert looks_at(*place, channel=channels - 1).decide(made.x).label.item() == 1


def test_finds_the_rotation_and_the_growth_that_fool() -> None:
    made = run(spatial(shift=0, angle=90), looks_at(1, 3), batch_of(dot(3, 5)))
    assert made.applied is not None
    assert made.applied[0].tolist() == pytest.approx([0, 0, 90, 0])
    made = run(spatial(shift=0, angle=0, scale=0.5, scales=3), looks_at(3, 4), batch_of(dot(3, 5)))
    assert made.applied is not None
    assert made.applied[0].tolist() == [0, 0, 0, -0.5]


def test_each_image_gets_its_own_transformation() -> None:
    """One has to go left, one up, one is wrong as it is, and for one nothing helps."""
    x = torch.cat([dot(3, 5), dot(5, 3), dot(3, 3), dot(0, 0)])
    batch, victim = batch_of(x), replace(looks_at(3, 3), batch_size=4)
    made = run(spatial(shift=2 / 7, angle=0), victim, batch)
    trace = trace_of(made)
    assert trace.any_iterate.tolist() == [True, True, True, False]  # type: ignore[union-attr]
    assert made.applied is not None
    assert made.applied[:3].tolist() == [[-2, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(made.x[2], x[2])
    assert trace.queries is not None
    assert trace.queries[2].item() < trace.queries[3].item() == 25


def test_survivors_get_the_highest_loss_and_confident_ones_too() -> None:
    """The victim's margin is never crossed, and beyond what the usual form of cross-entropy resolves."""
    x = dot(3, 3)

    def logits(z: Tensor) -> Tensor:
        value = 100 + z[:, 0, 3, 3] - z[:, 0, 3, 4]
        return torch.stack([value, torch.zeros_like(value)], 1)

    made = run(spatial(shift=1 / 7, angle=0), Victim(Function(logits), 2), batch_of(x))
    assert not trace_of(made).any_iterate.any()  # type: ignore[union-attr]
    assert made.applied is not None
    assert made.applied[0].tolist() == [1, 0, 0, 0]


def test_cross_entropy_is_the_usual_one_and_more_precise() -> None:
    scores = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    y = torch.arange(20) % 5
    usual = nn.functional.cross_entropy(scores, y, reduction="none")
    torch.testing.assert_close(_cross_entropy(scores, y), usual)
    sure = _cross_entropy(torch.tensor([[300.0, 0.0], [301.0, 0.0]]).double(), torch.tensor([0, 0]))
    assert sure.tolist() == pytest.approx([math.exp(-300), math.exp(-301)], rel=1e-9)


def test_targeted_goals_take_the_target_only() -> None:
    """Class 1 lies to the left, class 2 above: the target decides where the dot goes."""

    def logits(z: Tensor) -> Tensor:
        return torch.stack([torch.full((len(z),), 0.5), z[:, 0, 3, 2], z[:, 0, 2, 3]], 1)

    batch = replace(batch_of(torch.cat([dot(3, 3)] * 2)), target=torch.tensor([1, 2]))
    made = run(spatial(shift=1 / 7, angle=0), Victim(Function(logits), 3), batch, goal=Targeted())
    assert made.applied is not None
    assert made.applied[:, :2].tolist() == [[-1, 0], [0, -1]]
    with pytest.raises(UsageError, match=r"Batch\.target"):
        run(spatial(), Victim(Function(logits), 3), replace(batch, target=None), goal=Targeted())


@pytest.mark.parametrize("method", ["grid", "random"])
def test_budgets_are_shares_of_the_ranges(method: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 8, 8, generator=g)
    attack = spatial(shift=0.25, scale=0.3, method=method, tries=40)  # type: ignore[arg-type]
    batch, victim = batch_of(x), looks_at(0, 0)
    still = run(attack, victim, batch, Fraction(0))
    assert torch.equal(still.x, x)
    assert still.applied is not None
    assert not still.applied.any()
    small, full = run(attack, victim, batch, Fraction(1, 4)), run(attack, victim, batch)
    assert small.applied is not None
    assert full.applied is not None
    size = attack.perturbation("spatial", ONE).measure
    assert (size(x, small.x, small.applied) <= 0.25 + 1e-6).all()
    assert (size(x, full.x, full.applied) > 0.25).any()


def test_random_draws_depend_on_the_image_only() -> None:
    x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    attack, victim = spatial(method="random", tries=12), looks_at(4, 4)
    whole = run(attack, victim, batch_of(x))
    victim = replace(victim, batch_size=2)
    parts = [run(attack, victim, batch_of(x).take(rows)) for rows in torch.arange(7).flip(0).split(3)]
    assert whole.applied is not None
    assert torch.equal(torch.cat([p.applied for p in parts if p.applied is not None]).flip(0), whole.applied)
    table = attack._table(batch_of(x), 1.0, stream())
    assert table.shape == (7, 13, 4)
    assert len(table[:, 1:].reshape(-1, 4).unique(dim=0)) == 7 * 12
    assert not torch.equal(attack._table(batch_of(x), 1.0, stream(1)), table)


def test_queries_can_be_bounded() -> None:
    made = run(spatial(), looks_at(0, 0), batch_of(dot(3, 3, (1, 28, 28))), queries=40)
    assert trace_of(made).queries.tolist() == [40]  # type: ignore[union-attr]


def test_randomised_victims_are_averaged_and_keep_all_tries() -> None:
    """Single answers are noise; the mean over 64 finds the pixel to avoid."""
    batch, inner = batch_of(dot(3, 3)), looks_at(3, 3)

    def noisy(model, x, noise):  # type: ignore[no-untyped-def]
        z = 4 * model(x)
        return z + torch.randn(z.shape, generator=noise, dtype=z.dtype)

    victim = replace(inner, wraps=(Wrap(noisy, stochastic=True, draws=64),))
    batch = replace(batch, y=torch.ones_like(batch.y))
    made = run(spatial(shift=1 / 7, angle=0), victim, batch)
    trace = trace_of(made)
    assert trace.queries.tolist() == [25 * 64]  # type: ignore[union-attr]
    assert trace.any_iterate.all()  # type: ignore[union-attr]
    assert made.x[0, 0, 3, 3].item() < 0.5


def test_rejected_images_do_not_count_as_fooled() -> None:
    """A detector refuses everything that fools: nothing is left to find."""
    detector = Wrap(lambda model, x, noise: model(x), accepts=lambda x, scores: scores[:, 1] <= 0)
    victim = replace(looks_at(3, 4), wraps=(detector,))
    made = run(spatial(shift=1 / 7, angle=0), victim, batch_of(dot(3, 3)))
    assert not trace_of(made).any_iterate.any()  # type: ignore[union-attr]


def test_batch_dependent_victims_see_whole_batches() -> None:
    seen = []

    def logits(z: Tensor) -> Tensor:
        seen.append(len(z))
        value = z[:, 0, 3, 3] - 0.5
        return torch.stack([torch.zeros_like(value), value], 1)

    x = torch.cat([dot(3, 4), dot(3, 3), dot(0, 0)])
    made = run(spatial(shift=1 / 7, angle=0), Victim(Function(logits), 2, batch_dependent=True), batch_of(x))
    assert set(seen) == {3}
    assert trace_of(made).any_iterate.tolist() == [True, True, False]  # type: ignore[union-attr]


def test_wrong_use() -> None:
    for scales in (1, 4):
        with pytest.raises(UsageError, match="scales must be 3, 5, 7"):
            spatial(scale=0.1, scales=scales)
    empty = batch_of(torch.zeros(0, 1, 8, 8))
    assert len(run(spatial(), looks_at(0, 0), empty).x) == 0


def test_runs_from_the_command_line_at_several_budgets(tmp_path: Path) -> None:
    budgets = ("-e", "spatial:0", "-e", "spatial:1/2", "-e", "spatial:1")
    found = evaluate("-m", CNN, "-a", "spatial:shift=0.25,scale=0.2,scales=3", *budgets, *QUICK, output=tmp_path)
    cells = found["cells"]
    assert [(c["status"], c["norm"], c["eps"]) for c in cells] == [("ok", "spatial", e) for e in ("0", "1/2", "1")]
    accuracy = [c["metrics"]["robust_accuracy"]["value"] for c in cells]
    assert accuracy[0] == cells[0]["metrics"]["clean_accuracy"]["value"]
    assert accuracy[0] >= accuracy[1] >= accuracy[2]
    assert accuracy[0] > accuracy[2]
    assert not [f for c in cells for f in c["flags"] if f["name"] == "perturbation-violation"]
