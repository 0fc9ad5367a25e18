"""What the Square attack writes: windows of images under attack, and each norm's way to start and to propose.

Source: Andriushchenko et al. 2019, arXiv 1912.00049.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from advplug.ball import columns, size

_TINY = 1e-30


@dataclass(frozen=True)
class Piece:
    """Pixels to write: flat positions in the images under attack, what is there and what is tried, all (m, k)."""

    where: Tensor
    old: Tensor
    new: Tensor


@dataclass
class Canvas:
    """Images under attack, `x` (n, C, H, W), beside the clean ones: slot i belongs to clean image `row[i]`."""

    x: Tensor
    clean: Tensor
    row: Tensor
    patterns: dict[int, Tensor] = field(default_factory=dict)

    def corner(self, uniform: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Top and left (m,) of windows placed by uniform numbers (m, 2), each place as likely as any other."""
        height, width = self.x.shape[2:]
        room = torch.tensor([height - side + 1, width - side + 1], device=uniform.device)
        # A float32 just below 1, times the room, may round up to it.
        place = torch.minimum((uniform * room).long(), room - 1)
        return place[:, 0], place[:, 1]

    def window(self, slots: slice, top: Tensor, left: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Flat positions (m, C * side * side) of the windows' pixels: among the images, among the clean ones."""
        channels, height, width = self.x.shape[1:]
        if side not in self.patterns:
            step = torch.arange(side, device=self.x.device)
            plane = torch.arange(channels, device=self.x.device) * (height * width)
            self.patterns[side] = (plane[:, None, None] + step[:, None] * width + step).flatten()
        each = channels * height * width
        slot = torch.arange(slots.start, slots.stop, device=self.x.device)
        inner = top * width + left
        pattern = self.patterns[side]
        return (slot * each + inner)[:, None] + pattern, (self.row[slots] * each + inner)[:, None] + pattern

    def at(self, where: Tensor) -> Tensor:
        # Several times as fast as indexing.
        return self.x.view(-1).index_select(0, where.flatten()).view_as(where)

    def clean_at(self, where: Tensor) -> Tensor:
        return self.clean.view(-1).index_select(0, where.flatten()).view_as(where)

    def put(self, where: Tensor, values: Tensor) -> None:
        self.x.view(-1).scatter_(0, where.flatten(), values.flatten())


class Moves(Protocol):
    """A norm's way to start and to propose; `numbers` uniform numbers are drawn an image and iteration."""

    def numbers(self, channels: int) -> int: ...
    def start(self, clean: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """First points for clean images (m, C, H, W); `draw(shape)` gives uniform numbers (m, *shape)."""
        ...

    def side(self, share: float, height: int, width: int) -> int: ...
    def propose(
        self, canvas: Canvas, slots: slice, uniform: Tensor, side: int, energy: Tensor
    ) -> tuple[list[Piece], Tensor]:
        """What to write, in this order, and the energy (m,) of the images afterwards."""
        ...


@dataclass(frozen=True)
class LinfMoves:
    """Windows of one colour: each channel at the clean pixels plus or minus eps."""

    eps: float

    def numbers(self, channels: int) -> int:
        return 2 + channels

    def start(self, clean: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Vertical stripes, one pixel wide."""
        stripes = _signs(draw((clean.shape[1], 1, clean.shape[3]))).to(clean.dtype)
        return (clean + self.eps * stripes).clamp_(0, 1)

    def side(self, share: float, height: int, width: int) -> int:
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def propose(
        self, canvas: Canvas, slots: slice, uniform: Tensor, side: int, energy: Tensor
    ) -> tuple[list[Piece], Tensor]:
        where, there = canvas.window(slots, *canvas.corner(uniform[:, :2], side), side)
        change = self.eps * _signs(uniform[:, 2:]).to(canvas.x.dtype)
        new = canvas.clean_at(there).view(*change.shape, -1).add_(change[..., None]).clamp_(0, 1)
        return [Piece(where, canvas.at(where), new.view_as(where))], energy


@dataclass(frozen=True)
class L2Moves:
    """Bumps of both signs that take their energy from another window (algorithm 3).

    The second window is cleaned; the first gets its energy, its own and what of the budget lay idle.
    """

    eps: float
    bumps: dict[int, Tensor] = field(default_factory=dict)

    def numbers(self, channels: int) -> int:
        return 5 + channels

    def start(self, clean: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """A grid of 5 x 5 bumps of random sign and direction, of length eps in all."""
        n, channels, height, width = clean.shape
        side = max(min(height, width) // 5, 1)
        rows, cols = min(5, height // side), min(5, width // side)
        signs = _signs(draw((channels, rows, cols))).to(clean.dtype)
        turned = draw((1, rows, cols))[..., None, None] < 0.5
        bump = self._bump(side, clean)
        tiles = torch.where(turned, bump, bump.T) * signs[..., None, None]
        change = torch.zeros_like(clean)
        top, left = (height - rows * side) // 2, (width - cols * side) // 2
        grid = tiles.transpose(3, 4).reshape(n, channels, rows * side, cols * side)
        change[:, :, top : top + rows * side, left : left + cols * side] = grid
        return (clean + change * columns(self.eps / size(change, "l2").clamp_min(_TINY), clean)).clamp_(0, 1)

    def side(self, share: float, height: int, width: int) -> int:
        odd = max(round(math.sqrt(share * height * width)), 3) | 1
        return min(odd, height, width)

    def propose(
        self, canvas: Canvas, slots: slice, uniform: Tensor, side: int, energy: Tensor
    ) -> tuple[list[Piece], Tensor]:
        top, left = canvas.corner(uniform[:, :2], side)
        from_top, from_left = canvas.corner(uniform[:, 2:4], side)
        at1, there1 = canvas.window(slots, top, left, side)
        at2, there2 = canvas.window(slots, from_top, from_left, side)
        old1, clean1 = canvas.at(at1), canvas.clean_at(there1)
        old2, clean2 = canvas.at(at2), canvas.clean_at(there2)
        wide = (len(at1), canvas.x.shape[1], side, side)
        change1, change2 = (old1 - clean1).view(wide), (old2 - clean2).view(wide)
        change2 = change2 * ~_overlap(from_top - top, from_left - left, side)
        own, taken = _energy(change1), _energy(change2)
        idle = (self.eps**2 - energy).clamp_min(0)[:, None] / wide[1]
        new = self._bent(change1, own, uniform[:, 4], uniform[:, 5:]) * (own + taken + idle).sqrt()[..., None, None]
        new1 = (clean1 + new.view_as(clean1)).clamp_(0, 1)
        kept = energy - (own + taken).sum(1) + _energy((new1 - clean1).view(wide)).sum(1)
        return [Piece(at2, old2, clean2), Piece(at1, old1, new1)], kept

    def _bent(self, change: Tensor, own: Tensor, turn: Tensor, signs: Tensor) -> Tensor:
        """The windows' directions (m, C, side, side) of length 1: the present one plus a bump of random sign."""
        bump = self._bump(change.shape[-1], change)
        shape = torch.where(turn[:, None, None, None] < 0.5, bump, bump.T)
        bent = shape * _signs(signs).to(change.dtype)[..., None, None]
        bent = bent + change / own.sqrt().clamp_min(_TINY)[..., None, None]
        length: Tensor = torch.linalg.vector_norm(bent, dim=(2, 3), keepdim=True)
        return bent / length.clamp_min(_TINY)

    def _bump(self, side: int, like: Tensor) -> Tensor:
        if side not in self.bumps:
            self.bumps[side] = two_bumps(side).to(like)
        return self.bumps[side]


def two_bumps(side: int) -> Tensor:
    """A bump beside its negative, (side, side), float64, of length 1."""

    def bump(height: int, width: int) -> Tensor:
        n = max(height, width) // 2
        down = (torch.arange(height) - height // 2).abs()[:, None]
        ring = torch.maximum(down, (torch.arange(width) - width // 2).abs())
        # A pixel gets the sum of 1 / (j + 1)^2 from its own ring j out to the last one, n.
        parts = 1 / torch.arange(1, n + 2, dtype=torch.float64) ** 2
        tail = torch.cat([parts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return tail[ring.clamp_max(n + 1)]

    half = side // 2
    both = torch.cat([bump(side, half), -bump(side, side - half)], 1)
    unit: Tensor = both / torch.linalg.vector_norm(both)
    return unit


def _overlap(down: Tensor, right: Tensor, side: int) -> Tensor:
    """(m, 1, side, side): the pixels of a window that another one covers, from which it is moved by so much."""
    step = torch.arange(side, device=down.device)
    rows, cols = (step + down[:, None]), (step + right[:, None])
    return (((rows >= 0) & (rows < side))[:, :, None] & ((cols >= 0) & (cols < side))[:, None])[:, None]


def _energy(change: Tensor) -> Tensor:
    """The squares of each channel added up, (m, C)."""
    return change.square().sum((2, 3))


def _signs(uniform: Tensor) -> Tensor:
    return 1 - 2 * (uniform < 0.5).int()


MOVES: dict[str, Callable[[float], Moves]] = {"linf": LinfMoves, "l2": L2Moves}
