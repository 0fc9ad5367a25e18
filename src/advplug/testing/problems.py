"""Victims whose answers are known in closed form, and one with everything that an attack could disturb."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from advplug.contracts import Ball, Batch, Targeted, Threat, Untargeted
from advplug.rng import Stream
from advplug.victim import Columns, Victim

SHAPE = (3, 8, 8)
EPS = {"linf": Fraction(1, 50), "l2": Fraction(1, 5), "l1": Fraction(3, 10), "l0": Fraction(8)}
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
        logits: Tensor = (x - 0.5).flatten(1) @ self.weight.T
        return logits


@dataclass(frozen=True)
class LinearProblem:
    """Images with the exact size of the smallest change that succeeds, in one norm.

    `radius` (B,) runs from 0.5 to 1.5 times `eps`. Untargeted, the nearest class is label + 1 and all others
    are far. Targeted, the target is label + 2 while label + 1 is nearer still, so that an attack which
    flips images anywhere is not taken for one that hits.
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
        # Each class counts as a text, for attacks that lower similarities.
        columns = Columns(torch.arange(self.classes), 1.0, self.classes)
        return Victim(self.module, self.classes, stream=Stream(seed, "victim"), columns=columns)

    def threat(self, eps: Fraction | None = None) -> Threat:
        goal = Untargeted() if self.batch.target is None else Targeted("random")
        return Threat(Ball(self.norm, self.eps if eps is None else eps), goal)

    def copy(self, rows: Tensor | None = None) -> Batch:
        """The batch, or some of its rows, in tensors of their own."""
        return self.batch.take(torch.arange(len(self.batch)) if rows is None else rows)


def linear_problem(norm: str, images: int = 11, classes: int = 5, targeted: bool = False) -> LinearProblem:
    """A linear problem in `norm` ('linf', 'l2', 'l1' or 'l0')."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(classes, torch.Size(SHAPE).numel(), generator=generator).clamp_(-2, 2)
    y = torch.arange(images) % classes
    near, goal = (y + 1) % classes, (y + (2 if targeted else 1)) % classes
    wanted = float(EPS[norm]) * torch.linspace(0.5, 1.5, images)
    # Random weights are nearly orthogonal, and the coefficients nearly the logits. The tests see to it that with
    # this seed the straight way to the goal is open in every norm.
    change = weight[y] + 0.6 * weight[goal] + (0.66 * weight[near] if targeted else 0)
    if norm == "l0":
        change = _scaled_to_pixels(weight, change, y, goal, wanted)
    else:
        change = (change * (wanted / exact_radius(weight, change, y, goal, norm))[:, None]).float()
    margin = ((weight[y] - weight[goal]) * change).sum(1) * (float(EPS[norm]) / wanted)
    module = Linear(weight * (MARGIN / float(margin.mean())))
    # Positions 1000 and up: an attack that takes indices for row numbers is found out.
    index = torch.arange(images) * 7 + 1000
    batch = Batch((change + 0.5).view(images, *SHAPE), y, index, goal if targeted else None)
    scaled = module.weight.detach()
    if norm == "l0":
        others = [goal] if targeted else [(y + k) % classes for k in range(1, classes)]
        radius = torch.stack([fewest_pixels(scaled, change, y, k) for k in others]).amin(0)
    else:
        radius = exact_radius(scaled, change, y, goal, norm)
    return LinearProblem(norm, EPS[norm], module, batch, radius)


def exact_radius(weight: Tensor, change: Tensor, y: Tensor, goal: Tensor, norm: str) -> Tensor:
    """The distance (B,) from x = 1/2 + change to where class `goal` overtakes the label, without the box.

    It is (z_y - z_goal) / ||w_y - w_goal|| in the dual norm.
    """
    difference = (weight[y] - weight[goal]).double()
    margin = (difference * change.double()).sum(1)
    distance: Tensor = margin / torch.linalg.vector_norm(difference, DUAL[norm], dim=1)
    return distance


def fewest_pixels(weight: Tensor, change: Tensor, y: Tensor, goal: Tensor) -> Tensor:
    """How many pixels (B,) have to change, inside [0, 1], until class `goal` overtakes the label: those that gain
    most go first, each to the end of its range."""
    difference = (weight[y] - weight[goal]).double()
    margin = (difference * change.double()).sum(1)
    room = torch.where(difference > 0, 0.5 + change.double(), 0.5 - change.double())
    gain = (difference.abs() * room).view(len(y), SHAPE[0], -1).sum(1)
    reached = gain.sort(1, descending=True).values.cumsum(1)
    return (reached < margin[:, None]).sum(1).double() + 1


def _scaled_to_pixels(weight: Tensor, change: Tensor, y: Tensor, goal: Tensor, wanted: Tensor) -> Tensor:
    """`change`, scaled so that about `wanted` pixels undo it."""
    low, high = torch.zeros(len(y)), 0.5 / change.abs().amax(1)
    for _ in range(40):
        middle = (low + high) / 2
        enough = fewest_pixels(weight, change * middle[:, None], y, goal) > wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (change * low[:, None]).float()


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
