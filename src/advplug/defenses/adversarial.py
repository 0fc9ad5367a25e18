"""Adversarial examples to train on, made for the batch at hand by the model in evaluation mode.

Batch norm uses its running statistics while they are made and does not follow them; parameters get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from advplug.attacks.engine import GradientAttack
from advplug.attacks.losses import cross_entropy, loss_named
from advplug.attacks.steps import Momentum, Point, Steepest
from advplug.ball import project, random_start
from advplug.contracts import AttackCaps, Ball, Batch, EvasionAttack, MinimumNorm, Threat
from advplug.craft import craft
from advplug.decisions import Batching
from advplug.rng import Stream
from advplug.victim import Victim, input_gradient

Examples: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Stream], Tensor]
"""(model, x, y, stream) to images of the shape of x in [0, 1], without gradient."""

NEAR = 1e-3
"""Spread of the noise that TRADES and MART start with (their published code)."""


@dataclass(frozen=True)
class Ascent:
    """Gradient steps up a loss inside a norm ball, of `length` in pixel units; `decay` is that of a momentum.

    It starts at the clean image, at a uniform point of the ball, or near the image, where a divergence from the
    clean answers is not flat. The last iterate counts, so K steps cost K passes there and back and not one more.
    """

    norm: str
    eps: float
    steps: int
    length: float
    start: Literal["clean", "uniform", "near"] = "uniform"
    decay: float | None = None

    def __call__(self, victim: Victim, x: Tensor, loss: Callable[[Tensor], Tensor], stream: Stream) -> Tensor:
        """Images of the shape of `x` (B, C, H, W); `loss` maps logits (B, K) to values (B,) to be raised."""
        rule = (
            Steepest(self.norm, self.eps, self.length)
            if self.decay is None
            else Momentum(self.norm, self.eps, self.length, self.decay)
        )
        point, memory = self._begin(x, stream), rule.memory(x)
        with victim.frozen(), torch.enable_grad():
            for step in range(self.steps):
                leaf = point.detach().requires_grad_()
                each = loss(victim.module(leaf))
                gradient = input_gradient(each, leaf)
                taken = torch.full((len(x),), step)
                point, memory = rule.step(Point(x, point, gradient, each.detach(), taken), memory)
        return point.detach()

    def _begin(self, x: Tensor, stream: Stream) -> Tensor:
        if self.start == "uniform":
            return random_start(x, torch.arange(len(x)), self.norm, self.eps, stream, "start")
        if self.start == "near":
            noise = torch.randn(x.shape, generator=stream.generator("start"), dtype=x.dtype).to(x.device)
            return project(x, x + NEAR * noise, self.norm, self.eps)
        return x


@dataclass(frozen=True)
class Inner:
    """An attack as the maker of examples, untargeted, in the ball of radius `eps`; implements `Examples`.

    Without `eps`, which only attacks for the smallest change can do without, images are as far as that takes them;
    with it, those of such attacks are moved into the ball. `label` names the attack in errors.
    """

    attack: EvasionAttack
    label: str
    caps: AttackCaps
    norm: str
    eps: Fraction | None
    classes: int

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        """Raises CellFailure where the attack raises, or returns what is no image."""
        victim = Victim(model, self.classes, device=x.device, stream=stream, batch_size=len(x))
        if self.ascent is not None:
            assert isinstance(self.attack, GradientAttack)
            loss = loss_named(self.attack.loss)
            return self.ascent(victim, x, lambda logits: loss(logits, y, None), stream)
        batch = Batch(x, y, torch.arange(len(y)))
        with victim.frozen():
            made = craft(self.attack, victim, batch, self._threat(x), stream, Batching(len(x)), self.label).x
        return made.clamp(0, 1) if self.eps is None else project(x, made, self.norm, float(self.eps))

    @cached_property
    def ascent(self) -> Ascent | None:
        """The same attack without the engine's books and the pass that judges its last iterate, where that is all
        that differs."""
        attack = self.attack
        if not (isinstance(attack, GradientAttack) and attack.keep_going and self.eps is not None):
            return None
        if attack.rule == "adaptive" or attack.restarts > 1 or attack.transforms or attack.n_targets:
            return None
        eps = float(self.eps)
        length = float(attack.alpha) if attack.alpha is not None else attack.fraction * eps
        decay = attack.decay if attack.rule == "momentum" else None
        return Ascent(self.norm, eps, attack.steps, length, attack.start, decay)

    def _threat(self, x: Tensor) -> Threat:
        bound = Fraction(x[0].numel()) if self.eps is None else self.eps
        chosen = MinimumNorm if self.caps.minimum_norm else Ball
        return Threat(chosen(self.norm, bound), access=self.caps.access)


def steps_from(start: Literal["clean", "near"], norm: str, eps: Fraction, steps: int) -> Ascent:
    """Steps of 2.5 eps / steps, as the attacks `ifgsm` and `pgd` take them by default."""
    return Ascent(norm, float(eps), steps, min(1.0, 2.5 / steps) * float(eps), start)


def worst_cross_entropy(ascent: Ascent, classes: int) -> Examples:
    """Examples that raise the cross-entropy of the label."""

    def make(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        victim = Victim(model, classes, device=x.device, stream=stream)
        return ascent(victim, x, lambda logits: cross_entropy(logits, y), stream)

    return make


def worst_divergence(ascent: Ascent, classes: int) -> Examples:
    """Examples whose answer is farthest from the clean one: KL(clean || adversarial) of the class probabilities."""

    def make(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        victim = Victim(model, classes, device=x.device, stream=stream)
        with victim.frozen(), torch.no_grad():
            clean = model(x).log_softmax(1)
        return ascent(victim, x, lambda logits: divergence(clean, logits.log_softmax(1)), stream)

    return make


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row (B,), from log probabilities (B, K)."""
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
