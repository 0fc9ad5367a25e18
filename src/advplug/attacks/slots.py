"""The engine's books: images under attack, those that wait, what is known of each, and one reading of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advplug.attacks.steps import Memory
from advplug.contracts import Batch, Trace


@dataclass
class Slots:
    """Images under attack: their rows in the batch and steps taken (both on the CPU), clean images,
    iterates, labels, targets, the rule's memory and, where kept, the best iterate so far."""

    row: Tensor
    taken: Tensor
    clean: Tensor
    x: Tensor
    y: Tensor
    target: Tensor | None
    memory: Memory

    def __len__(self) -> int:
        return len(self.row)

    def asked(self, rows: Tensor | None) -> Asked:
        """What a pass needs of the slots at `rows`, indices on the CPU; of all where that is None."""
        if rows is None:
            return Asked(self.x, self.y, self.target)
        there = rows.to(self.x.device, non_blocking=True)
        return Asked(self.x[there], self.y[there], None if self.target is None else self.target[there])

    def pick(self, rows: Tensor) -> Slots:
        """The slots at `rows`, indices on the CPU."""
        there = rows.to(self.x.device, non_blocking=True)
        return Slots(
            self.row[rows],
            self.taken[rows],
            self.clean[there],
            self.x[there],
            self.y[there],
            None if self.target is None else self.target[there],
            {name: value[there] for name, value in self.memory.items()},
        )


@dataclass
class Asked:
    """Images (B, C, H, W) of a pass, with their labels and targets."""

    x: Tensor
    y: Tensor
    target: Tensor | None


def join(parts: Sequence[Slots]) -> Slots:
    """One set of slots from several."""
    if len(parts) == 1:
        return parts[0]

    def cat(get: Callable[[Slots], Tensor | None]) -> Tensor:
        return torch.cat([v for p in parts if (v := get(p)) is not None])

    return Slots(
        cat(lambda s: s.row),
        cat(lambda s: s.taken),
        cat(lambda s: s.clean),
        cat(lambda s: s.x),
        cat(lambda s: s.y),
        None if parts[0].target is None else cat(lambda s: s.target),
        {name: torch.cat([p.memory[name] for p in parts]) for name in parts[0].memory},
    )


@dataclass
class Results:
    """What is known of each image of the batch; `x` on the victim's device, the rest on the CPU."""

    x: Tensor
    solved: Tensor
    loss: Tensor
    any_iterate: Tensor
    final_iterate: Tensor
    steps: Tensor
    zero: Tensor
    nonfinite: Tensor
    path: Tensor

    @classmethod
    def blank(cls, batch: Batch, steps: int) -> Results:
        n = len(batch)

        def count() -> Tensor:
            return torch.zeros(n, dtype=torch.long)

        def no() -> Tensor:
            return torch.zeros(n, dtype=torch.bool)

        low = torch.full((n,), -float("inf"), dtype=torch.float64)
        path = torch.full((n, steps + 1), float("nan"))
        return cls(batch.x.clone(), no(), low, no(), no(), count(), count(), count(), path)

    def offer(self, row: Tensor, x: Tensor, fooled: Tensor, loss: Tensor) -> None:
        """Keeps x where only it fools, or where it is like the result so far and its loss is higher."""
        had = self.solved[row]
        better = (fooled & ~had) | ((fooled == had) & (loss > self.loss[row]))
        rows = row[better]
        self.x[rows.to(self.x.device)] = x[better.to(x.device)]
        self.loss[rows] = loss[better]
        self.solved[rows] = fooled[better]

    def trace(self) -> Trace:
        return Trace(self.any_iterate, self.final_iterate, self.steps, self.zero, self.nonfinite, self.path)


@dataclass(frozen=True)
class Reading:
    """One gradient estimate: loss and gradient on the device; what the books need, on the CPU."""

    loss: Tensor
    gradient: Tensor | None
    fooled: Tensor
    clear: Tensor
    losses: Tensor
    zero: Tensor
    nonfinite: Tensor


def reading(loss: Tensor, gradient: Tensor | None, votes: Tensor) -> Reading:
    """Cleans a gradient and fetches all that the books need in one transfer.

    `votes` (B,): the share of draws that succeed, and 2 where a single answer leaves no doubt.
    """
    if gradient is None:
        blank = torch.zeros(len(loss), dtype=torch.bool)
        report = torch.stack([votes.to(loss.dtype), loss]).cpu()
        return Reading(loss, None, report[0] > 0.5, report[0] > 1.5, report[1].float(), blank, blank)
    largest = torch.linalg.vector_norm(gradient.flatten(1), float("inf"), dim=1)
    report = torch.stack([votes.to(loss.dtype), loss, largest.to(loss.dtype)]).cpu()
    nonfinite = ~report[2].isfinite()
    if bool(nonfinite.any()):
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    return Reading(loss, gradient, report[0] > 0.5, report[0] > 1.5, report[1].float(), report[2] == 0, nonfinite)


class Queue:
    """What waits for a place: rows of the batch not begun, and slots parked by an earlier phase."""

    def __init__(self, rows: Tensor, parked: list[Slots], begin: Callable[[Tensor], Slots]) -> None:
        self.rows = rows
        self.parked = join(parked) if parked else None
        self.begin = begin
        self.at = 0

    def __len__(self) -> int:
        return (len(self.parked) if self.parked is not None else len(self.rows)) - self.at

    def fill(self, slots: Slots | None, size: int) -> Slots | None:
        """`slots` with free places taken by those who wait; None if nobody is left."""
        free = min(size - (len(slots) if slots is not None else 0), len(self))
        if free > 0:
            span = torch.arange(self.at, self.at + free)
            self.at += free
            fresh = self.parked.pick(span) if self.parked is not None else self.begin(self.rows[span])
            slots = fresh if slots is None or not len(slots) else join([slots, fresh])
        return slots if slots is not None and len(slots) else None
