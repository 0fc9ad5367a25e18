"""Victims whose answers are known in closed form, and one with everything that an attack could disturb."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from advplug.contracts import Ball, Batch, Targeted, Threat, Untargeted
from advplug.rng import Stream
from advplug.victim import Victim

SHAPE = (3, 8, 8)
EPS = {"linf": Fraction(1, 50), "l2": Fraction(1, 5), "l1": Fraction(3, 10)}
"""The budget of the linear problem in each norm: small enough that [0, 1] never cuts the ball short."""
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
MARGIN = 4.0
"""Logit margin of an image whose radius is the budget: large enough for cross-entropy to see the nearest class."""


class Linear(nn.Module):
    """Logits W (x - 1/2), images flattened."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (x - 0.5).flatten(1) @ self.weight.T.to(x.dtype)
        return logits


@dataclass(frozen=True)
class LinearProblem:
    """Images with their exact distance to the decision boundary in one norm.

    `radius` (B,) runs from 0.5 to 1.5 times `eps`; the nearest other class is `target`, which is label + 1.
    The label's distance to class k is (z_y - z_k) / ||w_y - w_k|| in the dual norm.
    """

    norm: str
    eps: Fraction
    module: Linear
    batch: Batch
    radius: Tensor

    @property
    def classes(self) -> int:
        return len(self.module.weight)

    def victim(self, seed: int = 0) -> Victim:
        return Victim(self.module, self.classes, stream=Stream(seed, "victim"))

    def threat(self, eps: Fraction | None = None, targeted: bool = False) -> Threat:
        goal = Targeted("next") if targeted else Untargeted()
        return Threat(Ball(self.norm, self.eps if eps is None else eps), goal)


def linear_problem(norm: str, images: int = 11, classes: int = 5) -> LinearProblem:
    """A linear problem in `norm` ('linf', 'l2' or 'l1')."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, torch.Size(SHAPE).numel(), generator=generator).clamp_(-2, 2)
    y = torch.arange(images) % classes
    target = (y + 1) % classes
    eps = EPS[norm]
    wanted = float(eps) * torch.linspace(0.5, 1.5, images)
    # Along w_y + 0.6 w_target the target is the nearest class, and by far.
    change = weight[y] + 0.6 * weight[target]
    change = change * (wanted / exact_radius(weight, change, y, norm))[:, None]
    margin = ((weight[y] - weight[target]) * change).sum(1) * (float(eps) / wanted)
    module = Linear(weight * (MARGIN / float(margin.mean())))
    x = (change + 0.5).view(images, *SHAPE)
    # Position 1000 and up: an attack that takes indices for row numbers is found out.
    batch = Batch(x, y, torch.arange(images) * 7 + 1000, target)
    return LinearProblem(norm, eps, module, batch, exact_radius(module.weight.detach(), change, y, norm))


def exact_radius(weight: Tensor, change: Tensor, y: Tensor, norm: str) -> Tensor:
    """The distance (B,) from x = 1/2 + change to the nearest other class, without the box."""
    difference = (weight[y][:, None] - weight[None]).double()
    margins = (difference * change.double()[:, None]).sum(2)
    distances = margins / torch.linalg.vector_norm(difference, DUAL[norm], dim=2)
    distances[torch.arange(len(y)), y] = float("inf")
    nearest: Tensor = distances.amin(1)
    return nearest


class Fragile(nn.Module):
    """A small net of the parts that a careless attack changes: batch norm, dropout, gradients, flags.

    Takes one channel and any size, so that code which assumes square RGB images shows itself.
    """

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.convolution(x - 0.5)))
        logits: Tensor = self.head(self.drop(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)))
        return logits


def fragile(channels: int = 1, classes: int = 10) -> Fragile:
    """A `Fragile` with reproducible weights, in evaluation mode."""
    with Stream(0, "fragile").as_global():
        return Fragile(channels, classes).eval()


def fragile_batch(module: Fragile, images: int = 4, shape: tuple[int, int, int] = (1, 9, 7)) -> Batch:
    """Images of an odd shape, labelled as the module sees them."""
    x = torch.rand(images, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = module(x)
    return Batch(x, scores.argmax(1), torch.arange(images) + 50, scores.argmin(1))
