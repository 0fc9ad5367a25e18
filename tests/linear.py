"""Float64 victims with closed forms: what an attack on them must reach is known exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from advplug.contracts import Ball, Batch, Goal, Threat, Untargeted, Wrap
from advplug.rng import Stream
from advplug.victim import Victim

DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


class Affine(nn.Module):
    """logits = weight @ pixels + bias, with weight (K, d)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Function(nn.Module):
    """logits = f(x) for any function of the pixels."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@dataclass(frozen=True)
class Problem:
    """An affine model with images that it gets right, all pixels in [0.3, 0.7]."""

    module: Affine
    batch: Batch

    def victim(self, wraps: tuple[Wrap, ...] = (), **fields: object) -> Victim:
        return Victim(self.module, len(self.module.bias), wraps, **fields)  # type: ignore[arg-type]

    def distance(self, norm: str) -> Tensor:
        """The exact distance (B,) of every image to the nearest wrong answer."""
        logits = self.module(self.batch.x).detach()
        y, found = self.batch.y, []
        for k in range(logits.shape[1]):
            gap = logits.gather(1, y[:, None]).squeeze(1) - logits[:, k]
            length = torch.linalg.vector_norm(
                self.module.weight.detach()[y] - self.module.weight.detach()[k], DUAL[norm], dim=1
            )
            found.append(torch.where(y == k, torch.inf, gap / length.clamp_min(1e-300)))
        return torch.stack(found).amin(0)


def problem(classes: int = 2, n: int = 24, shape: Sequence[int] = (3, 4, 4), seed: int = 0) -> Problem:
    """A random problem whose distances are short enough for no pixel to reach 0 or 1.

    L-inf distances lie between 0.002 and 0.02; an L1 step can then stay within one pixel.
    """
    g = torch.Generator().manual_seed(seed)
    d = torch.Size(shape).numel()
    weight = torch.randn(classes, d, generator=g, dtype=torch.float64)
    x = 0.45 + 0.1 * torch.rand(n, d, generator=g, dtype=torch.float64)
    y = torch.arange(n) % classes
    wanted = 0.002 + 0.018 * torch.rand(n, generator=g, dtype=torch.float64)
    bias = -(weight @ torch.full((d,), 0.5, dtype=torch.float64))
    module = Affine(weight, bias)
    # Newton steps along the nearest boundary's normal set the margin; images that do not settle are dropped.
    for _ in range(60):
        logits = (x @ weight.T + bias).detach()
        other = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
        normal = weight[y] - weight[other]
        gap = (logits.gather(1, y[:, None]) - logits.gather(1, other[:, None])).squeeze(1)
        step = (wanted * normal.abs().sum(1) - gap) / (normal**2).sum(1)
        x = x + step[:, None] * normal
    batch = Batch(x.view(n, *shape), y, torch.arange(n))
    made = Problem(module, batch)
    fine = ((x > 0.3) & (x < 0.7)).all(1) & (made.distance("linf") > 0.001) & (made.distance("linf") < 0.03)
    assert fine.sum() >= n // 2
    return Problem(module, batch.take(fine))


def threat(eps: float, norm: str = "linf", goal: Goal | None = None) -> Threat:
    """A ball of exactly this float radius."""
    return Threat(Ball(norm, Fraction(eps)), goal or Untargeted())


def stream(seed: int = 0) -> Stream:
    return Stream(seed, "test")


def wrong(victim: Victim, x: Tensor, y: Tensor) -> Tensor:
    return victim.decide(x).label != y
