"""Losses per image, to be maximised by an attack; one table, open for additions.

Every loss takes logits (B, K), labels (B,) and targets (B,) or None, and returns (B,). With targets it
grows as the answer nears the target; without, as it leaves the label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from advplug.errors import CellFailure, UsageError, did_you_mean

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_FLOOR = 1e-12


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of the label, or minus that of the target."""
    if target is None:
        return functional.cross_entropy(logits, y, reduction="none")
    return -functional.cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The best other logit less the label's, or the target's less the best other: positive once fooled."""
    wanted = y if target is None else target
    own = _pick(logits, wanted)
    other = logits.scatter(1, wanted[:, None], -float("inf")).amax(1)
    return other - own if target is None else own - other


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, arXiv 2003.01690, eq. 6; targeted: eq. 7).

    Invariant to shifts and scales of the logits. Raises CellFailure below 3 classes (targeted: 4).
    """
    need = 3 if target is None else 4
    if logits.shape[1] < need:
        kind = "the dlr loss" if target is None else "the targeted dlr loss"
        raise CellFailure(f"{kind} needs at least {need} classes, the model has {logits.shape[1]}; use loss=margin")
    top = logits.topk(need, dim=1).values
    own = _pick(logits, y)
    if target is None:
        # The best other logit is the first, or the second where the first is the label's own.
        other = logits.scatter(1, y[:, None], -float("inf")).amax(1)
        return -(own - other) / (top[:, 0] - top[:, 2]).clamp_min(_FLOOR)
    return -(own - _pick(logits, target)) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])).clamp_min(_FLOOR)


def undetected(loss: Tensor, rejection: Tensor, hit: Tensor) -> Tensor:
    """`loss` (B,) until an image is wrong, as `hit` says; then the better the less a detector's `rejection` notices.

    A sum of both leaves the image wrong and noticed where the loss goes on growing (selective gradients: Bryniarski
    et al. 2021, arXiv 2106.15023). Both are squeezed into (-1, 1), for what is wrong to count for more than all that
    is not.
    """
    return torch.where(hit, 2 - functional.softsign(rejection), functional.softsign(loss))


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def loss_named(name: str) -> Loss:
    """The loss of that name. Raises UsageError for an unknown one."""
    if name not in LOSSES:
        hint = did_you_mean(name, LOSSES) or f"; choose from {', '.join(LOSSES)}"
        raise UsageError(f"no loss is called '{name}'{hint}")
    return LOSSES[name]


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)
