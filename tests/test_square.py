"""The square attack: exact worst cases, the paper's schedule and shapes, honest counts, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from advplug.attacks.square import Square, share_of_pixels
from advplug.attacks.windows import Canvas, L2Moves, LinfMoves, two_bumps
from advplug.contracts import Batch, Targeted, Wrap
from advplug.errors import UsageError
from advplug.testing import check_attack
from advplug.victim import Victim
from linear import Affine, Problem, problem, stream, threat, wrong


def flat_problem(n: int = 12, shape: tuple[int, int, int] = (2, 6, 5)) -> Problem:
    """Two classes, and weights that are the same all over a channel: the worst case is one colour."""
    size = shape[1] * shape[2]
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64).repeat_interleave(size)
    g = torch.Generator().manual_seed(3)
    x = 0.5 + 0.1 * (torch.rand(n, 2 * size, generator=g, dtype=torch.float64) - 0.5)
    scores = x @ weight
    # Each image stands at its own distance, 0.004 to 0.02 in L-inf, from the boundary at 0.
    wanted = torch.linspace(0.004, 0.02, n, dtype=torch.float64) * weight.abs().sum()
    x = x + (wanted - scores + 0.25 * size)[:, None] * weight / weight.square().sum()
    module = Affine(torch.stack([weight, torch.zeros_like(weight)]), torch.tensor([-0.25 * size, 0.0]).double())
    made = Problem(module, Batch(x.view(n, *shape), torch.zeros(n, dtype=torch.long), torch.arange(n)))
    assert ((x > 0.1) & (x < 0.9)).all()
    return made


def test_conforms() -> None:
    check_attack("square", queries=100)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal", ["untargeted", "targeted"])
def test_flips_exactly_what_is_within_reach(norm: str, goal: str) -> None:
    p = flat_problem()
    batch = replace(p.batch, target=1 - p.batch.y) if goal == "targeted" else p.batch
    distance = p.distance(norm)
    # In L-inf windows reach the exact worst case; in L2 bumps of both signs are far from this problem's flat one.
    reach, queries = (1.001, 1000) if norm == "linf" else (2.6, 400)
    eps = float(distance.median()) * reach
    aim = threat(eps, norm, Targeted() if goal == "targeted" else None)
    out = Square(queries=queries)(p.victim(), batch, aim, stream())
    flipped = wrong(p.victim(), out.x, batch.y)
    assert not flipped[distance > eps].any()
    assert flipped[distance * reach < eps].all()
    assert out.trace is not None
    assert torch.equal(out.trace.any_iterate, flipped)
    assert torch.equal(out.trace.final_iterate, flipped)
    assert aim.perturbation.check(batch.x, out.x).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_depend_on_the_image_alone(norm: str) -> None:
    p = problem(4)
    aim = threat(float(p.distance(norm).median()) * (1.5 if norm == "linf" else 3), norm)
    whole = Square(queries=150)(p.victim(), p.batch, aim, stream())
    small = Square(queries=150)(p.victim(batch_size=3), p.batch, aim, stream())
    order = torch.randperm(len(p.batch), generator=torch.Generator().manual_seed(1))
    mixed = Square(queries=150)(p.victim(batch_size=8), p.batch.take(order), aim, stream())
    assert whole.trace is not None
    assert 0 < int(whole.trace.final_iterate.sum()) < len(p.batch)
    for other, rows in ((small, torch.arange(len(order))), (mixed, order)):
        assert other.trace is not None
        torch.testing.assert_close(other.x, whole.x[rows], rtol=0, atol=1e-12)
        assert torch.equal(other.trace.queries, whole.trace.queries[rows])


def test_shares_follow_the_paper() -> None:
    at = {1: 1, 10: 1, 11: 2, 50: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for query, halved in at.items():
        assert share_of_pixels(0.8, query, 10_000, rescale=False) == 0.8 / halved
        assert share_of_pixels(0.8, query, 5000, rescale=False) == 0.8 / halved
        assert share_of_pixels(0.8, query * 1000, 10_000_000, rescale=True) == 0.8 / halved
    assert share_of_pixels(0.8, 6, 5000, rescale=True) == 0.4
    assert LinfMoves(0.1).side(0.8, 32, 32) == 29
    assert LinfMoves(0.1).side(0.8, 9, 5) == 5
    assert LinfMoves(0.1).side(1e-6, 32, 32) == 1
    assert L2Moves(0.1).side(0.8, 32, 32) == 29
    assert L2Moves(0.1).side(0.1, 32, 32) == 11
    assert L2Moves(0.1).side(1e-6, 32, 32) == 3
    assert L2Moves(0.1).side(1e-6, 2, 9) == 2


def test_bumps_follow_the_paper() -> None:
    # A 4 x 2 half has n = 2; rings 0, 1 and 2 around pixel (2, 1) hold the tails of 1 + 1/4 + 1/9.
    ring = [1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9]
    half = torch.tensor([[ring[2], ring[2]], [ring[1], ring[1]], [ring[1], ring[0]], [ring[1], ring[1]]]).double()
    expected = torch.cat([half, -half], 1)
    torch.testing.assert_close(two_bumps(4), expected / expected.norm())
    for side in range(1, 12):
        assert two_bumps(side).norm().item() == pytest.approx(1)


def test_l2_moves_spend_the_whole_budget_and_count_it_right() -> None:
    g = torch.Generator().manual_seed(0)
    clean = 0.3 + 0.4 * torch.rand(6, 3, 11, 9, generator=g, dtype=torch.float64)
    moves = L2Moves(0.5)
    x = moves.start(clean, lambda shape: torch.rand(6, *shape, generator=g))
    assert torch.allclose((x - clean).flatten(1).norm(dim=1), torch.tensor(0.5).double())
    canvas, rows = Canvas(x.clone(), clean, torch.arange(6)), slice(0, 6)
    energy = (x - clean).flatten(1).square().sum(1)
    for side in (7, 5, 3, 3):
        before = canvas.x.clone()
        pieces, energy = moves.propose(canvas, rows, torch.rand(6, 8, generator=g), side, energy)
        for piece in pieces:
            canvas.put(piece.where, piece.new)
        change = canvas.x - clean
        # Nothing is clipped here, so the energy stays at eps squared, up to what channels without any cannot hand on.
        torch.testing.assert_close(change.flatten(1).square().sum(1), energy)
        torch.testing.assert_close(energy, torch.full_like(energy, 0.25))
        assert not torch.equal(before, canvas.x)
        for piece in pieces:
            canvas.put(piece.where, piece.old)
        assert torch.equal(before, canvas.x)
        for piece in pieces:
            canvas.put(piece.where, piece.new)


def test_linf_windows_have_one_colour_at_the_rim() -> None:
    clean = torch.full((4, 3, 8, 7), 0.5)
    canvas = Canvas(clean.clone(), clean, torch.arange(4))
    uniform = torch.tensor([[0.0, 0.0, 0.1, 0.9, 0.1], [0.99999997, 0.99999997, 0.9, 0.9, 0.9]] * 2)
    (piece,), _ = LinfMoves(0.25).propose(canvas, slice(0, 4), uniform, 3, torch.zeros(4))
    canvas.put(piece.where, piece.new)
    change = canvas.x - clean
    assert torch.equal(change[0, :, :3, :3], torch.tensor([0.25, -0.25, 0.25])[:, None, None].expand(3, 3, 3).neg())
    assert torch.equal(change[1, :, 5:, 4:], torch.full((3, 3, 3), 0.25))
    assert int((change != 0).sum()) == 4 * 27


def test_queries_are_counted_and_solved_images_cost_nothing_more() -> None:
    p = problem(3)
    near = p.distance("linf") < 0.01
    aim = threat(0.004, "linf")
    victim = p.victim(batch_size=1)
    out = Square(queries=120)(victim, p.batch, aim, stream())
    assert out.trace is not None
    queries, solved = out.trace.queries, out.trace.final_iterate
    assert (queries[~solved] == 120).all()
    assert (queries[solved] <= 120).all()
    assert near.any()
    assert victim.passes.forward == int(queries.sum())
    assert victim.passes.backward == 0
    again = Square(queries=120, restarts=2)(p.victim(), p.batch, aim, stream())
    assert again.trace is not None
    assert (again.trace.queries[~again.trace.final_iterate] == 240).all()
    assert (again.trace.final_iterate | ~solved).all()


def test_images_wrong_as_they_are_come_back_unchanged() -> None:
    p = problem(3)
    y = (p.batch.y + 1) % 3
    out = Square(queries=20)(p.victim(), replace(p.batch, y=y), threat(1e-6), stream())
    assert torch.equal(out.x, p.batch.x)


def test_one_lucky_answer_of_a_randomised_victim_is_no_success() -> None:
    p = problem(2)

    def rarely_wrong(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        logits = inner(x)  # type: ignore[operator]
        flip = torch.rand(len(x), generator=rng, device=x.device) < 0.1
        return torch.where(flip[:, None], logits.flip(1), logits)

    victim = p.victim((Wrap(rarely_wrong, stochastic=True, draws=9),))
    out = Square(queries=200)(victim, p.batch, threat(1e-9), stream())
    assert out.trace is not None
    assert not out.trace.any_iterate.any()
    assert (out.trace.queries <= 200).all()
    assert (out.trace.queries > 180).all()
    broken = Square(queries=600)(victim, p.batch, threat(0.2), stream())
    assert broken.trace is not None
    assert broken.trace.final_iterate.all()


def test_what_a_detector_rejects_is_no_success() -> None:
    p = flat_problem()
    far = threat(1.5 * float(p.distance("linf").max()))

    def forward(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x)  # type: ignore[operator,no-any-return]

    deaf = Wrap(forward, accepts=lambda x, logits: torch.zeros(len(x), dtype=torch.bool))
    out = Square(queries=50)(p.victim((deaf,)), p.batch, far, stream())
    assert out.trace is not None
    assert not out.trace.any_iterate.any()
    calm = Wrap(forward, accepts=lambda x, logits: torch.ones(len(x), dtype=torch.bool))
    assert wrong(p.victim(), Square(queries=400)(p.victim((calm,)), p.batch, far, stream()).x, p.batch.y).all()


def test_a_batch_dependent_victim_keeps_its_batch() -> None:
    p = flat_problem()
    victim = p.victim(batch_dependent=True)
    out = Square(queries=60)(victim, p.batch, threat(float(p.distance("linf").median())), stream())
    assert out.trace is not None
    assert (out.trace.queries == 60).all()
    assert victim.passes.forward == 60 * len(p.batch)
    assert torch.equal(wrong(p.victim(), out.x, p.batch.y), out.trace.final_iterate)


def test_other_norms_and_missing_targets_are_refused() -> None:
    p = problem(2)
    with pytest.raises(UsageError, match="square works in linf and l2, not in l1"):
        Square()(p.victim(), p.batch, threat(0.1, "l1"), stream())
    with pytest.raises(UsageError, match="a targeted attack needs"):
        Square()(p.victim(), p.batch, threat(0.1, "linf", Targeted()), stream())


def test_scores_that_are_not_finite_are_answers_that_are_wrong() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), float("nan"))

    x = torch.rand(3, 1, 4, 4)
    batch = Batch(x, torch.zeros(3, dtype=torch.long), torch.arange(3))
    out = Square(queries=5)(Victim(Broken(), 3), batch, threat(0.1), stream())
    assert torch.equal(out.x, x)
