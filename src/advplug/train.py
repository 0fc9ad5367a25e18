"""The one supervised training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.contracts import DatasetInfo, Objective, Schedule
from advplug.data import Split
from advplug.errors import CellFailure
from advplug.rng import Stream
from advplug.training.crew import ALONE, Crew

Progress: TypeAlias = Callable[[int, int, int, int, float], None]
"""Called after each step with epoch, epochs, step, steps (counted from 1) and the loss."""

WARM_UP = 0.25
"""Share of the steps over which a one-cycle learning rate rises."""


@dataclass
class Training:
    """What a stage needs to train: data, the schedule to use unless it has its own, device and randomness.

    `test` are the images that the model will be judged on, to be compared with the data and nothing else. `clean` is
    the training set before anyone poisoned it, for defenders who own clean data: they take a part and say how much.
    `crew` are the processes that train, each on its part of every batch.
    """

    data: Split
    info: DatasetInfo
    schedule: Schedule
    device: torch.device
    stream: Stream
    progress: Progress | None = None
    test: Split | None = None
    clean: Split | None = None
    crew: Crew = ALONE
    fits: int = field(default=0, init=False)

    def fit(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        schedule: Schedule | None = None,
    ) -> nn.Module:
        """Trains `model` in place on the device and returns it in evaluation mode.

        The objective is cross-entropy unless given; `parameters` restricts what is updated (batch-norm
        statistics always follow the data). The result depends on the stream, the schedule and how many
        fits came before, and the global generators are left as they were. Every image is seen once an
        epoch; a last batch of one image joins the one before it, since batch norm cannot take it, and one of
        fewer images than processes likewise.
        Raises CellFailure where the loss stops being finite or there are fewer than two images.
        """
        plan = schedule or self.schedule
        if len(self.data) < 2:
            raise CellFailure(f"training needs at least 2 images, got {len(self.data)}")
        if min(plan.batch_size, len(self.data)) < self.crew.size:
            raise CellFailure(
                f"{self.crew.size} processes cannot share batches of {min(plan.batch_size, len(self.data))} images; "
                "use a larger batch_size or fewer processes"
            )
        stream = self.stream.child("fit", self.fits, plan.seed)
        self.fits += 1
        model.to(self.device).train()
        chosen = list(model.parameters() if parameters is None else parameters)
        if not chosen:
            raise CellFailure(
                "the model has no parameters that could be trained; use a defense that wraps, such as jpeg"
            )
        try:
            with _only(model, chosen), self.crew.joined(model), self.crew.own(stream).as_global():
                self._run(model, objective, chosen, plan, stream)
        finally:
            model.eval()
        return model

    def _run(
        self, model: nn.Module, objective: Objective | None, chosen: list[nn.Parameter], plan: Schedule, stream: Stream
    ) -> None:
        steps = math.ceil(len(self.data) / plan.batch_size)
        if 0 < len(self.data) % plan.batch_size < max(2, self.crew.size) and steps > 1:
            steps -= 1
        optimizer = _optimizer(chosen, plan)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: learning_rate(i, plan.epochs * steps, plan.one_cycle)
        )
        for epoch in range(plan.epochs):
            draws = stream.generator("epoch", epoch)
            order = torch.randperm(len(self.data), generator=draws).numpy()
            for step in range(steps):
                rows = order[step * plan.batch_size : (step + 1) * plan.batch_size if step + 1 < steps else None]
                mine = rows[self.crew.part(len(rows))]
                with self.crew.forward():
                    loss = self._loss(model, objective, rows, plan, draws, stream.child(epoch, step))
                optimizer.zero_grad(set_to_none=True)
                value = self.crew.backward(loss, len(mine) / len(rows), chosen)
                demand_finite(value, (epoch + 1, plan.epochs, step + 1, steps), plan.lr)
                optimizer.step()
                rate.step()
                if self.progress is not None:
                    self.progress(epoch + 1, plan.epochs, step + 1, steps, value)

    def _loss(
        self,
        model: nn.Module,
        objective: Objective | None,
        rows: np.ndarray[Any, Any],
        plan: Schedule,
        draws: torch.Generator,
        stream: Stream,
    ) -> Tensor:
        part = self.crew.part(len(rows))
        batch = self.data.batch(rows[part])
        moves = Moves.drawn(len(rows), plan, draws).of(part)
        x = moves.applied(batch.x).to(self.device)
        y = batch.y.to(self.device)
        if objective is None:
            return functional.cross_entropy(model(x), y)
        return objective.loss(model, x, y, self.crew.own(stream))


def demand_finite(loss: float, place: tuple[int, int, int, int], lr: float) -> None:
    """Raises CellFailure for a loss that is no number; `place` is epoch, epochs, step, steps, counted from 1."""
    if not math.isfinite(loss):
        epoch, epochs, step, steps = place
        raise CellFailure(
            f"training failed: the loss became {loss:g} in epoch {epoch} of {epochs}, step {step} of {steps}; "
            f"use a smaller lr than {lr:g}"
        )


@dataclass(frozen=True)
class Moves:
    """What is drawn for a batch: which images (B, 1, 1, 1) are mirrored, and by how much (B, 2) each is moved.

    Offsets count pixels down and right from `shift` pixels up and left; None for what is not asked for.
    """

    mirrored: Tensor | None
    offset: Tensor | None
    shift: int

    @classmethod
    def drawn(cls, n: int, plan: Schedule, draws: torch.Generator) -> Moves:
        """Each image mirrored with probability 1/2 and moved by up to `plan.shift` pixels; `draws` is on the CPU."""
        mirrored = torch.rand(n, 1, 1, 1, generator=draws) < 0.5 if plan.flip else None
        offset = torch.randint(0, 2 * plan.shift + 1, (n, 2), generator=draws) if plan.shift else None
        return cls(mirrored, offset, plan.shift)

    def of(self, part: slice) -> Moves:
        """Those of some of the images."""
        mirrored, offset = (None if made is None else made[part] for made in (self.mirrored, self.offset))
        return Moves(mirrored, offset, self.shift)

    def applied(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) so changed; edges are repeated."""
        if self.mirrored is not None:
            x = torch.where(self.mirrored, x.flip(3), x)
        if self.offset is not None:
            height, width = x.shape[2:]
            wide = functional.pad(x, (self.shift,) * 4, mode="replicate")
            rows = (torch.arange(height) + self.offset[:, :1])[:, None, :, None]
            columns = (torch.arange(width) + self.offset[:, 1:])[:, None, None, :]
            image = torch.arange(len(x))[:, None, None, None]
            channel = torch.arange(x.shape[1])[None, :, None, None]
            x = wide[image, channel, rows, columns]
        return x


def augment(x: Tensor, plan: Schedule, draws: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each mirrored with probability 1/2 and moved by up to `plan.shift` pixels.

    Edges are repeated. The draws come from `draws`, a generator on the CPU.
    """
    return Moves.drawn(len(x), plan, draws).applied(x)


def _optimizer(chosen: list[nn.Parameter], plan: Schedule) -> torch.optim.Optimizer:
    # Decay is for weight matrices and filters: on biases and norms it only distorts.
    groups = [
        {"params": [p for p in chosen if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in chosen if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, nesterov=plan.momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=plan.lr, fused=True)


def learning_rate(step: int, steps: int, one_cycle: bool) -> float:
    """The learning rate's factor at `step`: a linear rise, then half a cosine down to 0 (Smith and Topin 2019)."""
    if not one_cycle:
        return 1.0
    rise = max(1.0, WARM_UP * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


@contextmanager
def _only(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for the chosen parameters only; every flag as before afterwards."""
    flags = [(p, p.requires_grad) for p in [*model.parameters(), *chosen]]
    wanted = {id(p) for p in chosen}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
