"""What the deployed system answers: clean decisions, success of changed images, rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from advplug.allocator import release_freed_memory
from advplug.ball import project
from advplug.contracts import Batch, Perturbation
from advplug.data import Split
from advplug.errors import AdvplugError, CellFailure
from advplug.evidence import Array
from advplug.perturbations import LP
from advplug.victim import Victim, decide_padded

CHUNK = 512
"""Images an attack gets at once: enough to keep its batches full, few enough to bound memory."""
T = TypeVar("T")


@dataclass
class Clean:
    """The victim's answers without attack: right and rejected (n, d), label and least likely class (n,); cosines
    (n, C), where its columns are texts."""

    right: Array
    rejected: Array
    label: Array
    least_likely: Array
    cosines: Array | None = None


@dataclass
class Batching:
    """How many images go through the model at once; halved, and noted, when memory runs out."""

    size: int
    notes: list[str] = field(default_factory=list)

    def run(self, work: Callable[[int], T]) -> T:
        """`work(size)`, again with half the size after running out of memory. Raises CellFailure at size 1."""
        while True:
            try:
                return work(self.size)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.size == 1:
                    raise CellFailure("out of memory with a single image; use a smaller model or image size") from error
                self.size = max(1, self.size // 2)
                self.notes.append(f"out of memory: batch size halved to {self.size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Every backend says it in its own way: CPU, CUDA's libraries, Apple's MPS."""
    signs = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(s in str(error) for s in signs)


def decide(victim: Victim, x: Tensor, batching: Batching, draws: int) -> tuple[Array, Array, Array]:
    """(labels, accepted, least likely class), the first two (B, draws), from `draws` fresh decisions each."""

    def work(size: int) -> tuple[Array, Array, Array]:
        labels, accepted, least = [], [], []
        for part in torch.split(x, size):
            made = [decide_padded(victim, part, size) for _ in range(draws)]
            labels.append(torch.stack([d.label for d in made], 1))
            accepted.append(torch.stack([d.accepted for d in made], 1))
            scores = made[0].scores
            least.append(made[0].label if scores is None else scores.argmin(1))
        return tuple(torch.cat(t).cpu().numpy() for t in (labels, accepted, least))  # type: ignore[return-value]

    with victim.frozen():
        try:
            return batching.run(work)
        except AdvplugError:
            raise
        except Exception as error:  # the model may be the user's own
            raise CellFailure(f"the model raised {type(error).__name__}: {' '.join(str(error).split())}") from error


def draws_of(victim: Victim) -> int:
    return victim.decisions


def clean_decisions(victim: Victim, split: Split, batching: Batching) -> Clean:
    """Judges every evaluated image without attack."""
    right, rejected, label, least, near = [], [], [], [], []
    victim.reseed("clean")
    for batch in split.batches(CHUNK, victim.device):
        labels, accepted, smallest = decide(victim, batch.x, batching, draws_of(victim))
        right.append((labels == batch.y.cpu().numpy()[:, None]) & accepted)
        rejected.append(~accepted)
        label.append(labels[:, 0])
        least.append(smallest)
        if victim.columns is not None and victim.columns.readable:
            near.append(cosines(victim, batch.x, batching))
        release_freed_memory()
    found = Clean(*(np.concatenate(parts) for parts in (right, rejected, label, least)))
    return replace(found, cosines=np.concatenate(near) if near else None)


def cosines(victim: Victim, x: Tensor, batching: Batching) -> Array:
    """(B, C): of images and texts, means over the decisions of a randomised victim."""

    def work(size: int) -> Array:
        return np.concatenate(
            [
                torch.stack([victim.cosines(part) for _ in range(draws_of(victim))]).mean(0).cpu().numpy()
                for part in torch.split(x, size)
            ]
        )

    with victim.frozen():
        return batching.run(work)


def succeeds(victim: Victim, x: Tensor, batch: Batch, batching: Batching, draws: int) -> Array:
    """(B, draws): accepted, and wrong or the target."""
    labels, accepted, _ = decide(victim, x, batching, draws)
    if batch.target is not None:
        return np.asarray(accepted & (labels == batch.target.cpu().numpy()[:, None]))
    return np.asarray(accepted & (labels != batch.y.cpu().numpy()[:, None]))


PUSHES = (1.0, 1.1, 1.3, 1.7, 2.5)
"""How far a perturbation is stretched, within the budget, before it is rounded."""


def succeeds_in_8_bits(
    victim: Victim, x_adv: Tensor, batch: Batch, ball: Perturbation, batching: Batching, draws: int
) -> Array:
    """(B, draws): success of images that a file of 8-bit pixels can hold, inside the same budget.

    An attack that stops once an image is fooled stops just beyond the boundary, where rounding undoes it by
    chance. So an image that rounding repairs is pushed on along its own perturbation, as far as the budget allows.
    """
    success = np.zeros((len(batch), draws), dtype=bool)
    left = np.ones(len(batch), dtype=bool)
    pushes = PUSHES if ball.norm in LP else PUSHES[:1]
    for push in pushes:
        rows = torch.from_numpy(left).to(x_adv.device)
        part = batch.take(rows)
        stretched = x_adv[rows]
        if ball.norm in LP:
            stretched = project(part.x, part.x + push * (stretched - part.x), ball.norm, float(ball.eps))
        found = succeeds(victim, round_to_8_bits(part.x, stretched), part, batching, draws)
        success[left] = found
        left[left] = found.mean(axis=1) <= 0.5
        if not left.any():
            break
    return success


def round_to_8_bits(x: Tensor, x_adv: Tensor) -> Tensor:
    """`x_adv` on the grid of 1/255, rounded toward `x`, so that no change grows."""
    scaled = x_adv * 255
    # A pixel that sits on the grid up to float error stays where it is.
    near = scaled.round()
    toward = torch.where(x_adv > x, scaled.floor(), scaled.ceil())
    return torch.where((scaled - near).abs() < 1e-3, near, toward).div_(255).clamp_(0, 1)
