"""Smoothing filters on images (B, C, H, W), differentiable wherever the filter is; borders are mirrored.

A mirrored border repeats the edge (d c b a | a b c d | d c b a), as SciPy's `reflect` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Weight: TypeAlias = Callable[[Tensor, int, int], Tensor]
"""(mean squared differences (B, 1, H, W), rows down, columns right) to the weights of the pixels there."""
Row: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]

TRUNCATE = 4.0
"""Standard deviations after which a Gaussian kernel ends."""


def mirrored(x: Tensor, before: int, after: int) -> Tensor:
    """`x` with so many rows and columns more in front and behind, as many as wanted."""
    for dim in (2, 3):
        side = x.shape[dim]
        place = torch.arange(-before, side + after) % (2 * side)
        x = x.index_select(dim, torch.minimum(place, 2 * side - 1 - place).to(x.device))
    return x


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Convolution with a Gaussian of standard deviation `sigma` pixels, cut off at 4 of them."""
    reach = int(TRUNCATE * sigma + 0.5)
    place = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = mirrored(x, reach, reach).flatten(0, 1)[:, None]
    down = functional.conv2d(flat, kernel.view(1, 1, -1, 1))
    return functional.conv2d(down, kernel.view(1, 1, 1, -1)).view_as(x)


def mean(x: Tensor, window: int) -> Tensor:
    """The mean of the `window` x `window` pixels around each; even windows reach one further up and left."""
    before = window // 2
    return functional.avg_pool2d(mirrored(x, before, window - 1 - before), window, 1)


def median(x: Tensor, window: int) -> Tensor:
    """The median of the `window` x `window` pixels around each; even windows reach one further up and left.

    Of an even number the upper of the two in the middle. The gradient goes to the pixel that was picked.
    """
    before = window // 2
    patches = mirrored(x, before, window - 1 - before).unfold(2, window, 1).unfold(3, window, 1).flatten(4)
    return patches.kthvalue(window * window // 2 + 1, dim=4).values


def bilateral(x: Tensor, sigma: float, spread: float, window: int, detached: bool = False) -> Tensor:
    """The bilateral filter (Tomasi and Manduchi 1998): Gaussian weights of distance and of difference in colour.

    `sigma` is in pixels, `spread` in units of a pixel's value: the standard deviation of the Euclidean distance
    between colours. `window` is odd. With `detached` the weights pass no gradient.
    """

    def weight(difference: Tensor, down: int, right: int) -> Tensor:
        near = (down**2 + right**2) / (2 * sigma**2)
        return torch.exp(-difference * x.shape[1] / (2 * spread**2) - near)

    return averaged(x, window // 2, 1, weight, detached)


def nlm(x: Tensor, patch: int, window: int, strength: float) -> Tensor:
    """Non-local means (Buades et al. 2005): pixels weigh exp(-d / strength^2), d being the mean squared difference of
    the `patch` x `patch` pixels around both, over all channels; `patch` and `window` are odd."""

    def weight(difference: Tensor, down: int, right: int) -> Tensor:
        return torch.exp(-difference / strength**2)

    return averaged(x, window // 2, patch, weight)


def averaged(x: Tensor, reach: int, patch: int, weight: Weight, detached: bool = False) -> Tensor:
    """The weighted mean of all pixels at most `reach` rows and columns away."""
    margin = patch // 2
    wide = mirrored(x, reach + margin, reach + margin)
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for down in range(-reach, reach + 1):
        row = partial(_row, size=x.shape[2:], reach=reach, down=down, patch=patch, weight=weight, detached=detached)
        part, mass = _Again.apply(wide, row)  # type: ignore[no-untyped-call]
        total, weights = total + part, weights + mass
    return total / weights


class _Again(torch.autograd.Function):
    """A function of one tensor that is computed again for its gradient: all rows of a window would fill the memory."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, row: Row) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(wide)
        ctx.row = row
        return row(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.row(leaf)
        used = [(m, g) for m, g in zip(made, gradients, strict=True) if m.requires_grad]
        (back,) = torch.autograd.grad([m for m, _ in used], leaf, [g for _, g in used])
        return back, None


def _row(
    wide: Tensor, size: torch.Size, reach: int, down: int, patch: int, weight: Weight, detached: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum (B, C, H, W) and the weights (B, 1, H, W) of the pixels `down` rows below."""
    height, width = size
    margin = patch // 2

    def cut(top: int, left: int) -> Tensor:
        return wide[:, :, top : top + height + 2 * margin, left : left + width + 2 * margin]

    centre, terms, masses = cut(reach, reach), [], []
    for right in range(-reach, reach + 1):
        other = cut(reach + down, reach + right)
        difference = functional.avg_pool2d(((other - centre) ** 2).mean(1, keepdim=True), patch, 1)
        mass = weight(difference, down, right)
        mass = mass.detach() if detached else mass
        masses.append(mass)
        terms.append(mass * other[:, :, margin : margin + height, margin : margin + width])
    return torch.stack(terms).sum(0), torch.stack(masses).sum(0)


def tv(x: Tensor, strength: float, steps: int) -> Tensor:
    """The image u in [0, 1] that minimises |u - x|^2 / 2 + strength TV(u), TV isotropic, each channel by itself.

    `steps` of the fast gradient projection of the dual problem (Beck and Teboulle 2009, "Fast gradient-based
    algorithms for constrained total variation image denoising").
    """
    down, right = x.new_zeros(x.shape), x.new_zeros(x.shape)
    ahead, t = (down, right), 1.0
    for _ in range(steps):
        u = _primal(x, strength, *ahead)
        new = [r + g / (8 * strength) for r, g in zip(ahead, _differences(u), strict=True)]
        length = (new[0] ** 2 + new[1] ** 2).clamp_min(1).sqrt()
        before, (down, right) = (down, right), (new[0] / length, new[1] / length)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        pull = (last - 1) / t
        ahead = (down + pull * (down - before[0]), right + pull * (right - before[1]))
    return _primal(x, strength, down, right)


def _primal(x: Tensor, strength: float, down: Tensor, right: Tensor) -> Tensor:
    """What the dual variables stand for; they are 0 in the last row or column."""
    spread = down - functional.pad(down[:, :, :-1], (0, 0, 1, 0)) + right - functional.pad(right[..., :-1], (1, 0))
    return (x - strength * spread).clamp(0, 1)


def _differences(u: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel less the one below, and less the one to its right; 0 at the end."""
    down = functional.pad(u[:, :, :-1] - u[:, :, 1:], (0, 0, 0, 1))
    return down, functional.pad(u[..., :-1] - u[..., 1:], (0, 1))
