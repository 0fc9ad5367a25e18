"""What SafeCLIP and RoCLIP share: both towers in training, one update at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from advplug.train import demand_finite
from advplug_clip.contrastive import BETAS, GREATEST, adamw, both_towers, read_texts
from advplug_clip.scorer import ClipScorer
from advplug_safeclip.pairs import Array, Pairs

if TYPE_CHECKING:
    from advplug.rng import Stream
    from advplug.train import Training


@dataclass
class Learner:
    """A model in training: its pairs, the batch size, and how many of `updates` in all were done."""

    scorer: ClipScorer
    pairs: Pairs
    training: Training
    stream: Stream
    batch_size: int
    updates: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    _optimizer: Any = None
    _rate: Any = None

    def steps(self, rows: int) -> int:
        """Updates of an epoch on so many rows."""
        return rows // self.batch_size

    def start(
        self, lr: float | None, decay: float, updates: int, rise: int, falls: bool, beta2: float = BETAS[1]
    ) -> None:
        """A fresh AdamW for the next `updates`: the rate rises to `lr` and stays, or falls by half a cosine."""
        lr, betas = lr or self.training.schedule.lr, (BETAS[0], beta2)
        self._optimizer, self._rate = adamw(self.scorer, lr, decay, rise, updates, falls, betas)

    def update(self, loss: Tensor) -> None:
        """One update by the gradient of `loss`. Raises CellFailure where that is no number."""
        value = loss.item()
        self.done += 1
        place = (1, 1, min(self.done, self.updates), self.updates)
        demand_finite(value, place, self._optimizer.param_groups[0]["initial_lr"])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._rate.step()
        with torch.no_grad():
            self.scorer.clip.logit_scale.clamp_(0, GREATEST)
        self.losses.append(value)
        if self.training.progress is not None:
            self.training.progress(*place, value)

    def mean_loss(self) -> float | None:
        """That of the updates since it was last asked for; None without any."""
        mean = float(np.mean(self.losses)) if self.losses else None
        self.losses.clear()
        return mean

    def batches(self, rows: Array, stream: Stream) -> Iterator[tuple[Array, torch.Generator]]:
        """Whole batches of `rows` in random order, and a generator for what is drawn; the rest is left out.

        Fewer rows than a batch make one of their own, a single one or none at all make none.
        """
        if len(rows) < 2:
            return
        draws = stream.generator()
        size = min(self.batch_size, len(rows))
        order = rows[torch.randperm(len(rows), generator=draws).numpy()]
        for start in range(0, len(rows) - size + 1, size):
            yield order[start : start + size], draws


@contextmanager
def learning(learner: Learner, fresh: bool = True) -> Iterator[list[str]]:
    """Both towers in training mode with gradients; flags and modes are as they were afterwards.

    Where the model is `fresh` its word table becomes that of the captions. Gives sentences for the reader: captions
    that are cut, words that are not told apart.
    """
    flat = [text for own in learner.pairs.data.captions or () for text in own]
    warnings = read_texts(learner.scorer, flat, fresh)
    with both_towers(learner.scorer, learner.training.device, learner.stream):
        yield warnings
