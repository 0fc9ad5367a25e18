"""Step rules: where an iterate goes, given its gradient. One small class a rule; memory is per image.

A rule's memory is a dict of (B, ...) tensors, so that the engine can drop, join and reorder images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from advplug.ball import columns, direction, project

Memory: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """A batch of iterates: clean images, iterates, ascent gradients, losses (B,) and step numbers (B,).

    `taken` lives on the CPU: the steps each image has taken so far, from 0.
    """

    clean: Tensor
    x: Tensor
    gradient: Tensor
    loss: Tensor
    taken: Tensor


class StepRule(Protocol):
    """`step` returns the next iterates and the new memory; `memory` makes that of fresh images."""

    def memory(self, x: Tensor) -> Memory: ...
    def step(self, point: Point, memory: Memory) -> tuple[Tensor, Memory]: ...


@dataclass(frozen=True)
class Steepest:
    """x + length * steepest direction, projected: FGSM, I-FGSM and PGD. `length` is in pixel units."""

    norm: str
    eps: float
    length: float

    def memory(self, x: Tensor) -> Memory:
        return {}

    def step(self, point: Point, memory: Memory) -> tuple[Tensor, Memory]:
        ahead = direction(point.gradient, self.norm, point.x)
        return project(point.clean, torch.add(point.x, ahead, alpha=self.length), self.norm, self.eps), memory


@dataclass(frozen=True)
class Momentum:
    """m = decay m + g / |g|_1, then a step along m (Dong et al. 2018, arXiv 1710.06081, algorithm 1)."""

    norm: str
    eps: float
    length: float
    decay: float = 1.0

    def memory(self, x: Tensor) -> Memory:
        return {"momentum": torch.zeros_like(x)}

    def step(self, point: Point, memory: Memory) -> tuple[Tensor, Memory]:
        scale = point.gradient.abs().flatten(1).sum(1).clamp_min(1e-30)
        momentum = self.decay * memory["momentum"] + point.gradient / columns(scale, point.x)
        ahead = direction(momentum, self.norm, point.x)
        moved = project(point.clean, torch.add(point.x, ahead, alpha=self.length), self.norm, self.eps)
        return moved, {"momentum": momentum}


def checkpoints(steps: int) -> tuple[int, ...]:
    """The steps after which APGD may halve its step (Croce and Hein 2020, section 3.1).

    For 100 steps: 22, 41, 57, 70, 80, 87, 93, 99.
    """
    period, least, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found, at = [], period
    while at <= steps:
        found.append(at)
        period = max(period - shrink, least)
        at += period
    return tuple(found)


@dataclass(frozen=True)
class Adaptive:
    """APGD's step (Croce and Hein 2020, arXiv 2003.01690, algorithm 1), in L-inf or L2.

    Starts at 2 eps; at a checkpoint the step is halved, and the image returns to its best point, if the
    loss rose in at most `rho` of the steps since the last one, or if neither step nor best loss changed.
    """

    norm: str
    eps: float
    steps: int
    keep: float = 0.75
    rho: float = 0.75

    def memory(self, x: Tensor) -> Memory:
        def per_image(value: float) -> Tensor:
            return torch.full((len(x),), value, dtype=x.dtype, device=x.device)

        return {
            "previous": x.clone(),
            "best_x": x.clone(),
            "best_gradient": torch.zeros_like(x),
            "best_loss": per_image(-math.inf),
            "last_loss": per_image(math.inf),
            "rises": per_image(0),
            "length": per_image(2 * self.eps),
            "checked_best": per_image(-math.inf),
            "halved": per_image(0),
        }

    def step(self, point: Point, memory: Memory) -> tuple[Tensor, Memory]:
        m = dict(memory)
        loss = point.loss.to(m["best_loss"].dtype)
        m["rises"] = m["rises"] + (loss > m["last_loss"]).to(loss.dtype)
        m["last_loss"] = loss
        better = loss > m["best_loss"]
        wide = columns(better, point.x)
        m["best_x"] = torch.where(wide, point.x, m["best_x"])
        m["best_gradient"] = torch.where(wide, point.gradient, m["best_gradient"])
        m["best_loss"] = torch.where(better, loss, m["best_loss"])
        x, gradient = self._check(point, m)
        length = columns(m["length"], x)
        ahead = project(point.clean, x + length * direction(gradient, self.norm), self.norm, self.eps)
        keep = torch.where(point.taken == 0, 1.0, self.keep).to(device=x.device, dtype=x.dtype)
        keep = columns(keep, x)
        moved = x + keep * (ahead - x) + (1 - keep) * (x - m["previous"])
        # After a return to the best point the momentum term is the jump, as in the published code.
        m["previous"] = x
        return project(point.clean, moved, self.norm, self.eps), m

    def _check(self, point: Point, m: Memory) -> tuple[Tensor, Tensor]:
        """Halves steps where a checkpoint asks for it; returns the points and gradients to go on from."""
        table = checkpoints(self.steps)
        due = torch.isin(point.taken, torch.tensor(table))
        if not bool(due.any()):
            return point.x, point.gradient
        spans = dict(zip(table, (b - a for a, b in zip((0, *table), table, strict=False)), strict=True))
        span = torch.tensor([spans.get(int(k), 1) for k in point.taken]).to(m["rises"])
        due = due.to(point.x.device)
        stalled = (m["halved"] == 0) & (m["checked_best"] >= m["best_loss"])
        halve = due & ((m["rises"] <= self.rho * span) | stalled)
        m["length"] = torch.where(halve, m["length"] / 2, m["length"])
        m["halved"] = torch.where(due, halve.to(m["halved"].dtype), m["halved"])
        m["checked_best"] = torch.where(due, m["best_loss"], m["checked_best"])
        m["rises"] = torch.where(due, torch.zeros_like(m["rises"]), m["rises"])
        wide = columns(halve, point.x)
        return torch.where(wide, m["best_x"], point.x), torch.where(wide, m["best_gradient"], point.gradient)


def without_best(memory: Memory) -> Memory:
    """APGD's memory without its best loss: the next point takes its place, as losses of another precision are not
    compared with."""
    return {**memory, "best_loss": torch.full_like(memory["best_loss"], -math.inf)}
