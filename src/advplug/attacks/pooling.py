"""One loss and one gradient from several draws of an image's answers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advplug.ball import columns


class Draws:
    """Takes readings draw by draw, and holds what they say together.

    The mean of the losses (Athalye et al. 2018, arXiv 1707.07397), or, where asked for `standing`, the loss of the
    mean probability: of cross-entropy, -log mean p = -log mean exp(-loss) (Salman et al. 2019, arXiv 1906.04584,
    section 2.2), and the same of other losses. The mean goes on raising the loss of draws that are wrong already, at
    the cost of those that still stand; the latter weighs each by how far it stands.
    """

    def __init__(self, standing: bool) -> None:
        self.standing = standing
        self.count = 0
        self._loss: Tensor | None = None
        self._gradient: Tensor | None = None
        self._votes: Tensor | None = None

    def add(self, loss: Tensor, votes: Tensor, gradient: Tensor) -> None:
        """Loss and success (B,) of one draw, and the gradient (B, C, H, W) of the loss."""
        self.count += 1
        if self._loss is None or self._gradient is None or self._votes is None:
            self._loss, self._votes, self._gradient = loss, votes, gradient
            return
        self._votes = self._votes + votes
        if not self.standing:
            self._loss, self._gradient = self._loss + loss, self._gradient + gradient
            return
        # Of two draws that are lost beyond all numbers, each counts for half.
        share = torch.sigmoid(self._loss - loss).nan_to_num(0.5)
        self._gradient = torch.lerp(self._gradient, gradient, columns(share, gradient).to(gradient.dtype))
        self._loss = -torch.logaddexp(-self._loss, -loss)

    def together(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, share of draws that succeed, gradient)."""
        assert self._loss is not None
        assert self._gradient is not None
        assert self._votes is not None
        if self.standing:
            return self._loss + math.log(self.count), self._votes / self.count, self._gradient
        if self.count == 1:
            return self._loss, self._votes, self._gradient
        return self._loss / self.count, self._votes / self.count, self._gradient / self.count
