"""The conformance kit on attacks: each planted fault trips its own check, and the sound twin passes all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import (
    Access,
    AttackCaps,
    Crafted,
    Strength,
    Trace,
)
from advplug.testing import check_attack
from advplug.testing.problems import EPS, SHAPE, linear_problem
from planting import breaches

WHITE = AttackCaps(Access.GRADIENT, frozenset({"linf"}), frozenset({"untargeted", "targeted"}))
LABELS = AttackCaps(Access.DECISION, frozenset({"linf"}), strength=Strength.FLOOR)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_radius_is_exact_and_the_box_far(norm: str, targeted: bool) -> None:
    """Moving along the dual direction by 0.999 radii fails, by 1.001 radii it gives the class that is wanted."""
    problem = linear_problem(norm, targeted=targeted)
    weight, batch = problem.module.weight.detach(), problem.batch
    goal = (batch.y + (2 if targeted else 1)) % problem.classes
    difference = weight[goal] - weight[batch.y]
    if norm == "linf":
        step = difference.sign()
    elif norm == "l2":
        step = difference / difference.norm(dim=1, keepdim=True)
    else:
        step = torch.zeros_like(difference)
        top = difference.abs().argmax(1, keepdim=True)
        step.scatter_(1, top, difference.gather(1, top).sign())
    for share in (0.999, 1.001):
        x = batch.x + (share * problem.radius[:, None] * step).view(-1, *SHAPE).float()
        assert ((problem.victim().decide(x).label == goal) == (share > 1)).all()
        assert 0 < float(x.min()) < float(x.max()) < 1
    assert torch.equal(problem.victim().decide(batch.x).label, batch.y)
    eps = float(EPS[norm])
    assert torch.allclose(problem.radius, eps * torch.linspace(0.5, 1.5, len(batch)).double(), rtol=1e-5)


def ifgsm(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    """Sound: twenty signed steps on the margin, projected."""
    x, sign = batch.x.clone(), 1.0
    labels = batch.y
    if batch.target is not None and str(threat.goal) != "untargeted":
        labels, sign = batch.target, -1.0
    for _ in range(20 if threat.eps else 0):
        leaf = x.requires_grad_()
        loss = nn.functional.cross_entropy(victim.attacked(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        moved = leaf.detach() + sign * threat.eps / 5 * gradient.sign()
        x = torch.minimum(torch.maximum(moved, batch.x - threat.eps), batch.x + threat.eps).clamp(0, 1)
    return Crafted(x.detach())


def after(change: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """The sound attack, with a fault: `change` (victim, batch, images) gives what is returned instead."""

    def attack(victim: Any, batch: Any, threat: Any, rng: Any) -> Any:
        crafted = ifgsm(victim, batch, threat, rng)
        changed = change(victim, batch, crafted.x)
        return crafted if changed is None else Crafted(changed) if isinstance(changed, Tensor) else changed

    return attack


def overshoots(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return Crafted((batch.x + 1.01 * threat.eps).clamp(0, 1))


def leaves_the_box(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == x.amax(), 1.1, x) if threat.eps else x)


def always_noisy(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == batch.x, x + 1e-7, x) if threat.eps else batch.x + 1e-4)


def draws(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    generator = rng.generator("start")
    start = batch.x + threat.eps * (2 * torch.rand(batch.x.shape, generator=generator) - 1)
    x = ifgsm(victim, batch, threat, rng).x
    return Crafted(torch.where(x == batch.x + threat.eps, x, 0.5 * (x + start)))


def first_image_only(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    x = batch.x.clone()
    x[:1] = ifgsm(victim, batch.take(torch.tensor([0])), threat, rng).x
    return Crafted(x)


def global_draws(victim: Any, batch: Any, x: Tensor) -> None:
    torch.rand(1)


def global_numpy(victim: Any, batch: Any, x: Tensor) -> None:
    np.random.rand()


def training_mode(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.train()


def freezes(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.requires_grad_(False)


def fills_gradients(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module(x).sum().backward()


def changes_weights(victim: Any, batch: Any, x: Tensor) -> None:
    with torch.no_grad():
        next(victim.module.parameters()).add_(1e-6)


def forgets_hook(victim: Any, batch: Any, x: Tensor) -> None:
    victim.module.register_forward_hook(lambda *_: None)


def changes_input(victim: Any, batch: Any, x: Tensor) -> Tensor:
    kept = x.clone()
    batch.x.mul_(0.999)
    return kept


def changes_labels(victim: Any, batch: Any, x: Tensor) -> None:
    batch.y.add_(1)


def double(victim: Any, batch: Any, x: Tensor) -> Tensor:
    return x.double()


def bare_tensor(victim: Any, batch: Any, threat: Any, rng: Any) -> Any:
    return batch.x


def short_trace(victim: Any, batch: Any, x: Tensor) -> Crafted:
    bits, counts = torch.zeros(1, dtype=torch.bool), torch.zeros(1)
    return Crafted(x, Trace(bits, bits, counts, counts, counts))


def squares_only(victim: Any, batch: Any, x: Tensor) -> Tensor:
    side = int(x[0, 0].numel() ** 0.5)
    return x.reshape(len(x), -1, side, side).reshape(x.shape)


def gives_up(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return Crafted(batch.x.clone())


def untargeted_always(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    return ifgsm(victim, replace(batch, target=None), threat, rng)


def asks_scores(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
    victim.logits(batch.x)
    return Crafted(batch.x.clone())


ATTACK_FAULTS: list[tuple[Callable[..., Any], AttackCaps, str]] = [
    (overshoots, WHITE, "linf: stays inside the ball"),
    (leaves_the_box, WHITE, "linf: stays inside the ball"),
    (gives_up, WHITE, "linf: flips beyond the exact radius: 3 of 3 images"),
    (untargeted_always, WHITE, "linf: targeted"),
    (always_noisy, WHITE, "linf: eps = 0 returns the input"),
    (draws, WHITE, "linf: same seed, same images: another seed gives other images"),
    (first_image_only, WHITE, "linf: does not depend on the batch"),
    (after(global_draws), WHITE, "it leaves changed: the global random state of torch"),
    (after(global_numpy), WHITE, "it leaves changed: the global random state of NumPy"),
    (after(training_mode), WHITE, "the model's train and eval modes"),
    (after(freezes), WHITE, "the parameters' requires_grad"),
    (after(fills_gradients), WHITE, "the parameters' gradients"),
    (after(changes_weights), WHITE, "the model's weights"),
    (after(forgets_hook), WHITE, "the model's hooks"),
    (after(changes_input), WHITE, "Batch.x"),
    (after(changes_labels), WHITE, "Batch.y"),
    (after(double), WHITE, "linf: runs: it returned images of dtype torch.float64"),
    (bare_tensor, WHITE, "linf: runs: it must return Crafted, it returned Tensor"),
    (after(short_trace), WHITE, "linf: trace: trace.any_iterate must be (B,)"),
    (after(squares_only), WHITE, "linf: leaves inputs and model as they were: raised RuntimeError"),
    (asks_scores, LABELS, "linf: uses the access it declares: it declares access 'decision' and asked for scores"),
    (ifgsm, replace(LABELS, access=Access.SCORE), "linf: uses the access it declares: raised RuntimeError"),
    (ifgsm, replace(WHITE, norms=frozenset({"l7"})), "declaration: norms must be among linf, l2, l1"),
    (ifgsm, replace(WHITE, goals=frozenset({"evil"})), "declaration: goals must be among"),
]  # fmt: skip


def test_the_sound_attack_passes(plant: Callable[..., str]) -> None:
    results = check_attack(plant("attack", WHITE, lambda: ifgsm))
    assert [r.name for r in results if r.ok is None] == ["linf: uses the access it declares", "linf: trace"]


@pytest.mark.parametrize(("attack", "caps", "found"), ATTACK_FAULTS)
def test_faults_of_attacks_are_found(
    attack: Callable[..., Any], caps: AttackCaps, found: str, plant: Callable[..., str]
) -> None:
    assert found in breaches(check_attack, plant("attack", caps, lambda: attack))


def test_a_soundness_breach_needs_a_leaving_of_the_ball(plant: Callable[..., str]) -> None:
    def cheats(victim: Any, batch: Any, threat: Any, rng: Any) -> Crafted:
        return ifgsm(
            victim, batch, replace(threat, perturbation=replace(threat.perturbation, eps=Fraction(1, 20))), rng
        )

    text = breaches(check_attack, plant("attack", WHITE, lambda: cheats))
    assert "linf: flips nothing within the exact radius: 5 images flipped" in text
    assert "linf: stays inside the ball" in text
