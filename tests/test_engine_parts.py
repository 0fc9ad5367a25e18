"""APGD's rule, EOT, defended victims, precision, noise, and what an attack must leave as it was."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.attacks import engine, precision, transforms
from advplug.attacks.engine import GradientAttack
from advplug.attacks.steps import Adaptive, Memory, Point, checkpoints
from advplug.ball import TOLERANCE, distance, inside
from advplug.builtin import gradient, noise
from advplug.contracts import Batch, Wrap
from advplug.errors import UsageError
from advplug.parse import parse_stack
from advplug.registry import registry
from advplug.victim import Victim
from linear import Function, problem, stream, threat, wrong


def small_net(seed: int = 0, classes: int = 4, pixels: int = 27) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def small_batch(n: int = 6) -> Batch:
    x = torch.rand(n, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 4, torch.arange(n))


# --- APGD ---


def test_checkpoints_of_the_paper() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1) == (1,)


def reference_apgd(loss_of: object, x: Tensor, start: Tensor, eps: float, steps: int, norm: str) -> Tensor:
    """Algorithm 1 of the paper for one image, written out plainly."""

    def grad(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_()
        loss = loss_of(z)  # type: ignore[operator]
        return loss.item(), torch.autograd.grad(loss, z)[0]

    def proj(z: Tensor) -> Tensor:
        if norm == "linf":
            return torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
        d = z - x
        return (x + d * min(1.0, eps / max(d.norm().item(), 1e-300))).clamp(0, 1)

    def ahead(g: Tensor) -> Tensor:
        return g.sign() if norm == "linf" else g / g.norm()

    marks = (0, *checkpoints(steps))
    length, (f, g) = 2 * eps, grad(start)
    now, before = start, start
    best, best_f, best_g = start, f, g
    losses, halved, best_at_mark = [f], False, None
    for k in range(steps):
        if k in marks[1:]:
            since = marks[marks.index(k) - 1]
            rises = sum(losses[i + 1] > losses[i] for i in range(since, k))
            stalled = best_at_mark is not None and not halved and best_at_mark >= best_f
            halved = rises <= 0.75 * (k - since) or stalled
            best_at_mark = best_f
            if halved:
                length, now, g = length / 2, best, best_g
        z = proj(now + length * ahead(g))
        keep = 1.0 if k == 0 else 0.75
        now, before = proj(now + keep * (z - now) + (1 - keep) * (now - before)), now
        f, g = grad(now)
        losses.append(f)
        if f > best_f:
            best, best_f, best_g = now, f, g
    return best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_follows_the_paper(norm: str) -> None:
    net, batch, eps = small_net(), small_batch(), {"linf": 0.1, "l2": 0.4}[norm]
    start = batch.x.clone()
    attack = GradientAttack(rule="adaptive", steps=40, loss="ce", keep_going=True)
    # All from one class's side, so that misclassified iterates do not outrank those of higher loss.
    batch = replace(batch, y=net(batch.x).argmin(1), start=start)
    out = attack(Victim(net, 4), batch, threat(eps, norm), stream())
    for i in range(len(batch)):
        x, y = batch.x[i : i + 1], batch.y[i : i + 1]
        best = reference_apgd(lambda z, y=y: nn.functional.cross_entropy(net(z), y), x, x, eps, 40, norm)
        torch.testing.assert_close(out.x[i : i + 1], best, rtol=0, atol=1e-9)


# --- EOT and randomised victims ---


def test_eot_gradient_is_the_mean_over_its_draws() -> None:
    net, batch = small_net(), small_batch()
    stack = parse_stack("rotation:degrees=15+noise:sigma=0.05+brightness")
    attack = gradient.eot_pgd(transforms=stack, draws=5, steps=1)
    victim = Victim(net, 4)
    from advplug.attacks import engine

    seen: list[Tensor] = []
    real = engine.reading

    def spy(loss: Tensor, g: Tensor | None, fooled: Tensor) -> object:
        if g is not None:
            seen.append(g)
        return real(loss, g, fooled)

    run = engine._Run(attack, victim, batch, threat(0.05), stream())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "reading", spy)
        run.craft()
    start = run._begin(torch.arange(len(batch))).x
    total = torch.zeros_like(start)
    for draw in range(5):
        values = [
            stream().per_image(lambda g, t=t: t.draw(g, start.shape[1:]), batch.index, "transform", i, 0, 0, draw)
            for i, t in enumerate(transforms.build(stack))
        ]
        x = start.clone().requires_grad_()
        moved = transforms.apply(transforms.build(stack), x, values)
        loss = nn.functional.cross_entropy(net(moved), batch.y, reduction="sum")
        total += torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(seen[0], total / 5, rtol=1e-10, atol=1e-14)
    assert victim.passes.forward == 5 * 2 * len(batch)


@pytest.mark.parametrize("name", sorted(transforms.TRANSFORMS))
def test_transforms_are_differentiable_and_bounded_by_their_range(name: str) -> None:
    (t,) = transforms.build(parse_stack(name))
    x = torch.rand(2, 3, 6, 5, dtype=torch.float64) * 0.4 + 0.3
    values = torch.stack([t.draw(torch.Generator().manual_seed(s), x.shape[1:]) for s in (0, 1)])
    again = torch.stack([t.draw(torch.Generator().manual_seed(s), x.shape[1:]) for s in (0, 1)])
    assert torch.equal(values, again)
    assert not torch.equal(t.apply(x, values), x)
    assert torch.autograd.gradcheck(lambda z: t.apply(z, values), (x.clone().requires_grad_(),))
    still = t.apply(x, torch.zeros_like(values))
    if name not in ("blur", "resize-pad"):
        torch.testing.assert_close(still, x, rtol=0, atol=1e-9)
    # One image's values do not touch another.
    torch.testing.assert_close(t.apply(x[1:], values[1:]), t.apply(x, values)[1:], rtol=0, atol=1e-12)


def test_geometric_transforms_move_as_stated() -> None:
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 3] = 1
    (shift,) = transforms.build(parse_stack("translation:pixels=1"))
    moved = shift.apply(x, torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    assert moved[0, 0, 1, 4].item() == pytest.approx(1.0)
    (turn,) = transforms.build(parse_stack("rotation:degrees=90"))
    turned = turn.apply(x, torch.tensor([[1.0]], dtype=torch.float64))
    assert turned.flatten().argmax().item() in (1 * 5 + 2, 3 * 5 + 2)
    assert turned.max().item() == pytest.approx(1.0)


def test_transform_errors_are_clear() -> None:
    with pytest.raises(UsageError, match="no transform is called 'rotaton'; did you mean 'rotation'"):
        transforms.build(parse_stack("rotaton"))
    with pytest.raises(UsageError, match="transform 'noise': sigma must be > 0"):
        transforms.build(parse_stack("noise:sigma=0"))
    entry = registry().get("attack", "eot-pgd")
    from advplug.parse import parse_reference

    bound = entry.bind(parse_reference("eot-pgd:transforms=(rotation:degrees=15+noise:sigma=0.05),draws=7"))
    attack = entry.make(bound)
    assert attack.draws == 7
    assert len(attack.transforms) == 2


def noisy(sigma: float = 0.02, draws: int = 4) -> Wrap:
    def forward(inner: object, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype))  # type: ignore[operator]

    return Wrap(forward, stochastic=True, draws=draws)


def test_randomised_victims_take_all_steps_and_average_draws() -> None:
    p = problem(3)
    victim = p.victim((noisy(),))
    eps = p.distance("linf").max().item() * 2
    out = gradient.pgd(steps=5)(victim, p.batch, threat(eps), stream())
    assert (out.trace.steps == 5).all()
    assert victim.passes.backward == 5 * 4 * len(p.batch)
    assert victim.passes.forward == 6 * 4 * len(p.batch)
    assert wrong(p.victim(), out.x, p.batch.y).float().mean() > 0.9
    more = p.victim((noisy(),))
    gradient.pgd(steps=2, draws=9)(more, p.batch, threat(eps), stream())
    assert more.passes.backward == 2 * 9 * len(p.batch)


def test_every_surrogate_is_attacked_and_the_deployed_system_decides() -> None:
    """The first stand-in has no gradient, the second is the identity in place of rounding."""
    p = problem(2)

    def coarse(inner: object, x: Tensor, rng: object) -> Tensor:
        return inner((x * 500).round() / 500)  # type: ignore[operator]

    def blind(inner: object, x: Tensor, rng: object) -> Tensor:
        return inner((x * 500).round() / 500 + 0 * x)  # type: ignore[operator]

    def smooth(inner: object, x: Tensor, rng: object) -> Tensor:
        return inner(x)  # type: ignore[operator]

    def attack(*surrogates: object) -> tuple[Victim, Tensor, object]:
        victim = p.victim((Wrap(coarse, surrogates=surrogates),))  # type: ignore[arg-type]
        out = gradient.ifgsm(steps=20)(victim, p.batch, threat(0.02), stream())
        assert torch.equal(wrong(victim, out.x, p.batch.y), out.trace.any_iterate)
        return victim, out.x, out.trace

    _, _, none = attack(blind)
    assert (none.zero_gradient[~none.any_iterate] == 20).all()  # type: ignore[attr-defined]
    _, _, both = attack(blind, smooth)
    assert both.any_iterate.sum() > none.any_iterate.sum() + 5  # type: ignore[attr-defined]


def test_a_rejected_answer_is_no_success() -> None:
    p = problem(2)
    out = gradient.pgd(steps=10)(p.victim(), p.batch, threat(0.03), stream())
    assert out.trace.any_iterate.all()
    strict = Wrap(lambda inner, x, rng: inner(x), accepts=lambda x, z: torch.zeros(len(x), dtype=torch.bool))
    out = gradient.pgd(steps=10)(p.victim((strict,)), p.batch, threat(0.03), stream())
    assert not out.trace.any_iterate.any()


def test_batch_dependent_victims_keep_their_batches() -> None:
    sizes = set()

    def f(x: Tensor) -> Tensor:
        sizes.add(len(x))
        v = x.flatten(1).sum(1)
        return torch.stack([v - v.mean(), v.mean() - v], 1)

    batch = small_batch()
    victim = Victim(Function(f), 2, batch_dependent=True)
    out = gradient.pgd(steps=4)(victim, replace(batch, y=batch.y % 2), threat(0.2), stream())
    assert sizes == {len(batch)}
    assert (out.trace.steps == 4).all()


# --- what may go wrong, and what must stay ---


def test_gradients_that_are_not_finite_do_no_harm_and_are_counted() -> None:
    p = problem(2)
    bad = torch.tensor([1, 4])

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            g = g.clone()
            g[bad, 0, 0, 0], g[bad, 0, 0, 1] = float("nan"), float("inf")
            return g

    victim = Victim(Function(lambda x: p.module(Poison.apply(x))), 2)
    eps = 0.02
    out = gradient.ifgsm(steps=6, keep_going=True)(victim, p.batch, threat(eps), stream())
    clean = gradient.ifgsm(steps=6, keep_going=True)(p.victim(), p.batch, threat(eps), stream())
    assert out.x.isfinite().all()
    assert inside(p.batch.x, out.x, "linf", eps).all()
    assert out.trace.nonfinite.tolist() == [6 if i in bad else 0 for i in range(len(p.batch))]
    rest = torch.tensor([i for i in range(len(p.batch)) if i not in bad])
    assert torch.equal(out.x[rest], clean.x[rest])


def test_zero_gradients_are_counted() -> None:
    victim = Victim(Function(lambda x: torch.tensor([[1.0, 0.0]]) + 0 * x.flatten(1)[:, :1]), 2)
    batch = replace(small_batch(3), y=torch.zeros(3, dtype=torch.long))
    for make in (gradient.ifgsm, gradient.mifgsm, gradient.apgd):
        out = make(steps=7)(victim, batch, threat(0.1), stream())
        assert out.trace.zero_gradient.tolist() == [7] * 3
        assert out.x.isfinite().all()


def test_modes_flags_generators_and_grad_mode_are_untouched() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    net.train()
    net[2].eval()
    net[1].bias.requires_grad_(False)
    before = [m.training for m in net.modules()], [q.requires_grad for q in net.parameters()]
    victim = Victim(net, 4)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        gradient.pgd(steps=3, restarts=2)(victim, small_batch(), threat(0.1), stream())
        assert not torch.is_grad_enabled()
    assert ([m.training for m in net.modules()], [q.requires_grad for q in net.parameters()]) == before
    assert all(q.grad is None for q in net.parameters())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    assert victim.run_attack_pass is None


def test_every_attack_stays_inside_its_ball() -> None:
    net, batch = small_net().float(), small_batch(12)
    batch = replace(batch, x=batch.x.float().round(decimals=1).clamp(0, 1))
    for spec in [*gradient.ATTACKS, *noise.ATTACKS]:
        entry = registry().get("attack", spec.name)
        from advplug.parse import parse_reference

        short = {"steps": 6, "draws": 2}
        bound = entry.bind(parse_reference(spec.name))
        attack = entry.make({k: short.get(k, v) for k, v in bound.items()})
        for norm in sorted(spec.caps.norms):  # type: ignore[union-attr]
            for eps in (1e-3, 0.1, 0.7):
                out = attack(Victim(net, 4), batch, threat(eps, norm), stream())
                assert inside(batch.x, out.x, norm, eps).all(), (spec.name, norm, eps)
                assert out.x.dtype == torch.float32
                assert out.x.min() >= 0
                assert out.x.max() <= 1


# --- noise ---


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_noise_uses_its_budget_and_keeps_the_first_success(kind: str, norm: str) -> None:
    p = problem(3)
    eps = p.distance(norm).median().item()
    once = noise.noise(kind)(p.victim(), p.batch, threat(eps, norm), stream())
    if kind == "sign" or norm != "linf":
        reached = distance(p.batch.x, once.x, norm)
        assert reached.tolist() == pytest.approx([eps] * len(reached), rel=1e-5)
    far = eps * 12
    one = noise.noise(kind)(p.victim(), p.batch, threat(far, norm), stream())
    many = noise.noise(kind, draws=20)(p.victim(), p.batch, threat(far, norm), stream())
    won = one.trace.any_iterate
    assert torch.equal(many.x[won], one.x[won])
    assert many.trace.any_iterate.sum() >= won.sum()
    assert torch.equal(wrong(p.victim(), many.x, p.batch.y), many.trace.any_iterate)
    order = torch.arange(len(p.batch)).flip(0)
    again = noise.noise(kind)(p.victim(), p.batch.take(order), threat(far, norm), stream())
    assert torch.equal(again.x, one.x[order])


# --- precision ---


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def in_bfloat16(net: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has attacks choose bfloat16; the list that fills with whether each pass of `net` ran so."""
    reduced = precision.Mode(bfloat16=True, channels_last=True)
    monkeypatch.setattr(precision, "choose", lambda m, x, passes: (reduced, precision.runner(m, reduced)))
    kinds: list[bool] = []
    net[2].register_forward_hook(lambda m, i, o: kinds.append(o.dtype == torch.bfloat16))
    return kinds


def test_reduced_precision_rechecks_and_ends_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net()
    x = torch.rand(20, 3, 8, 8)
    net(x)
    batch = Batch(x, net(x).argmax(1), torch.arange(20))
    kinds = in_bfloat16(net, monkeypatch)
    victim = Victim(net, 4, batch_size=6)
    out = gradient.pgd(steps=8)(victim, batch, threat(0.01), stream())
    assert True in kinds
    assert kinds[-1] is False
    assert victim.run_attack_pass is None
    assert torch.equal(wrong(victim, out.x, batch.y), out.trace.any_iterate)
    assert out.trace.any_iterate.any()
    assert not out.trace.any_iterate.all()
    plain = gradient.pgd(steps=8, precision="float32")(victim, batch, threat(0.01), stream())
    assert (plain.trace.any_iterate != out.trace.any_iterate).sum() <= 1


def test_an_adaptive_rule_compares_losses_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 losses have 3 digits: of the highest of many, much is noise, and steps are halved too early."""
    net = conv_net()
    x = torch.rand(12, 3, 8, 8)
    net(x)
    batch = Batch(x, net(x).argmax(1), torch.arange(12))
    kinds = in_bfloat16(net, monkeypatch)
    seen: list[Tensor] = []
    real = Adaptive.step

    def noted(self: Adaptive, point: Point, memory: Memory) -> tuple[Tensor, Memory]:
        seen.append(memory["best_loss"].clone())
        return real(self, point, memory)

    monkeypatch.setattr(Adaptive, "step", noted)
    attack = gradient.apgd(steps=20)  # the first checkpoint comes after 4 steps
    out = attack(Victim(net, 4, batch_size=12), batch, threat(0.0001), stream())
    assert not out.trace.any_iterate.any()
    assert kinds == [True] * 2 + [False] * 19
    assert [bool(torch.isinf(best).all()) for best in seen] == [True, False, True, *[False] * 17]


def test_calibration_is_bounded_cached_and_skipped_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net().eval()
    x = torch.rand(16, 3, 16, 16)
    net(x)
    victim = Victim(net, 4)
    with victim.frozen():
        assert precision.choose(net, x, 16) == (precision.PLAIN, None)
        assert not precision.timings(net)
        monkeypatch.setattr(precision, "WORTH_SECONDS", 0.0)
        mode, runner = precision.choose(net, x, 10**6)
        assert set(precision.timings(net)) <= {str(m) for m in (precision.PLAIN, *precision.CANDIDATES)}  # no norms
        assert str(precision.PLAIN) in precision.timings(net)
        monkeypatch.setattr(precision, "_clock", lambda *a: pytest.fail("timed twice"))
        assert precision.choose(net, x, 10**6)[0] == mode
        assert (runner is None) == (mode == precision.PLAIN)
        assert precision.choose(net.double(), x.double(), 10**6) == (precision.PLAIN, None)


def test_the_fastest_way_wins_only_by_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(speeds: dict[str, float]) -> str:
        net = conv_net()
        net(torch.rand(1, 3, 8, 8))

        def clock(run: precision.Runner, x: Tensor) -> float:
            mode = getattr(run, "mode", precision.PLAIN)
            return 1e-4 * len(x) / speeds.get(str(mode), 1.0)

        monkeypatch.setattr(precision, "_clock", clock)
        with Victim(net, 4).frozen():
            return str(precision.choose(net, torch.rand(8, 3, 8, 8), 10**6)[0])

    assert chosen({}) == "float32+contiguous"
    assert chosen({"float32+channels_last": 1.05}) == "float32+contiguous"
    assert chosen({"float32+channels_last": 1.5, "bf16+channels_last": 1.6}) == "float32+channels_last"
    assert chosen({"float32+channels_last": 1.5, "bf16+channels_last": 3.0}) == "bf16+channels_last"
    assert chosen({"bf16+channels_last": 2.0, "bf16+contiguous": 2.5}) == "bf16+contiguous"
    assert chosen({"bf16+channels_last": 0.2, "bf16+contiguous": 9.0}) == "float32+contiguous"


def test_calibration_does_not_keep_models_alive() -> None:
    net = conv_net()
    net(torch.rand(1, 3, 8, 8))
    with Victim(net, 4).frozen():
        precision.choose(net, torch.rand(8, 3, 8, 8), 200)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


# --- registration ---


def test_attacks_are_listed_without_torch() -> None:
    code = (
        "import sys; from advplug.registry import registry; from advplug.parse import parse_reference as r; "
        "e = registry().entries('attack'); [x.describe() for x in e]; "
        "registry().get('attack', 'pgd').bind(r('pgd:steps=3,alpha=2/255')); assert 'torch' not in sys.modules; "
        "print(*(x.name for x in e))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fgsm", "ifgsm", "mifgsm", "pgd", "apgd", "apgd-t", "eot-pgd", "noise"} <= set(done.stdout.split())
    assert TOLERANCE == 1e-6


def test_a_compiler_that_fails_is_asked_once_and_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = conv_net(), torch.rand(4, 3, 8, 8)
    net(x)
    asked = []

    def broken(*args: object, **kw: object) -> None:
        asked.append(args)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with Victim(net, 4).frozen():
        for _ in range(3):
            mode, runner = precision.choose(net, x, 10**9)
            assert not mode.compiled
            assert runner is None or runner(x).shape == (4, 4)
            precision.spent(net, x, precision.COMPILE_AFTER + 1)
    assert len(asked) == 1


@pytest.mark.parametrize(("error", "asked"), [(0.2, True), (1.0, False)])
def test_reduced_precision_is_confirmed_where_the_lead_is_small(
    monkeypatch: pytest.MonkeyPatch, error: float, asked: bool
) -> None:
    """Attack passes are wrong by `error`; in truth nothing in the ball fools. A doubtful success is asked about and
    refused, a clear one is believed here, and left to the pipeline's decision."""

    def logits(x: Tensor, error: float = 0.0) -> Tensor:
        z = x[:, 0, 0, 0] - 0.4 - error
        return torch.stack([z, 0 * z, 0 * z - 3], 1)

    mode = precision.Mode(bfloat16=True)
    monkeypatch.setattr(precision, "choose", lambda *a: (mode, lambda x: logits(x, error)))
    batch = Batch(torch.full((6, 1, 2, 2), 0.55), torch.zeros(6, dtype=torch.long), torch.arange(6))
    asked_about: list[int] = []
    victim = Victim(Function(lambda x: asked_about.append(len(x)) or logits(x)), 3)
    out = gradient.pgd(steps=8, random_start=False)(victim, batch, threat(0.1), stream())
    assert bool(asked_about) is asked
    assert out.trace.any_iterate.tolist() == [not asked] * 6


@pytest.mark.parametrize(("error", "asked"), [(0.2, True), (1.0, False)])
def test_rounded_convolutions_are_confirmed_where_the_lead_is_small(
    monkeypatch: pytest.MonkeyPatch, error: float, asked: bool
) -> None:
    """The same where a GPU rounds the inputs of convolutions: only within `full_float32` nothing is wrong."""
    exact: list[int] = []

    def logits(x: Tensor) -> Tensor:
        z = x[:, 0, 0, 0] - 0.4 - (0.0 if exact else error)
        return torch.stack([z, 0 * z, 0 * z - 3], 1)

    @contextmanager
    def full_float32(device: torch.device) -> Iterator[None]:
        exact.append(1)
        yield
        exact.clear()
        seen.append(True)

    seen: list[bool] = []
    monkeypatch.setattr(engine, "full_float32", full_float32)
    monkeypatch.setattr(engine, "rounds_convolutions", lambda device: True)
    batch = Batch(torch.full((6, 1, 2, 2), 0.55), torch.zeros(6, dtype=torch.long), torch.arange(6))
    attack = gradient.pgd(steps=8, random_start=False, precision="float32")
    out = attack(Victim(Function(logits), 3), batch, threat(0.1), stream())
    assert bool(seen) is asked
    assert out.trace.any_iterate.tolist() == [not asked] * 6


def test_drawn_answers_are_not_asked_for_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is drawn ends no run, however many votes it takes."""
    net = conv_net()
    x = torch.rand(6, 3, 8, 8)
    net(x)
    in_bfloat16(net, monkeypatch)
    monkeypatch.setattr(engine, "decide_padded", lambda *a: pytest.fail("asked"))
    batch = Batch(x, net(x).argmax(1), torch.arange(6))
    attack = replace(gradient.pgd(steps=8), transforms=transforms.build(parse_stack("noise:sigma=0.05")), draws=2)
    out = attack(Victim(net, 4), batch, threat(0.3), stream())
    assert out.trace.any_iterate.any()


@pytest.mark.slow
def test_a_compiler_gives_no_advice_to_who_attacks() -> None:
    """A model that cannot be compiled whole: the compiler would tell of it on standard error, whatever is logged."""
    code = """
import torch
from advplug.attacks import precision

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return x.mean((2, 3)) * float(self.scale.detach().exp())

timings = {}
precision._try_compile(Scaled().eval(), torch.rand(32, 3, 8, 8), precision.PLAIN, timings)
print(len(timings))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
