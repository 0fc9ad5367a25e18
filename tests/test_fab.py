"""FAB-T: projections against other solvers, exact distances on affine victims, and what must not change a result."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from advplug.attacks.fab import FabT
from advplug.attacks.plane import nearest_on_plane
from advplug.contracts import Batch, MinimumNorm, Targeted, Threat, Untargeted, Wrap
from advplug.errors import UsageError
from advplug.testing import check_attack
from advplug.victim import Victim
from linear import Function, problem, stream, threat, wrong

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}


def seek(norm: str, goal: Targeted | None = None) -> Threat:
    return Threat(MinimumNorm(norm, Fraction(1)), goal or Untargeted())


# --- the projection --------------------------------------------------------------------------------


def smallest(x: np.ndarray, w: np.ndarray, need: float, norm: str) -> float:
    """The size of the smallest change with <w, d> = need inside the box, by a general solver."""
    n, box = len(x), list(zip(-x, 1 - x, strict=True))
    if norm == "l2":
        start = np.where(w * need > 0, 1 - x, -x) * 0.5
        made = optimize.minimize(
            lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=box, method="SLSQP",
            constraints={"type": "eq", "fun": lambda d: w @ d - need, "jac": lambda d: w},
            options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        assert made.success
        return float(np.sqrt(made.fun))
    # Sizes are variables of their own: |d_i| <= t_i, or |d_i| <= t for all i.
    extra = n if norm == "l1" else 1
    cap = np.eye(n) if norm == "l1" else np.ones((n, 1))
    rows = np.block([[np.eye(n), -cap], [-np.eye(n), -cap]])
    made = optimize.linprog(
        np.r_[np.zeros(n), np.ones(extra)], rows, np.zeros(2 * n), np.r_[w, np.zeros(extra)][None], [need],
        bounds=[*box, *[(0, None)] * extra],
    )  # fmt: skip
    assert made.status == 0
    return float(made.fun)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_smallest_change(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    n, rows = 7, 40
    x = torch.rand(rows, n, generator=g, dtype=torch.float64)
    x[::3, :2] = torch.tensor([0.0, 1.0]).double()
    w = torch.randn(rows, n, generator=g, dtype=torch.float64)
    w[1::4, 3] = 0
    most = torch.where(w > 0, w * (1 - x), -w * x).sum(1)
    least = torch.where(w < 0, w * (1 - x), -w * x).sum(1)
    share = torch.rand(rows, generator=g, dtype=torch.float64) * 1.9 - 0.95
    need = torch.where(share > 0, share * most, -share * least)
    d = nearest_on_plane(x, w, need, norm)
    torch.testing.assert_close((w * d).sum(1), need, rtol=0, atol=1e-12)
    assert ((x + d >= -1e-15) & (x + d <= 1 + 1e-15)).all()
    got = torch.linalg.vector_norm(d, ORDER[norm], dim=1)
    for i in range(rows):
        expected = smallest(x[i].numpy(), w[i].numpy(), float(need[i]), norm)
        assert float(got[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_at_the_edges(norm: str) -> None:
    x = torch.tensor([[0.25, 0.5, 0.75]]).repeat(5, 1)
    w = torch.tensor([[1.0, -2.0, 0.0], [1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [1e-25, -2e-25, 0.0], [1.0, -2.0, 0.0]])
    need = torch.tensor([100.0, -100.0, 1.0, 1e-25, 0.0])
    d = nearest_on_plane(x, w, need, norm)
    # Out of reach: every coordinate that counts goes to the end of its range.
    assert torch.equal(d[0], torch.tensor([0.75, -0.5, 0.0]))
    assert torch.equal(d[1], torch.tensor([-0.25, 0.5, 0.0]))
    assert torch.equal(d[2], torch.zeros(3))
    torch.testing.assert_close(w[3] @ d[3] * 1e25, torch.tensor(1.0))
    assert torch.equal(d[4], torch.zeros(3))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_in_float32_of_many_pixels(norm: str) -> None:
    g = torch.Generator().manual_seed(2)
    x, w = torch.rand(4, 3072, generator=g), torch.randn(4, 3072, generator=g) * 1e-12
    need = torch.tensor([0.01, 0.2, 0.7, 0.99]) * torch.where(w > 0, w * (1 - x), -w * x).sum(1)
    d = nearest_on_plane(x, w, need, norm)
    exact = nearest_on_plane(x.double(), w.double(), need.double(), norm)
    torch.testing.assert_close(
        (w.double() * d.double()).sum(1) / need.double(), torch.ones(4).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(d.double(), exact, rtol=1e-3, atol=1e-3)


# --- the attack ------------------------------------------------------------------------------------


def test_conforms() -> None:
    check_attack("fab-t", steps=15)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 5])
def test_reaches_the_exact_distance(norm: str, classes: int) -> None:
    p = problem(classes)
    out = FabT(steps=12)(p.victim(), p.batch, seek(norm), stream())
    assert wrong(p.victim(), out.x, p.batch.y).all()
    found = torch.linalg.vector_norm((out.x - p.batch.x).flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(found, p.distance(norm), rtol=1e-5, atol=0)
    assert (found > p.distance(norm)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_reaches_the_exact_distance(norm: str) -> None:
    p = problem(4)
    batch = replace(p.batch, target=(p.batch.y + 1) % 4)
    out = FabT(steps=40)(p.victim(), batch, seek(norm, Targeted()), stream())
    assert torch.equal(p.victim().decide(out.x).label, batch.target)


@pytest.mark.parametrize("norm", NORMS)
def test_under_a_ball_it_breaks_what_is_within_reach_and_stops(norm: str) -> None:
    p = problem(4)
    eps = float(p.distance(norm).median())
    aim = threat(eps, norm)
    victim = p.victim()
    out = FabT(steps=20)(victim, p.batch, aim, stream())
    assert out.trace is not None
    flipped = wrong(p.victim(), out.x, p.batch.y)
    sure = (p.distance(norm) * 1.01 < eps) | (p.distance(norm) > eps)
    assert torch.equal(flipped[sure], (p.distance(norm) < eps)[sure])
    assert aim.perturbation.check(p.batch.x, out.x).all()
    assert torch.equal(out.trace.any_iterate, flipped)
    assert (out.trace.steps[~flipped] == 3 * 20).all()
    assert (out.trace.steps[flipped] < 60).all()
    # One pass back a step, up to the images that fill up a batch.
    steps = int(out.trace.steps.sum())
    assert steps <= victim.passes.backward <= 2 * steps


def curved(x: Tensor) -> Tensor:
    """Three classes with bent boundaries."""
    flat = x.flatten(1) - 0.5
    return torch.stack([flat.square().sum(1), 0.6 * flat.sum(1).tanh(), torch.full_like(flat[:, 0], 0.4)], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_successes_on_a_curved_victim_lie_at_the_boundary(norm: str) -> None:
    g = torch.Generator().manual_seed(1)
    victim = Victim(Function(curved), 3)
    x = (0.5 + 0.3 * torch.randn(10, 1, 3, 4, generator=g, dtype=torch.float64)).clamp(0.02, 0.98)
    batch = Batch(x, victim.decide(x).label, torch.arange(10))
    out = FabT(steps=60)(victim, batch, seek(norm), stream())
    assert wrong(victim, out.x, batch.y).all()
    assert ((out.x >= 0) & (out.x <= 1)).all()
    # A hair nearer to the clean image the answer is the label still.
    back = batch.x + 0.95 * (out.x - batch.x)
    assert not wrong(victim, back, batch.y).any()


@pytest.mark.parametrize("norm", NORMS)
def test_results_depend_on_the_image_alone(norm: str) -> None:
    p = problem(4)
    whole = FabT(steps=8)(p.victim(), p.batch, seek(norm), stream())
    order = torch.randperm(len(p.batch), generator=torch.Generator().manual_seed(1))
    mixed = FabT(steps=8)(p.victim(batch_size=3), p.batch.take(order), seek(norm), stream())
    torch.testing.assert_close(mixed.x, whole.x[order], rtol=0, atol=1e-12)


def test_images_wrong_as_they_are_come_back_unchanged() -> None:
    p = problem(3)
    batch = replace(p.batch, y=(p.batch.y + 1) % 3)
    for aim in (seek("linf"), threat(0.1)):
        assert torch.equal(FabT(steps=3)(p.victim(), batch, aim, stream()).x, batch.x)


def test_vanishing_gradients_are_counted() -> None:
    p = problem(2)
    victim = Victim(Function(lambda x: p.module(x.detach())), 2)
    out = FabT(steps=4)(victim, p.batch, threat(0.1), stream())
    assert out.trace is not None
    assert (out.trace.zero_gradient == 4).all()
    assert torch.equal(out.x, p.batch.x)


def test_a_surrogate_is_attacked_and_the_deployed_system_judges() -> None:
    p = problem(3)

    def stepped(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner((x * 4000).round() / 4000)  # type: ignore[operator,no-any-return]

    def straight(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x)  # type: ignore[operator,no-any-return]

    victim = p.victim((Wrap(stepped, surrogates=(straight,)),))
    right = victim.decide(p.batch.x).label == p.batch.y
    batch = p.batch.take(right)
    out = FabT(steps=15)(victim, batch, seek("linf"), stream())
    assert wrong(victim, out.x, batch.y).all()
    found = (out.x - batch.x).flatten(1).abs().amax(1)
    assert (found < p.distance("linf")[right] + 1 / 4000).all()


def test_a_randomised_victim_is_judged_by_a_majority() -> None:
    p = problem(3)

    def shaken(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x + 0.0005 * torch.randn(x.shape, generator=rng, dtype=x.dtype))  # type: ignore[operator]

    victim = p.victim((Wrap(shaken, stochastic=True, draws=5),))
    out = FabT(steps=10)(victim, p.batch, seek("linf"), stream())
    assert wrong(p.victim(), out.x, p.batch.y).float().mean() > 0.5
    found = (out.x - p.batch.x).flatten(1).abs().amax(1)
    assert (found < 1.5 * p.distance("linf")).all()


def test_other_norms_and_missing_targets_are_refused() -> None:
    p = problem(2)
    with pytest.raises(UsageError, match="fab-t works in linf, l2, l1, not in l0"):
        FabT()(p.victim(), p.batch, threat(1, "l0"), stream())
    with pytest.raises(UsageError, match="a targeted attack needs"):
        FabT()(p.victim(), p.batch, seek("linf", Targeted()), stream())


def test_parameters_stay_untouched() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(4, 3, 2, 2)
    batch = Batch(x, net(x).argmax(1), torch.arange(4))
    FabT(steps=3)(Victim(net, 3), batch, seek("l2"), stream())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
