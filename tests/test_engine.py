"""The engine against closed forms: exact worst cases, exact radii, and what must not change a result."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from advplug.attacks.engine import GradientAttack
from advplug.builtin import gradient
from advplug.contracts import Batch, Targeted
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim
from linear import Function, problem, stream, threat, wrong

NORMS = ("linf", "l2", "l1")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_reaches_the_exact_worst_case(norm: str) -> None:
    p = problem(2)
    eps = 0.001
    out = gradient.fgsm(loss="margin")(p.victim(), p.batch, threat(eps, norm), stream())
    rows = p.distance(norm) > eps
    normal = p.module.weight[0] - p.module.weight[1]
    dual = torch.linalg.vector_norm(normal, {"linf": 1, "l2": 2}[norm])
    z = p.module(out.x)
    gap = (z[:, 0] - z[:, 1]) * torch.where(p.batch.y == 0, 1, -1)
    clean = p.module(p.batch.x)
    expected = (clean[:, 0] - clean[:, 1]) * torch.where(p.batch.y == 0, 1, -1) - eps * dual
    torch.testing.assert_close(gap[rows], expected[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_flips_exactly_the_images_within_reach(name: str, norm: str) -> None:
    if name == "apgd" and norm == "l1":
        pytest.skip("apgd declares L-inf and L2 only")
    p = problem(2)
    # From a random start, 60 steps of eps / 4 turn toward the boundary more closely than the 2 % below.
    attack = replace(gradient.pgd(steps=60), fraction=0.25) if name == "pgd" else gradient.apgd(steps=60)
    for i, radius in enumerate(p.distance(norm).tolist()[:6]):
        one = p.batch.take(torch.tensor([i]))
        for factor, flips in ((0.999, False), (1.02, True)):
            out = attack(p.victim(), one, threat(factor * radius, norm), stream())
            assert wrong(p.victim(), out.x, one.y).item() is flips
            assert out.trace is not None
            assert out.trace.any_iterate.item() is flips
    eps = p.distance(norm).median().item() * 1.02
    out = attack(p.victim(), p.batch, threat(eps, norm), stream())
    sure = (p.distance(norm) * 1.02 <= eps) | (p.distance(norm) > eps)
    assert torch.equal(wrong(p.victim(), out.x, p.batch.y)[sure], (p.distance(norm) < eps)[sure])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_t_finds_the_nearest_of_many_classes(norm: str) -> None:
    p = problem(5)
    distance = p.distance(norm)
    eps = distance.median().item() * 1.02
    out = gradient.apgd_t(steps=40)(p.victim(), p.batch, threat(eps, norm), stream())
    sure = (distance * 1.02 <= eps) | (distance > eps)
    assert torch.equal(wrong(p.victim(), out.x, p.batch.y)[sure], (distance < eps)[sure])
    two = problem(2)
    out = gradient.apgd_t(steps=20)(two.victim(), two.batch, threat(0.03, norm), stream())
    assert torch.equal(wrong(two.victim(), out.x, two.batch.y), two.distance(norm) < 0.03)


@pytest.mark.parametrize("n_targets", [1, 2])
def test_apgd_t_keeps_a_success_in_a_class_that_it_did_not_aim_at(n_targets: int) -> None:
    """On the way to the second class the fourth takes over; towards the third nothing is misclassified. Published
    APGD-T counts any wrong label (Croce and Hein 2020)."""

    def logits(x: torch.Tensor) -> torch.Tensor:
        a, b = (x.flatten(1) - 0.5).T
        one = torch.ones_like(a)
        return torch.stack([one, 0.9 * one + 0.5 * a, 0.89 * one + b, 15 * a, -one, -2 * one], 1)

    victim = Victim(Function(logits), 6)
    batch = Batch(torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.long), torch.arange(1))
    for precision in ("float32", "auto"):
        made = gradient.apgd_t(steps=100, n_targets=n_targets, precision=precision)(
            victim, batch, threat(0.1), Stream(0, "a")
        )
        assert wrong(victim, made.x, batch.y).item()
        assert made.trace.any_iterate.item()
    aimed = replace(batch, target=torch.tensor([1]))
    made = gradient.apgd_t(steps=100)(victim, aimed, threat(0.1, goal=Targeted(1)), stream())
    assert not made.trace.any_iterate.item(), "where one class is wanted, no other will do"


def test_input_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.rand(3, 3, 2, 2, dtype=torch.float64) * 0.6 + 0.2
    batch = Batch(x, torch.tensor([0, 1, 2]), torch.arange(3))
    seen = []

    class Spy:
        def memory(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {}

        def step(self, point: object, memory: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            seen.append(point)
            return point.x, {}  # type: ignore[attr-defined]

    from advplug.attacks import engine

    run = engine._Run(
        GradientAttack(steps=1, start="clean", keep_going=True), Victim(net, 4), batch, threat(0.1), stream()
    )
    run.rule = Spy()  # type: ignore[assignment]
    run.craft()
    h = 1e-6
    for i in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = h
        up, down = (
            nn.functional.cross_entropy(net((x.flatten(1) + s * step).view_as(x)), batch.y, reduction="none")
            for s in (1, -1)
        )
        torch.testing.assert_close(seen[0].gradient.flatten(1)[:, i], (up - down) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [gradient.pgd, gradient.ifgsm, gradient.fgsm, gradient.eot_pgd])
def test_eps_zero_returns_the_input(norm: str, make: object) -> None:
    p = problem(2, n=6)
    out = make()(p.victim(), p.batch, threat(0.0, norm), stream())  # type: ignore[operator]
    assert torch.equal(out.x, p.batch.x)
    assert not out.trace.any_iterate.any()


ATTACKS = {
    "ifgsm": lambda: gradient.ifgsm(precision="float32"),
    "mifgsm": lambda: gradient.mifgsm(),
    "pgd": lambda: gradient.pgd(steps=12, restarts=2),
    "pgd-keep": lambda: gradient.pgd(steps=8, keep_going=True),
    "apgd": lambda: gradient.apgd(steps=25),
    "apgd-t": lambda: gradient.apgd_t(steps=12, n_targets=3),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_results_do_not_depend_on_batch_size_or_order(name: str, norm: str) -> None:
    """Batches that are refilled give the same images, traces and verdicts as one image at a time."""
    p = problem(5)
    eps = p.distance(norm).median().item() * 1.01
    # Once the loss has settled, its last bits decide on APGD's step, and they depend on the batch.
    close = 1e-6 if name.startswith("apgd") else 1e-12
    attack = ATTACKS[name]()
    whole = attack(p.victim(batch_size=128), p.batch, threat(eps, norm), stream())
    assert whole.trace.any_iterate.any()
    assert not whole.trace.any_iterate.all()
    order = torch.randperm(len(p.batch), generator=torch.Generator().manual_seed(3))
    for size, rows in ((1, None), (5, None), (7, order)):
        batch = p.batch if rows is None else p.batch.take(rows)
        out = attack(p.victim(batch_size=size), batch, threat(eps, norm), stream())
        expected = whole.x if rows is None else whole.x[rows]
        torch.testing.assert_close(out.x, expected, rtol=0, atol=close)
        for field in ("any_iterate", "final_iterate", "steps", "zero_gradient"):
            a, b = getattr(out.trace, field), getattr(whole.trace, field)
            assert torch.equal(a, b if rows is None else b[rows]), field
        assert torch.equal(wrong(p.victim(), out.x, batch.y), out.trace.any_iterate)
    split = [attack(p.victim(), p.batch.take(r), threat(eps, norm), stream()).x for r in order.chunk(3)]
    torch.testing.assert_close(torch.cat(split), whole.x[order], rtol=0, atol=close)


def test_cost_follows_the_unsolved_images() -> None:
    p = problem(2, n=40)
    easy = p.distance("linf") < 0.01
    victim = p.victim(batch_size=8)
    out = gradient.pgd(steps=20, precision="float32")(victim, p.batch, threat(0.01), stream())
    steps = out.trace.steps
    assert (steps[~easy] == 20).all()
    assert (steps[easy] < 20).all()
    needed = int((steps + out.trace.any_iterate).sum()) - int((steps == 20)[easy].sum())
    assert needed <= victim.passes.backward <= 1.05 * needed, "the last few images are filled up to a common size"
    alone = p.victim(batch_size=1)
    gradient.pgd(steps=20, precision="float32")(alone, p.batch, threat(0.01), stream())
    assert alone.passes.backward == needed
    # One more forward pass for each image that took all steps, no other.
    assert alone.passes.forward == needed + int((steps == 20).sum())


def test_batches_come_in_few_sizes() -> None:
    """Each size of batch costs the kernels' preparation; the repeats that fill one up change nothing."""
    p = problem(2, n=60)
    sizes = set()
    handle = p.module.register_forward_pre_hook(lambda m, args: sizes.add(len(args[0])))
    out = gradient.pgd(steps=20, precision="float32")(p.victim(batch_size=32), p.batch, threat(0.01), stream())
    handle.remove()
    assert sizes <= {1, 2, 4, 8, 12, 16, 20, 24, 28, 32}
    assert torch.equal(out.trace.any_iterate, p.distance("linf") < 0.01)


def test_misclassified_images_are_solved_unchanged() -> None:
    p = problem(2)
    batch = replace(p.batch, y=1 - p.batch.y)
    for attack in (gradient.ifgsm(), gradient.pgd(), gradient.fgsm()):
        out = attack(p.victim(), batch, threat(1e-4), stream())
        assert torch.equal(out.x, batch.x)
        assert out.trace.any_iterate.all()
        assert (out.trace.steps == 0).all()


def test_solved_images_keep_their_verdict_through_restarts() -> None:
    p = problem(3)
    eps = p.distance("linf").median().item()
    one = gradient.pgd(steps=3)(p.victim(), p.batch, threat(eps), stream())
    many = gradient.pgd(steps=3, restarts=4)(p.victim(), p.batch, threat(eps), stream())
    was = one.trace.any_iterate
    assert torch.equal(many.x[was], one.x[was])
    assert many.trace.any_iterate[was].all()
    assert (many.trace.steps[~was] > 3).any()


def test_warm_start_begins_from_the_projected_start() -> None:
    p = problem(2)
    small, large = 0.006, 0.012
    first = gradient.pgd(steps=20)(p.victim(), p.batch, threat(small), stream())
    warm = gradient.pgd(steps=20)(p.victim(), replace(p.batch, start=first.x), threat(large), stream())
    broken = first.trace.any_iterate
    assert (warm.trace.steps[broken] == 0).all()
    assert torch.equal(warm.trace.any_iterate, p.distance("linf") < large)
    cut = gradient.pgd(steps=1)(p.victim(), replace(p.batch, start=p.batch.x + 1), threat(1e-9), stream())
    assert (cut.x - p.batch.x).abs().max() <= 1.001e-9


def test_any_iterate_and_final_iterate_differ_where_steps_overshoot() -> None:
    """Fooled only in a narrow band of brightness: a long step enters it and the next one leaves it."""

    def f(x: torch.Tensor) -> torch.Tensor:
        m = x.mean((1, 2, 3))
        band = 0.02 - (m - 0.6).abs()
        return torch.stack([torch.zeros_like(m), band], 1)

    batch = Batch(torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
    base = GradientAttack(steps=2, alpha=Fraction(1, 10), start="clean", loss="margin")
    victim = Victim(Function(f), 2)
    left = base(victim, batch, threat(0.3), stream())
    assert left.trace.steps.item() == 1
    assert left.x.mean().item() == pytest.approx(0.6)
    kept = replace(base, alpha=Fraction(11, 100), keep_going=True)(victim, batch, threat(0.3), stream())
    assert kept.trace.any_iterate.item()
    assert kept.trace.steps.item() == 2
    assert not kept.trace.final_iterate.item()
    assert wrong(victim, kept.x, batch.y).item()


def test_keep_going_returns_the_best_iterate() -> None:
    p = problem(4)
    eps = p.distance("linf").median().item()
    attack = gradient.pgd(steps=15, keep_going=True)
    out = attack(p.victim(), p.batch, threat(eps), stream())
    quick = replace(attack, keep_going=False)(p.victim(), p.batch, threat(eps), stream())
    assert (out.trace.steps == 15).all()
    assert not out.trace.loss_path.isnan().any()
    assert out.trace.any_iterate[quick.trace.any_iterate].all()
    z = p.module(out.x)
    loss = nn.functional.cross_entropy(z, p.batch.y, reduction="none").float()
    torch.testing.assert_close(loss, out.trace.loss_path.amax(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_attacks_end_in_the_target(norm: str) -> None:
    p = problem(4)
    batch = replace(p.batch, target=(p.batch.y + 1) % 4)
    eps = {"linf": 0.05, "l2": 0.4, "l1": 2.0}[norm]
    makers = [gradient.pgd, gradient.ifgsm, gradient.mifgsm, gradient.apgd, gradient.apgd_t]
    for make in makers if norm != "l1" else makers[:1]:
        out = make(steps=40)(p.victim(), batch, threat(eps, norm, Targeted("next")), stream())
        answer = p.victim().decide(out.x).label
        assert torch.equal(answer == batch.target, out.trace.any_iterate)
        assert (answer == batch.target).float().mean() > 0.8
    with pytest.raises(UsageError, match="target"):
        gradient.pgd()(p.victim(), p.batch, threat(eps, norm, Targeted("next")), stream())


def test_momentum_against_two_steps_by_hand() -> None:
    a, c = np.array([1.0, -2.0, 0.5]), np.array([3.0, 20.0, -4.0])
    ta, tc = torch.tensor(a), torch.tensor(c)

    def f(x: torch.Tensor) -> torch.Tensor:
        v = x.flatten(1)
        return torch.stack([torch.zeros(len(v), dtype=v.dtype), (ta * v + tc * v**2 / 2).sum(1) - 100], 1)

    x0, alpha = np.array([0.4, 0.15, 0.6]), 0.05
    batch = Batch(torch.tensor(x0).view(1, 3, 1, 1), torch.tensor([0]), torch.tensor([0]))
    g1 = a + c * x0
    m1 = g1 / np.abs(g1).sum()
    x1 = x0 + alpha * np.sign(m1)
    g2 = a + c * x1
    m2 = 0.8 * m1 + g2 / np.abs(g2).sum()
    x2 = x1 + alpha * np.sign(m2)
    attack = gradient.mifgsm(steps=2, alpha=Fraction(1, 20), decay=0.8, loss="margin")
    out = attack(Victim(Function(f), 2), batch, threat(0.3), stream())
    np.testing.assert_allclose(out.x.flatten().numpy(), x2, atol=1e-12)
    assert out.trace.steps.item() == 2
