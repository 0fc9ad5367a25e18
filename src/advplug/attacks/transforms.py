"""Random image transformations for expectation over transformations (EOT; Athalye et al. 2017, 1707.07397).

Each draws one small tensor of values per image and applies it differentiably; ranges are parameters.
A stack is written `rotation:degrees=15+noise:sigma=0.05`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from advplug.contracts import Param, Stack
from advplug.errors import UsageError, did_you_mean
from advplug.params import ParamSpec, bind, params_of


class Transform(Protocol):
    """`draw` samples one image's values; `apply` transforms (B, C, H, W) images by (B, ...) values."""

    def draw(self, generator: torch.Generator, shape: torch.Size) -> Tensor: ...
    def apply(self, x: Tensor, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Values:
    """A transform whose values are `count` numbers, uniform in [-1, 1]."""

    change: Callable[[Tensor, Tensor], Tensor]
    count: int = 1

    def draw(self, generator: torch.Generator, shape: torch.Size) -> Tensor:
        return torch.rand(self.count, generator=generator, dtype=torch.float64) * 2 - 1

    def apply(self, x: Tensor, values: Tensor) -> Tensor:
        return self.change(x, values.to(device=x.device, dtype=x.dtype))


@dataclass(frozen=True)
class _Noise:
    sigma: float

    def draw(self, generator: torch.Generator, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def apply(self, x: Tensor, values: Tensor) -> Tensor:
        return x + self.sigma * values.to(device=x.device, dtype=x.dtype)


def brightness(
    limit: Annotated[float, Param("largest change of all pixels, up or down", gt=0, le=1)] = 0.2,
) -> Transform:
    """Adds one number to all pixels."""
    return _Values(lambda x, v: x + limit * v[:, :1, None, None])


def contrast(
    limit: Annotated[float, Param("largest relative change of the distance to the mean", gt=0, lt=1)] = 0.2,
) -> Transform:
    """Scales the distance of the pixels to their image's mean."""

    def change(x: Tensor, v: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (x - mean) * (1 + limit * v[:, :1, None, None])

    return _Values(change)


def noise(sigma: Annotated[float, Param("standard deviation in pixel units", gt=0, le=1)] = 0.05) -> Transform:
    """Adds Gaussian noise."""
    return _Noise(sigma)


def rotation(degrees: Annotated[float, Param("largest angle, either way", gt=0, le=180)] = 15.0) -> Transform:
    """Rotates about the centre, bilinear, zero outside."""

    def change(x: Tensor, v: Tensor) -> Tensor:
        angle = v[:, 0] * math.radians(degrees)
        cos, sin = angle.cos(), angle.sin()
        ratio = x.shape[2] / x.shape[3]
        return _affine(x, (cos, -sin * ratio, sin / ratio, cos), (0 * cos, 0 * cos))

    return _Values(change)


def translation(pixels: Annotated[float, Param("largest shift along each axis", gt=0)] = 3.0) -> Transform:
    """Shifts by fractions of pixels, bilinear, zero outside."""

    def change(x: Tensor, v: Tensor) -> Tensor:
        one, zero = torch.ones_like(v[:, 0]), torch.zeros_like(v[:, 0])
        shift = (2 * pixels * v[:, 0] / x.shape[3], 2 * pixels * v[:, 1] / x.shape[2])
        return _affine(x, (one, zero, zero, one), shift)

    return _Values(change, 2)


def scale(limit: Annotated[float, Param("largest relative change of size", gt=0, lt=1)] = 0.1) -> Transform:
    """Zooms about the centre, bilinear, zero outside."""

    def change(x: Tensor, v: Tensor) -> Tensor:
        factor = 1 / (1 + limit * v[:, 0])
        return _affine(x, (factor, 0 * factor, 0 * factor, factor), (0 * factor, 0 * factor))

    return _Values(change)


def resize_pad(low: Annotated[float, Param("smallest size, relative", gt=0, le=1)] = 0.9) -> Transform:
    """Shrinks and puts the image at a random place on black (Xie et al. 2018, arXiv 1711.01991)."""

    def change(x: Tensor, v: Tensor) -> Tensor:
        size = low + (1 - low) * (v[:, 0] + 1) / 2
        factor, room = 1 / size, 1 - size
        shift = (factor * room * v[:, 1], factor * room * v[:, 2])
        return _affine(x, (factor, 0 * factor, 0 * factor, factor), shift)

    return _Values(change, 3)


def blur(sigma: Annotated[float, Param("largest standard deviation in pixels", gt=0, le=16)] = 1.0) -> Transform:
    """Gaussian blur with a standard deviation between 0 and `sigma`."""
    reach = math.ceil(3 * sigma)

    def change(x: Tensor, v: Tensor) -> Tensor:
        width = (sigma * (v[:, :1] + 1) / 2).clamp_min(1e-3)
        at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (at / width) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None]
        # One group an image and channel, so that every image has a kernel of its own.
        padded = functional.pad(x, (reach,) * 4, mode="replicate")
        flat = padded.reshape(1, -1, *padded.shape[2:])
        flat = functional.conv2d(flat, kernel[:, :, :, None], groups=len(kernel))
        return functional.conv2d(flat, kernel[:, :, None, :], groups=len(kernel)).view_as(x)

    return _Values(change)


def _affine(x: Tensor, matrix: tuple[Tensor, ...], shift: tuple[Tensor, Tensor]) -> Tensor:
    """Samples x at matrix @ place - shift, in coordinates from -1 to 1 (width first)."""
    a, b, c, d = matrix
    theta = torch.stack([torch.stack([a, b, -shift[0]], 1), torch.stack([c, d, -shift[1]], 1)], 1)
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


TRANSFORMS: Mapping[str, Callable[..., Transform]] = {
    "brightness": brightness,
    "contrast": contrast,
    "noise": noise,
    "rotation": rotation,
    "translation": translation,
    "scale": scale,
    "resize-pad": resize_pad,
    "blur": blur,
}


@functools.cache
def _specs(name: str) -> tuple[ParamSpec, ...]:
    return params_of(TRANSFORMS[name])


def build(stack: Stack | None) -> tuple[Transform, ...]:
    """The transforms of a stack, in written order. Raises UsageError for an unknown name or parameter."""
    made = []
    for part in stack or ():
        if part.name not in TRANSFORMS:
            hint = did_you_mean(part.name, TRANSFORMS) or f"; choose from {', '.join(TRANSFORMS)}"
            raise UsageError(f"no transform is called '{part.name}'{hint}")
        bound: dict[str, Any] = bind(_specs(part.name), part, f"transform '{part.name}'")
        made.append(TRANSFORMS[part.name](**bound))
    return tuple(made)


def sample(
    transforms: Sequence[Transform],
    shape: torch.Size,
    per_image: Callable[[Callable[[torch.Generator], Tensor], int], Tensor],
) -> list[Tensor]:
    """One draw of every transform's values; `per_image(draw, position)` stacks a draw over the images."""
    return [per_image(lambda g, t=t: t.draw(g, shape), i) for i, t in enumerate(transforms)]  # type: ignore[misc]


def apply(transforms: Sequence[Transform], x: Tensor, values: Sequence[Tensor]) -> Tensor:
    """x after all transforms, differentiable; clipped to [0, 1] with the gradient passed through.

    Clipping with its own gradient would hide saturated pixels from the attack.
    """
    for transform, drawn in zip(transforms, values, strict=True):
        x = transform.apply(x, drawn)
    return x + (x.clamp(0, 1) - x).detach()
