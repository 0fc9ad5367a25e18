"""What a gradient attack raises and what it calls a success: a loss over classes, or similarities with texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from advplug.attacks.losses import Loss, loss_named, undetected
from advplug.errors import UsageError
from advplug.victim import Columns, Victim

SIMILARITY = "similarity"
"""The loss that is read off single texts, not off classes."""
CLEAR_LEAD = 0.05
"""Share of the logits' range; bfloat16 has 8 bits, and moves the lead of one logit by 1 to 3 % of it."""


class Aim(Protocol):
    """Loss (B,), to be raised, success (B,) bool and logits (B, K) of images (B, C, H, W) in one view of the victim.

    The loss may aim at a class, `target`, where any wrong answer is a success; `wanted` are the classes that alone
    are one, None where any is. Images beyond the labels given only fill up the pass.
    """

    def read(
        self, x: Tensor, view: int, y: Tensor, target: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def replace_loss(self, name: str) -> None:
        """Takes another loss from now on."""
        ...


@dataclass
class ByClass:
    """A loss of one logit a class."""

    victim: Victim
    loss: Loss

    def read(
        self, x: Tensor, view: int, y: Tensor, target: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, rejection = self.victim.attacked_detector(x, view)
        logits = logits[: len(y)]
        return *_guarded(self.loss(logits, y, target), hits(logits.detach(), y, wanted), rejection), logits

    def replace_loss(self, name: str) -> None:
        self.loss = loss_named(name)


@dataclass
class ByText:
    """The mean cosine of an image and its own texts falls, or that of it and the target's rises."""

    victim: Victim
    columns: Columns

    def read(
        self, x: Tensor, view: int, y: Tensor, target: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        each, rejection = self.victim.attacked_texts(x, view)
        each = each[: len(y)]
        logits = self.columns.grouped(each.detach())
        loss = self._loss(each / self.columns.scale, y, target)
        return *_guarded(loss, hits(logits, y, wanted), rejection), logits

    def replace_loss(self, name: str) -> None:
        raise UsageError(f"loss={SIMILARITY} has no {name} version")

    def deployed(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,): the loss as the deployed system scores the images."""
        return self._loss(self.victim.cosines(x), y, None)

    def _loss(self, cosines: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return -self.columns.similarity(cosines, y)
        return self.columns.similarity(cosines, target)


def aim(name: str, victim: Victim) -> Aim:
    """The aim called `name`: a loss of `losses.LOSSES`, or similarity. Raises UsageError for an unknown one, and
    where the victim knows no texts."""
    if name != SIMILARITY:
        return ByClass(victim, loss_named(name))
    if victim.columns is None:
        raise UsageError("similarities are of images and texts; attack a CLIP model, such as clip-tiny")
    return ByText(victim, victim.columns)


def _guarded(loss: Tensor, hit: Tensor, rejection: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and success, with what a detector says of the images."""
    if rejection is None:
        return loss, hit
    rejection = rejection[: len(hit)]
    return undetected(loss, rejection, hit), hit & ~(rejection.detach() > 0)


def hits(logits: Tensor, y: Tensor, wanted: Tensor | None) -> Tensor:
    """Where the answer is a success; an answer that is not finite is none of the classes."""
    label, finite = logits.argmax(1), logits.isfinite().all(1)
    return (label != y) | ~finite if wanted is None else (label == wanted) & finite


def clearly(logits: Tensor, y: Tensor, wanted: Tensor | None) -> Tensor:
    """1 where the wanted logit leads by more than reduced precision can be wrong, 0 elsewhere."""
    if wanted is None:
        lead = logits.amax(1) - logits.gather(1, y[:, None]).squeeze(1)
    else:
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        lead = own - logits.scatter(1, wanted[:, None], -float("inf")).amax(1)
    return (lead > CLEAR_LEAD * (logits.amax(1) - logits.amin(1))).to(logits.dtype)
