"""Judges a victim whose training set was attacked: with a trigger and without, on targets, beside a clean model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from advplug.allocator import release_freed_memory
from advplug.build import Built
from advplug.contracts import Batch, Trigger
from advplug.data import Split
from advplug.decisions import CHUNK, Batching, decide, draws_of
from advplug.errors import CellFailure
from advplug.evidence import Array
from advplug.poisons.evidence import PoisonEvidence
from advplug.poisons.prepared import triggered
from advplug.victim import Victim

LOOKED_AT = 64
"""Images on which it is seen how much of a trigger gets through."""


@dataclass
class _Answers:
    """What a victim says, (n, d): classes, -1 where it does not answer."""

    clean: list[Array]
    triggered: list[Array]


def judge(built: Built, clean: Victim, test: Split, batching: Batching) -> PoisonEvidence:
    """Judges the victim and the model `clean` that was trained on clean data; `test` is the whole test split, of which
    the targets are rows. Raises CellFailure where a model or the trigger raises."""
    poisoned = built.poisoned
    assert poisoned is not None
    victim, trigger, targets = built.victim, poisoned.trigger, poisoned.targets
    own, reference, wanted = _Answers([], []), _Answers([], []), []
    for batch in built.split.batches(CHUNK, victim.device):
        _ask(own, victim, batch, trigger, batching)
        _ask(reference, clean, batch, trigger, batching)
        if trigger is not None:
            wanted.append(_wanted(trigger, batch.y))
        release_freed_memory()
    rows = np.zeros(0, dtype=np.int64) if targets is None else np.asarray(targets.rows, dtype=np.int64)
    aimed = [answers(v, test.batch(rows, victim.device), batching, "targets") if len(rows) else rows[:, None]
             for v in (victim, clean)]  # fmt: skip
    nothing = np.zeros((0, draws_of(victim)), dtype=np.int64)
    return PoisonEvidence(
        index=np.asarray(built.split.index),
        y=np.asarray(built.split.labels),
        wanted=np.concatenate(wanted) if wanted else nothing[:, 0],
        clean=np.concatenate(own.clean),
        triggered=np.concatenate(own.triggered) if own.triggered else nothing,
        reference_clean=np.concatenate(reference.clean)[:, 0],
        reference_triggered=np.concatenate(reference.triggered)[:, 0] if reference.triggered else nothing[:, 0],
        target_index=test.index[rows],
        target_y=test.labels[rows],
        target_wanted=rows if targets is None else np.asarray(targets.wanted, dtype=np.int64),
        target=aimed[0],
        target_reference=aimed[1][:, 0],
        reaches=float("nan") if trigger is None else reaches(victim, trigger, built.split),
        poisons=int(poisoned.poisons.sum()),
        rows=len(poisoned.data),
    )


def _ask(into: _Answers, victim: Victim, batch: Batch, trigger: Trigger | None, batching: Batching) -> None:
    into.clean.append(answers(victim, batch, batching, "clean"))
    if trigger is not None:
        marked = Batch(triggered(trigger, batch.x, batch.index.to(batch.x.device)), batch.y, batch.index)
        into.triggered.append(answers(victim, marked, batching, "triggered"))


def _wanted(trigger: Trigger, y: Tensor) -> Array:
    wanted = trigger.wanted(y)
    if wanted.shape != y.shape:
        raise CellFailure(f"the trigger wants classes of shape {tuple(wanted.shape)} for {tuple(y.shape)}")
    return np.asarray(wanted.cpu().numpy(), dtype=np.int64)


def answers(victim: Victim, batch: Batch, batching: Batching, what: str) -> Array:
    """(B, d) classes, -1 where an image is not answered."""
    victim.reseed(what, int(batch.index[0]))
    labels, accepted, _ = decide(victim, batch.x, batching, draws_of(victim))
    return np.where(accepted, labels, -1)


def reaches(victim: Victim, trigger: Trigger, split: Split) -> float:
    """How much of a trigger reaches the first layer with weights, as a share: the change of that layer's input in units
    of the input's spread, against the same of the pixels. NaN where no such layer is met."""
    batch = split.batch(np.arange(min(len(split), LOOKED_AT)), victim.device)
    marked = triggered(trigger, batch.x, batch.index.to(batch.x.device))
    seen = []
    with victim.frozen(), torch.no_grad():
        for x in (batch.x, marked):
            victim.reseed("trigger")
            with _first_input(victim.module) as caught:
                victim.logits(x)
            seen.append(caught[0] if caught else None)
    before, after = seen
    if before is None or after is None or before.shape != after.shape:
        return float("nan")
    pixels = _relative(batch.x, marked)
    return float("nan") if pixels == 0 else _relative(before, after) / pixels


def _relative(before: Tensor, after: Tensor) -> float:
    spread = before.double().std()
    return float((after.double() - before.double()).square().mean().sqrt() / spread) if spread > 0 else 0.0


@contextmanager
def _first_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input of whichever layer with weights is called first."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, given: tuple[object, ...]) -> None:
        if not caught and given and isinstance(given[0], Tensor) and given[0].is_floating_point():
            caught.append(given[0].detach().clone())

    layers = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False)) and not list(m.children())]
    handles = [layer.register_forward_pre_hook(catch) for layer in layers]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
