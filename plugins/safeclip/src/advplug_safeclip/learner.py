"""What SafeCLIP and RoCLIP share: both towers in training, one update at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from advplug.train import demand_finite
from advplug_clip.contrastive import BETAS, GREATEST
from advplug_clip.scorer import ClipScorer
from advplug_clip.tiny import learn_words
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

    def start(self, lr: float | None, decay: float, updates: int, rise: int, falls: bool) -> None:
        """A fresh AdamW for the next `updates`: the rate rises to `lr` and stays, or falls by half a cosine."""
        parameters = list(self.scorer.parameters())
        # Decay is for weight matrices and filters: on biases, norms and the scale it only distorts.
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        risen = max(1, min(rise, updates // 10))

        def factor(update: int) -> float:
            if update < risen:
                return (update + 1) / risen
            part = min(1.0, (update - risen) / max(1, updates - risen)) if falls else 0.0
            return 0.5 * (1 + math.cos(math.pi * part))

        self._optimizer = torch.optim.AdamW(groups, lr=lr or self.training.schedule.lr, betas=BETAS, fused=True)
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)

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

        Fewer rows than a batch make one of their own, a single one none.
        """
        draws = stream.generator()
        size = min(self.batch_size, len(rows))
        order = rows[torch.randperm(len(rows), generator=draws).numpy()]
        for start in range(0, len(rows) - size + 1 if size > 1 else 0, size):
            yield order[start : start + size], draws


@contextmanager
def learning(learner: Learner, fresh: bool = True) -> Iterator[list[str]]:
    """Both towers in training mode with gradients; flags and modes are as they were afterwards.

    Where the model is `fresh` its word table becomes that of the captions. Gives sentences for the reader: captions
    that are cut, words that are not told apart.
    """
    scorer = learner.scorer
    flat = [text for own in learner.pairs.data.captions or () for text in own]
    cut = scorer.tokens.cut_note(flat)
    warnings = [f"training captions: {cut}"] if cut else []
    lost = learn_words(scorer.clip, scorer.tokens, flat) if fresh else 0
    if lost:
        warnings.append(f"{lost} rare word pieces of the captions are not told apart; raise words= of the model")
    flags = [(p, p.requires_grad) for p in scorer.parameters()]
    scorer.to(learner.training.device).train()
    # Convolutions of this layout take about half the time; values are the same but for rounding.
    scorer.clip.visual.to(memory_format=torch.channels_last)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with learner.stream.as_global():
            yield warnings
    finally:
        scorer.clip.visual.to(memory_format=torch.contiguous_format)
        scorer.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        scorer.refresh()
