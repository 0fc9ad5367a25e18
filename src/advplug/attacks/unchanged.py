"""What attacks ask about the images as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from advplug.contracts import Batch
from advplug.victim import Victim, decide_padded


def best_wrong_classes(victim: Victim, batch: Batch, count: int) -> Tensor:
    """The best-scoring wrong classes of each image, (B, at most `count`), best first; at least one."""
    parts = []
    for x, y in zip(*(torch.split(t, victim.batch_size) for t in (batch.x, batch.y)), strict=True):
        scores = victim.logits(x).nan_to_num().scatter(1, y[:, None], -torch.inf)
        parts.append(scores.topk(max(1, min(count, victim.classes - 1)), dim=1).indices)
    return torch.cat(parts)


def need_no_change(victim: Victim, batch: Batch, rows: Tensor, target: Tensor | None) -> Tensor:
    """Those of `rows` (indices on the CPU) whose images fool the deployed system as they are."""
    if not len(rows):
        return rows
    there = rows.to(batch.x.device)
    answer = decide_padded(victim, batch.x[there])
    return rows[answer.fooled(batch.y[there], None if target is None else target[there]).cpu()]
