"""What goes into an attack and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from advplug.contracts.threats import Goal, Targeted, Threat
from advplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from advplug.rng import Stream
    from advplug.victim import Victim


@dataclass(frozen=True)
class Batch:
    """Images with labels.

    `index` (B,) are positions in the dataset: random draws are seeded by them, so that results do not
    depend on batch size. `target` (B,) is set for targeted goals. `start` (B, C, H, W), where given, is
    a point to begin from (the end of the sweep's smaller budget).
    """

    x: Tensor
    y: Tensor
    index: Tensor
    target: Tensor | None = None
    start: Tensor | None = None
    text: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def aim(self, goal: Goal) -> Tensor | None:
        """The classes to reach, None for an untargeted goal. Raises UsageError for a targeted one without targets."""
        if not isinstance(goal, Targeted):
            return None
        if self.target is None:
            raise UsageError("a targeted attack needs Batch.target")
        return self.target

    def take(self, rows: Tensor) -> Batch:
        """The images at `rows` (indices or a mask, on any device)."""
        # Positions may stay on the CPU, and a tensor takes rows of its own device or of the CPU only.
        rows = rows.cpu()
        picked = {n: getattr(self, n)[rows] for n in ("x", "y", "index")}
        for name in ("target", "start"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[rows]
        chosen = None
        if self.text is not None:
            positions = rows.nonzero().flatten() if str(rows.dtype) == "torch.bool" else rows
            chosen = tuple(self.text[int(i)] for i in positions)
        return replace(self, text=chosen, **picked)


@dataclass(frozen=True)
class Decision:
    """What the deployed system answers: label (B,), whether it answered at all (B,), scores (B, K)."""

    label: Tensor
    accepted: Tensor
    scores: Tensor | None = None

    def fooled(self, y: Tensor, target: Tensor | None = None) -> Tensor:
        """(B,) bool: accepted, and `target`, or where that is None anything but `y`."""
        return self.accepted & (self.label != y if target is None else self.label == target)


@dataclass(frozen=True)
class Trace:
    """How an attack went, per image, as far as it knows; every tensor is (B,) on the CPU, `loss_path` (B, steps + 1)
    with NaN after an image was solved.

    `any_iterate`: fooled at some iterate; `final_iterate`: fooled at the last one. `zero_gradient` and
    `nonfinite` count steps whose gradient vanished or was not finite. `queries` counts the images that the victim
    was asked for. `black_box`: fooled by a part that sees scores only, after every gradient had failed.
    """

    any_iterate: Tensor | None = None
    final_iterate: Tensor | None = None
    steps: Tensor | None = None
    zero_gradient: Tensor | None = None
    nonfinite: Tensor | None = None
    loss_path: Tensor | None = None
    queries: Tensor | None = None
    black_box: Tensor | None = None


@dataclass(frozen=True)
class Crafted:
    """An attack's output: images of the shape of the input, and how it got there.

    `applied` (B, ...) is what was done to each image, for perturbation sets that cannot be read off the images.
    """

    x: Tensor
    trace: Trace | None = None
    applied: Tensor | None = None


class EvasionAttack(Protocol):
    """Returns changed images; the engine, not the attack, decides which of them succeed.

    An attack whose perturbation set has parameters of its own also has a method
    `perturbation(norm, eps) -> Perturbation`. One that stops at an image's first success has `transferable()`, which
    gives the version that goes on: images that just fool one model rarely fool another.
    """

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted: ...
