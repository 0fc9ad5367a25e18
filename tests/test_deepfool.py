"""DeepFool against closed forms: exact distances on affine victims, exact iterates on spheres."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug.builtin.geometric import deepfool
from advplug.contracts import Batch, Crafted, Gradient, MinimumNorm, Targeted, Threat, Untargeted, Wrap
from advplug.errors import UsageError
from advplug.evidence import Evidence
from advplug.testing import check_attack
from advplug.victim import Victim
from cli_tools import CNN, QUICK, evaluate, stored
from linear import Affine, Function, problem, stream, wrong

NORMS = ("l2", "linf")
OVER = 1.02


def smallest(norm: str, targeted: bool = False) -> Threat:
    return Threat(MinimumNorm(norm, Fraction(1)), Targeted() if targeted else Untargeted())


def sizes(batch: Batch, made: Crafted, norm: str) -> Tensor:
    return MinimumNorm(norm, Fraction(1)).measure(batch.x, made.x)


@pytest.mark.parametrize("refine", [0, 12])
def test_conformance(refine: int) -> None:
    results = check_attack("deepfool", refine=refine)
    asked = [r.ok for r in results if "flips beyond the exact radius" in r.name]
    assert asked == [True, True]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("norm", NORMS)
def test_one_step_reaches_the_exact_distance_of_the_nearest_class(norm: str, classes: int) -> None:
    p = problem(classes)
    made = deepfool()(p.victim(), p.batch, smallest(norm), stream())
    assert made.trace is not None
    assert made.trace.steps.tolist() == [1] * len(p.batch)
    assert wrong(p.victim(), made.x, p.batch.y).all()
    torch.testing.assert_close(sizes(p.batch, made, norm) / OVER, p.distance(norm), rtol=1e-9, atol=0)
    # A hair less far, and nothing is fooled.
    short = deepfool(overshoot=0, steps=1)(p.victim(), p.batch, smallest(norm), stream())
    torch.testing.assert_close(sizes(p.batch, short, norm), p.distance(norm), rtol=1e-9, atol=0)
    before = p.batch.x + 0.9999 * (short.x - p.batch.x)
    assert not wrong(p.victim(), before, p.batch.y).any()


@pytest.mark.parametrize("norm", NORMS)
def test_candidates_bound_the_classes_that_are_considered(norm: str) -> None:
    """With two candidates only the runner-up of the clean image is, though another class may be nearer."""
    p = problem(5)
    two = deepfool(candidates=2)(p.victim(), p.batch, smallest(norm), stream())
    logits = p.module(p.batch.x).detach()
    own = p.batch.y[:, None]
    runner_up = logits.scatter(1, own, -torch.inf).argmax(1)
    weight = p.module.weight.detach()
    gap = (logits.gather(1, own) - logits.gather(1, runner_up[:, None])).squeeze(1)
    length = torch.linalg.vector_norm(weight[p.batch.y] - weight[runner_up], {"l2": 2, "linf": 1}[norm], dim=1)
    torch.testing.assert_close(sizes(p.batch, two, norm) / OVER, gap / length, rtol=1e-9, atol=0)
    victim = p.victim()
    deepfool(candidates=2)(victim, p.batch, smallest(norm), stream())
    assert victim.passes.backward >= len(p.batch)
    assert victim.passes.backward < 2 * len(p.batch)  # one class and the fill up to a common batch size


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_is_exact_where_one_boundary_decides(norm: str) -> None:
    p = problem(5)
    batch = replace(p.batch, target=(p.batch.y + 2) % 5)
    assert batch.target is not None
    made = deepfool()(p.victim(), batch, smallest(norm, targeted=True), stream())
    assert torch.equal(p.victim().decide(made.x).label, batch.target)
    logits, weight = p.module(p.batch.x).detach(), p.module.weight.detach()
    order = {"l2": 2, "linf": 1}[norm]
    gap = logits - logits.gather(1, batch.target[:, None])
    length = torch.linalg.vector_norm(weight[None] - weight[batch.target][:, None], order, dim=2)
    bound = torch.where(length > 0, gap / length.clamp_min(1e-9), -torch.inf).amax(1)
    size = sizes(batch, made, norm)
    assert made.trace is not None
    once = made.trace.steps == 1
    assert once.sum() >= 2
    torch.testing.assert_close(size[once] / OVER, bound[once], rtol=1e-9, atol=0)
    assert (size >= bound).all()
    assert (size <= 1.3 * bound).all()


def sphere(radius: float, inside: bool) -> Victim:
    """Class 0 within (or outside) a ball around the middle of the image, class 1 elsewhere."""
    sign = 1.0 if inside else -1.0

    def logits(x: Tensor) -> Tensor:
        value = sign * (radius**2 - (x - 0.5).square().flatten(1).sum(1))
        return torch.stack([value, torch.zeros_like(value)], 1)

    return Victim(Function(logits), 2)


def rays(lengths: list[float]) -> Batch:
    g = torch.Generator().manual_seed(3)
    ray = torch.randn(len(lengths), 3, 4, 4, generator=g, dtype=torch.float64)
    ray = ray / ray.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    n = len(lengths)
    x = 0.5 + torch.tensor(lengths, dtype=torch.float64).view(-1, 1, 1, 1) * ray
    return Batch(x, torch.zeros(n, dtype=torch.long), torch.arange(n))


@pytest.mark.parametrize("inside", [True, False])
def test_iterates_on_a_sphere_follow_the_recurrence(inside: bool) -> None:
    """Gradients are radial there: the distance t from the centre obeys t <- t + 1.02 (r^2 - t^2) / (2 t)."""
    radius, lengths = 0.4, [0.2, 0.3, 0.39] if inside else [0.41, 0.6, 0.9]
    batch, victim = rays(lengths), sphere(radius, inside)
    made = deepfool()(victim, batch, smallest("l2"), stream())
    assert made.trace is not None
    for i, t in enumerate(lengths):
        steps = 0
        while (t <= radius) if inside else (t >= radius):
            t += OVER * (radius**2 - t**2) / (2 * t)
            steps += 1
        assert (made.x[i] - 0.5).norm().item() == pytest.approx(t, rel=1e-9)
        assert made.trace.steps[i].item() == steps
    exact = torch.tensor([abs(radius - t) for t in lengths], dtype=torch.float64)
    refined = deepfool(refine=12)(victim, batch, smallest("l2"), stream())
    assert wrong(victim, refined.x, batch.y).all()
    size = sizes(batch, refined, "l2")
    assert (size >= exact * (1 - 1e-9)).all()
    assert (size <= exact + sizes(batch, made, "l2") * 2.0**-12).all()


@pytest.mark.parametrize("norm", NORMS)
def test_pixels_at_the_end_of_their_range_do_not_take_every_step(norm: str) -> None:
    """Nearly all of the gradient is at a white pixel: what clipping loses is made up by the others."""
    weight = torch.tensor([[40.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]], dtype=torch.float64)
    x = torch.tensor([[[[0.99, 0.5], [0.5, 0.5]]]], dtype=torch.float64)
    # Class 1 needs 0.4 + 0.3 less than what the clean image has: the white pixel can give 0.4 only.
    module = Affine(-weight, torch.tensor([40 * 0.99 + 1.5 + 0.7, 0.0], dtype=torch.float64))
    batch = Batch(x, torch.tensor([0]), torch.tensor([0]))
    victim = Victim(module, 2)
    made = deepfool()(victim, batch, smallest(norm), stream())
    assert wrong(victim, made.x, batch.y).all()
    assert made.x.min() >= 0
    assert made.x.max() == 1
    assert made.trace is not None
    assert made.trace.steps.item() > 1
    assert made.trace.zero_gradient.item() == 0


def test_fooling_images_stay_and_the_rest_does_not_depend_on_them() -> None:
    p = problem(5)
    y = p.batch.y.clone()
    y[::2] = (y[::2] + 1) % 5
    batch = replace(p.batch, y=y)
    made = deepfool()(p.victim(), batch, smallest("l2"), stream())
    assert torch.equal(made.x[::2], batch.x[::2])
    assert made.trace is not None
    assert made.trace.steps[::2].sum() == 0
    alone = deepfool()(p.victim(batch_size=3), p.batch, smallest("l2"), stream())
    torch.testing.assert_close(made.x[1::2], alone.x[1::2], rtol=0, atol=1e-12)
    everything = deepfool()(p.victim(), p.batch.take(torch.zeros(0, dtype=torch.long)), smallest("l2"), stream())
    assert len(everything.x) == 0


def test_cut_and_broken_gradients_are_counted_and_end_the_search() -> None:
    p = problem(3)
    x = p.batch.x

    def cut(z: Tensor) -> Tensor:
        return p.module(z.detach())

    made = deepfool()(Victim(Function(cut), 3), p.batch, smallest("l2"), stream())
    assert torch.equal(made.x, x)
    assert made.trace is not None
    ones = [1] * len(x)
    assert (made.trace.steps.tolist(), made.trace.zero_gradient.tolist()) == (ones, ones)
    assert not made.trace.any_iterate.any()

    def broken(z: Tensor) -> Tensor:
        return p.module(z) + 0 * (z.flatten(1)[:, :1] - x.flatten(1)[0, 0]).abs().sqrt()

    first = p.batch.take(torch.tensor([0]))
    made = deepfool()(Victim(Function(broken), 3), first, smallest("l2"), stream())
    assert torch.equal(made.x, first.x)
    assert made.trace is not None
    assert (made.trace.nonfinite.item(), made.trace.zero_gradient.item()) == (1, 0)


def test_small_gradients_do_not_underflow() -> None:
    """Logits 1e-20 times as large, in float32: squares of their gradients are 0."""
    p = problem(2)
    weight, bias = p.module.weight.detach().float(), p.module.bias.detach().float()
    victim = Victim(Affine(weight * 1e-20, bias * 1e-20), 2)
    batch = replace(p.batch, x=p.batch.x.float())
    made = deepfool()(victim, batch, smallest("l2"), stream())
    assert wrong(victim, made.x, batch.y).all()
    torch.testing.assert_close(sizes(batch, made, "l2").double() / OVER, p.distance("l2"), rtol=2e-3, atol=0)


def rounding(stand_ins: int) -> Wrap:
    """Rounds to 8 bits, which has no gradient; the first of two stand-ins leads nowhere."""

    def forward(inner, x, noise):  # type: ignore[no-untyped-def]
        return inner((x * 255).round() / 255)

    def nowhere(inner, x, noise):  # type: ignore[no-untyped-def]
        return inner(x.detach()) + 0 * x.flatten(1).sum(1, keepdim=True)

    def identity(inner, x, noise):  # type: ignore[no-untyped-def]
        return inner(x)

    return Wrap(forward, Gradient.BPDA, (nowhere, identity)[2 - stand_ins :])


@pytest.mark.parametrize("stand_ins", [1, 2])
def test_attacks_through_every_stand_in_until_the_deployed_system_is_fooled(stand_ins: int) -> None:
    p = problem(5)
    victim = p.victim((rounding(stand_ins),))
    assert victim.views == stand_ins
    attackable = ~wrong(victim, p.batch.x, p.batch.y)
    batch = p.batch.take(attackable)
    made = deepfool(refine=4)(victim, batch, smallest("l2"), stream())
    assert wrong(victim, made.x, batch.y).all()
    assert made.trace is not None
    assert made.trace.any_iterate.all()
    assert (made.trace.zero_gradient > 0).all() == (stand_ins == 2)
    # Rounding moves a pixel by 1/510 at most.
    assert (sizes(batch, made, "l2") <= 1.1 * p.distance("l2")[attackable] + 48**0.5 / 510 + 0.02).all()


def test_averages_over_the_draws_of_a_randomised_victim() -> None:
    """Noise of mean 0 on the logits: 64 draws find the boundary that a single one misses by far."""
    p = problem(2)

    def noisy(inner, x, noise):  # type: ignore[no-untyped-def]
        z = inner(x)
        return z + 0.2 * torch.randn(z.shape, generator=noise, dtype=z.dtype)

    victim = p.victim((Wrap(noisy, stochastic=True, draws=64),))
    made = deepfool(refine=5)(victim, p.batch, smallest("l2"), stream())
    assert made.trace is not None
    assert made.trace.any_iterate.float().mean() > 0.9
    ratio = sizes(p.batch, made, "l2") / p.distance("l2")
    assert 0.8 < ratio.median() < 1.2
    passes = victim.passes
    assert passes.forward % 64 == 0
    assert passes.backward % 64 == 0


def test_batch_dependent_victims_keep_their_batches() -> None:
    """Batch statistics of all images are asked for in every pass."""
    p = problem(3)
    seen = []

    def logits(z: Tensor) -> Tensor:
        seen.append(len(z))
        return p.module(z) + 0 * z.mean()

    victim = Victim(Function(logits), 3, batch_dependent=True)
    made = deepfool()(victim, p.batch, smallest("l2"), stream())
    assert wrong(victim, made.x, p.batch.y).all()
    assert set(seen) == {len(p.batch)}


def test_modes_and_wrong_use() -> None:
    p = problem(2)
    module = nn.Sequential(nn.Dropout(0.9), p.module).train()
    made = deepfool()(Victim(module, 2), p.batch, smallest("linf"), stream())
    assert wrong(p.victim(), made.x, p.batch.y).all()
    assert module.training
    with pytest.raises(UsageError, match="not in l1"):
        deepfool()(p.victim(), p.batch, smallest("l1"), stream())
    with pytest.raises(UsageError, match=r"Batch\.target"):
        deepfool()(p.victim(), p.batch, smallest("l2", targeted=True), stream())


def test_agrees_with_torchattacks_image_by_image() -> None:
    """An independent implementation of the same steps, in L2 and clipped likewise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
    with stream().as_global("net"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 6)).eval()
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    batch = Batch(x, net(x).argmax(1), torch.arange(12))
    made = deepfool()(Victim(net, 6), batch, smallest("l2"), stream())
    theirs = torchattacks.DeepFool(net, steps=50, overshoot=0.02)(batch.x, batch.y)
    assert made.trace is not None
    assert made.trace.steps.max() > 2
    torch.testing.assert_close(made.x, theirs, rtol=0, atol=1e-4)


def test_one_run_from_the_command_line_answers_for_every_budget(tmp_path: Path) -> None:
    found = evaluate(
        "-m", CNN, "-a", "deepfool", "-e", "l2:1/20", "-e", "l2:1/4", "-e", "l2:8", *QUICK, output=tmp_path
    )
    kept = {}
    for _, cell, evidence, _ in stored(tmp_path).values():
        assert evidence is not None
        kept[json.loads(cell)["eps"]] = Evidence.from_bytes(evidence)
    for cell in found["cells"]:
        assert cell["status"] == "ok"
        eps, seen = float(Fraction(cell["eps"])), kept[cell["eps"]]
        assert seen.found is not None
        assert seen.violations == 0
        assert np.isfinite(seen.found).all()
        assert cell["metrics"]["robust_accuracy"]["value"] == pytest.approx((seen.found > eps).mean())
    assert found["cells"][-1]["metrics"]["robust_accuracy"]["value"] == 0


def test_targeted_medians_are_over_the_images_that_were_attacked() -> None:
    """Most images are the target already; each of the others is exactly 0.2 away from it."""

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            brightness = x.flatten(1).mean(1)
            return torch.stack([brightness, torch.full_like(brightness, 0.5)], 1) * 4

    x = torch.cat([torch.full((8, 1, 4, 4), 0.8), torch.full((3, 1, 4, 4), 0.3)])
    y = torch.tensor([0] * 8 + [1] * 3)
    found = advplug.evaluate(Bright(), "deepfool:target=0", dataset=(x, y), eps="linf:0.3", audit="none")
    middle = found.cells[0].metrics["minimum_norm_median"]
    assert middle is not None
    assert middle.n == 3
    assert middle.value == pytest.approx(0.2, rel=0.03)
