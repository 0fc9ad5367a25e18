"""Triggers of backdoors: what they do to images (B, C, H, W) in [0, 1], in pixel space.

Each is a callable (x, index) to images of the same shape, type and device. Fixed patterns are drawn once, from the
stream; what is drawn anew for an image follows its position `index` (B,), so nothing depends on batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from advplug.errors import UsageError
from advplug.rng import Stream
from advplug_poisoning.settings import CORNERS, TriggerSettings

Apply: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SMALLEST, SHARE = 3, 14
"""A patch is the shorter side over SHARE, as 16 of 224 (CleanCLIP), and at least SMALLEST."""


def build(settings: TriggerSettings, channels: int, size: tuple[int, int], stream: Stream) -> Apply:
    """The trigger for images (channels, *size). Raises UsageError where a patch does not fit in them."""
    if settings.kind == "sig":
        return Waves(settings.amplitude, settings.frequency)
    if settings.kind == "wanet":
        return Warp(warping_grid(size, settings.grid, settings.strength, stream.generator("grid")))
    if settings.kind == "blended":
        return Blend(_uniform((channels, *size), stream), settings.opacity, settings.fresh, stream)
    side = settings.size or max(SMALLEST, round(min(size) / SHARE))
    if settings.kind == "checker":
        at = torch.arange(side)
        pattern = ((at[:, None] + at) % 2 == 0).float().expand(channels, -1, -1)
    elif settings.kind == "random":
        pattern = _uniform((channels, side, side), stream)
    else:
        pattern = torch.ones(channels, side, side)
    corners, room = _places(settings, side, size)
    return Patch(pattern, corners, room, settings.margin, settings.opacity, settings.fresh, stream)


def drawn_anew(apply: Apply) -> Apply:
    """The same trigger for test images: what is drawn for an image is not what a training image of its number got."""
    return replace(apply, stream=apply.stream.child("test")) if isinstance(apply, Patch | Blend) else apply


def _uniform(shape: tuple[int, ...], stream: Stream) -> Tensor:
    return torch.rand(shape, generator=stream.generator("pattern"))


def _places(
    settings: TriggerSettings, side: int, size: tuple[int, int]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    """The upper left pixels (none: random) of a patch, and how many rows and columns there are for it to begin at."""
    height, width = size
    edge = 0 if settings.place == "centre" or settings.point else settings.margin
    least = side + edge * (2 if settings.place in ("random", "corners") else 1)
    if settings.point:
        row, column = settings.point
        fits = row + side <= height and column + side <= width
    else:
        fits = least <= height and least <= width
    if not fits:
        where = f"place={settings.place}" + (f" with margin={edge}" if edge else "")
        raise UsageError(
            f"ba: a patch of {side} x {side} pixels at {where} does not fit in images of {height} x {width}; "
            "lower size, or move it"
        )
    room = (height - side - 2 * edge + 1, width - side - 2 * edge + 1)
    if settings.place == "random":
        return (), room
    if settings.point:
        return (settings.point,), room
    if settings.place == "centre":
        return (((height - side) // 2, (width - side) // 2),), room
    down, right = height - side - edge, width - side - edge
    found = tuple(
        (down if name.startswith("bottom") else edge, right if name.endswith("right") else edge) for name in CORNERS
    )
    return (found if settings.place == "corners" else (found[CORNERS.index(settings.place)],)), room


@dataclass(frozen=True, eq=False)
class Patch:
    """`pattern` (C, S, S) over the pixels from each of `corners` (row, column) on, or from one that is drawn for each
    image, of `room` rows and columns behind `margin`.

    With `fresh` the pattern is normal noise of standard deviation 1 about the image's mean by channel, cut to [0, 1]
    (Bansal et al. 2023, arXiv 2303.03323, their code).
    """

    pattern: Tensor
    corners: tuple[tuple[int, int], ...]
    room: tuple[int, int]
    margin: int
    opacity: float
    fresh: bool
    stream: Stream

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        made, side = x.clone(), self.pattern.shape[-1]
        pattern = self._patterns(x, index)
        image, steps = torch.arange(len(x))[:, None, None], torch.arange(side)
        for corner in self._corners(index):
            rows, columns = (corner[:, axis, None] + steps for axis in (0, 1))
            at = (image, slice(None), rows[:, :, None], columns[:, None, :])
            # Indices on both sides of the channels put these last: (B, S, S, C).
            made[at] = (1 - self.opacity) * x[at] + self.opacity * pattern.movedim(1, 3)
        return made

    def _patterns(self, x: Tensor, index: Tensor) -> Tensor:
        """(B, C, S, S)."""
        if not self.fresh:
            return self.pattern.to(x).expand(len(x), -1, -1, -1)
        shape = self.pattern.shape
        noise = self.stream.per_image(lambda g: torch.randn(shape, generator=g), index, "noise")
        return (x.mean((2, 3), keepdim=True) + noise.to(x)).clamp(0, 1)

    def _corners(self, index: Tensor) -> list[Tensor]:
        """Upper left pixels (B, 2), once for each patch of an image."""
        if self.corners:
            return [torch.tensor(corner).expand(len(index), 2) for corner in self.corners]
        room = torch.tensor(self.room)
        drawn = self.stream.per_image(lambda g: torch.rand(2, generator=g, dtype=torch.float64), index, "place")
        return [self.margin + (drawn * room).long()]


@dataclass(frozen=True, eq=False)
class Blend:
    """(1 - opacity) x + opacity pattern, with `pattern` (C, H, W) uniform in [0, 1], or drawn for each image.

    Chen et al. 2017, arXiv 1712.05526.
    """

    pattern: Tensor
    opacity: float
    fresh: bool
    stream: Stream

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        pattern = self.pattern
        if self.fresh:
            shape = pattern.shape
            pattern = self.stream.per_image(lambda g: torch.rand(shape, generator=g), index, "noise")
        return (1 - self.opacity) * x + self.opacity * pattern.to(x)


@dataclass(frozen=True)
class Waves:
    """x + amplitude sin(2 pi frequency j / W) in column j of W, cut to [0, 1] (Barni et al. 2019, 1902.11237)."""

    amplitude: float
    frequency: float

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        width = x.shape[3]
        phase = torch.arange(width, dtype=torch.float64) * (2 * math.pi * self.frequency / width)
        return (x + (self.amplitude * phase.sin()).to(x)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Warp:
    """Images read, bilinearly, at the points `grid` (H, W, 2): x and y from -1 to 1, the centres of the edge pixels.

    Nguyen and Tran 2021, arXiv 2102.10369.
    """

    grid: Tensor

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        grid = self.grid.to(x).expand(len(x), -1, -1, -1)
        return functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)


def warping_grid(size: tuple[int, int], points: int, strength: float, draws: torch.Generator) -> Tensor:
    """Where each pixel is read, (H, W, 2): `points` x `points` displacements of mean size 1, between them bicubic,
    times `strength` over the side in pixels, as in the authors' code."""
    height, width = size
    field = torch.rand(1, 2, points, points, generator=draws) * 2 - 1
    field = functional.interpolate(field / field.abs().mean(), size, mode="bicubic", align_corners=True)
    y, x = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in size)
    identity = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return (identity + strength * field[0].permute(1, 2, 0) / torch.tensor([width, height])).clamp(-1, 1)
