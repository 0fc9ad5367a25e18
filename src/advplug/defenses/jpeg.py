"""JPEG compression: Pillow's, and a differentiable one for attackers.

The differentiable one follows the standard (ITU-T T.81): YCbCr, chroma averaged over `subsampling`, DCT of 8x8 blocks,
division by the quantisation tables, rounding, and back. Rounding has a stand-in (Shin and Song 2017).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from advplug.defenses.inputs import carried
from advplug.errors import CellFailure

Rounding: TypeAlias = Callable[[Tensor], Tensor]

SUBSAMPLING: dict[str, tuple[int, int]] = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}
"""Rows and columns of pixels that share one value of chroma."""

TILT = 1 / 64
"""Less than the distance between sums of bytes over 4 or 16, which chroma is made of."""

_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99,
) + (99,) * 32  # fmt: skip


def tables(quality: int) -> tuple[Tensor, Tensor]:
    """The quantisation tables of luminance and chrominance, (8, 8) each: T.81 annex K, scaled as libjpeg does.

    `quality` runs from 1 to 100; 50 gives the tables as they are printed.
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = [((torch.tensor(t) * percent + 50) // 100).clamp(1, 255).view(8, 8) for t in (_LUMINANCE, _CHROMINANCE)]
    return scaled[0], scaled[1]


def compress(x: Tensor, quality: int, subsampling: str) -> Tensor:
    """Images (B, 1 or 3, H, W) in [0, 1] after Pillow's JPEG; pixels are rounded to 8 bits first. No gradient.

    An image with a pixel that is no number comes back as such. Raises CellFailure for other counts of channels.
    """
    check_channels(x)
    sound = x.detach().isfinite().flatten(1).all(1)
    pixels = x.detach().nan_to_num(0.0).clamp(0, 1).mul(255).round().to("cpu", torch.uint8).movedim(1, 3).numpy()
    made = np.stack([_decoded(_encoded(image, quality, subsampling)) for image in pixels]) if len(x) else pixels
    back = torch.from_numpy(made).movedim(3, 1).to(x) / 255
    return torch.where(sound.view(-1, 1, 1, 1), back, torch.full_like(back, torch.nan))


def _encoded(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int, subsampling: str) -> bytes:
    made = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    if made.mode == "L":  # no chroma to share
        made.save(buffer, "JPEG", quality=quality)
    else:
        made.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _decoded(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def soft_round(v: Tensor) -> Tensor:
    """round(v) + (v - round(v))^3: at most 1/8 from the true value, with slope 3 (v - round(v))^2, 0 at integers."""
    whole = v.detach().round()
    return whole + (v - whole) ** 3


def whole(v: Tensor) -> Tensor:
    """round(v) with the identity's gradient."""
    return carried(v.round(), v)


def differentiable(
    x: Tensor, quality: int, subsampling: str, rounding: Rounding = soft_round, whole: Rounding = whole
) -> Tensor:
    """JPEG of images (B, 1 or 3, H, W) in [0, 1], of any size, with `rounding` of the DCT's quantised coefficients.

    `whole` rounds the values between the steps, which are bytes. Raises CellFailure for other counts of channels.
    """
    check_channels(x)
    luminance, chrominance = (t.to(x) for t in tables(quality))

    def plane(values: Tensor, table: Tensor) -> Tensor:
        return whole(_quantised(whole(values), table, rounding))

    pixels = whole(x * 255)
    if x.shape[1] == 1:
        return (plane(pixels - 128, luminance) + 128).clamp(0, 255) / 255
    y, cb, cr = (band[:, None] for band in whole(_to_ycbcr(pixels)).unbind(1))
    y = plane(y - 128, luminance) + 128
    factor = SUBSAMPLING[subsampling]
    shared = [plane(_shared(c, factor), chrominance) for c in (cb, cr)]
    chroma = [whole(_upsampled(c, factor, y)) for c in shared]
    return (whole(_to_rgb(torch.cat([y, *chroma], 1))) / 255).clamp(0, 1)


def check_channels(x: Tensor) -> None:
    """Raises CellFailure where images are neither grey nor in colour."""
    if x.shape[1] not in (1, 3):
        raise CellFailure(f"jpeg takes images of 1 or 3 channels, these have {x.shape[1]}; use denoise or bit-depth")


# --- the steps -------------------------------------------------------------------------------------


def _quantised(plane: Tensor, table: Tensor, rounding: Rounding) -> Tensor:
    """A plane (B, 1, H, W) around 0, to blocks, to rounded coefficients and back; edges are repeated."""
    height, width = plane.shape[2:]
    wide = _filled(plane, 8, 8)
    rows, columns = wide.shape[2] // 8, wide.shape[3] // 8
    blocks = wide.view(-1, rows, 8, columns, 8).transpose(2, 3)
    dct = _dct().to(plane)
    coefficients = rounding(dct @ blocks @ dct.T / table) * table
    back = (dct.T @ coefficients @ dct).transpose(2, 3).reshape(-1, 1, rows * 8, columns * 8)
    return back[:, :, :height, :width]


def _filled(plane: Tensor, rows: int, columns: int) -> Tensor:
    """The plane with its last row and column repeated up to multiples of `rows` and `columns`."""
    return functional.pad(plane, (0, -plane.shape[3] % columns, 0, -plane.shape[2] % rows), mode="replicate")


def _shared(plane: Tensor, factor: tuple[int, int]) -> Tensor:
    """The means of `factor` pixels, around 0 as chroma is."""
    return _leaning(functional.avg_pool2d(_filled(plane, *factor), factor), down=0) if factor != (1, 1) else plane


def _upsampled(plane: Tensor, factor: tuple[int, int], like: Tensor) -> Tensor:
    """Chroma at full size; libjpeg's decoder weighs the nearer value by 3/4, as linear interpolation does."""
    if factor == (1, 1):
        return plane
    size = [side * times for side, times in zip(plane.shape[2:], factor, strict=True)]
    wide = functional.interpolate(plane, size=size, mode="bilinear", align_corners=False)
    return _leaning(wide[:, :, : like.shape[2], : like.shape[3]], down=factor[0] - 1)


def _leaning(values: Tensor, down: int) -> Tensor:
    """Halves lean to be rounded down in every second column from `down` on and up in the others, as in libjpeg."""
    odd = (torch.arange(values.shape[3], device=values.device) + down) % 2
    return values + TILT * (2 * odd - 1)


def _to_ycbcr(rgb: Tensor) -> Tensor:
    """(B, 3, H, W): JFIF's luminance from 0 to 255 and chroma around 0."""
    r, g, b = rgb.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772, (r - y) / 1.402], 1)


def _to_rgb(ycbcr: Tensor) -> Tensor:
    y, cb, cr = ycbcr.unbind(1)
    r, b = y + 1.402 * cr, y + 1.772 * cb
    return torch.stack([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], 1)


@cache
def _dct() -> Tensor:
    """The orthonormal DCT-II as a matrix (8, 8), float64."""
    k = torch.arange(8, dtype=torch.float64)
    made = torch.cos((2 * k[None, :] + 1) * k[:, None] * math.pi / 16) / 2
    made[0] /= math.sqrt(2)
    return made
