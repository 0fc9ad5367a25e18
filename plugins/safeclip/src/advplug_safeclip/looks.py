"""Random views of images, drawn for a whole batch at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from advplug_clip.finetune_losses import WEAKEST, blurred
from advplug_safeclip.settings import Views

ASPECT = 4 / 3
"""Widest shape of a crop, and the inverse of the narrowest, as torchvision's random crops have it."""
LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue add to brightness (ITU-R BT.601)."""


def view(x: Tensor, how: Views, draws: torch.Generator) -> Tensor:
    """Views (B, 3, H, W) in [0, 1] of images (B, 3, H, W); draws come from `draws`, a generator on the CPU.

    `crop` is the least share of the area that a view shows, scaled to the image's size (1: all of it); `flip` mirrors
    half of the views. A share `jitter` of the views changes its colours: factors of brightness, contrast and
    saturation are uniform in 1 - `colour` to 1 + `colour`, hues turn by up to `hue` of a full turn. A share `grey` of
    the views has no colour. `blur` is the largest spread of a Gaussian blur in pixels (0: none).
    """
    if how.crop < 1 or how.flip:
        x = _cropped(x, how, draws)
    if how.jitter or how.grey:
        x = _coloured(x, how, draws)
    if how.blur:
        spread = _uniform(len(x), min(WEAKEST, how.blur), how.blur, draws).to(x)
        x = blurred(x, spread, how.blur).clamp(0, 1)
    return x


def _cropped(x: Tensor, how: Views, draws: torch.Generator) -> Tensor:
    amount = len(x)
    area = _uniform(amount, how.crop, 1.0, draws)
    # Shapes that would not fit into the image are not drawn.
    widest = area.reciprocal().clamp(max=ASPECT).log()
    aspect = (widest * _uniform(amount, -1.0, 1.0, draws)).exp()
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    right, down = ((1 - side) * _uniform(amount, -1.0, 1.0, draws) for side in (width, height))
    if how.flip:
        width = torch.where(torch.rand(amount, generator=draws) < 0.5, -width, width)
    none = torch.zeros(amount)
    boxes = torch.stack([width, none, right, none, height, down], 1).view(amount, 2, 3).to(x)
    grid = functional.affine_grid(boxes, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _coloured(x: Tensor, how: Views, draws: torch.Generator) -> Tensor:
    """Each change of colour is a matrix, so all of them are one; contrast turns about the image's mean grey."""
    amount = len(x)
    changed = torch.rand(amount, generator=draws) < how.jitter
    factors = _uniform(3 * amount, 1 - how.colour, 1 + how.colour, draws).view(3, amount)
    bright, contrast, saturation = torch.where(changed, factors, torch.ones(())).to(x)
    turn = torch.where(changed, _uniform(amount, -how.hue, how.hue, draws), torch.zeros(())).to(x)
    coloured = (torch.rand(amount, generator=draws) >= how.grey).to(x)
    grey, one = torch.tensor(LUMA).to(x).expand(3, 3), torch.eye(3).to(x)
    kept = (saturation * coloured).view(-1, 1, 1)
    colours = (kept * one + (1 - kept) * grey) @ _turned(turn)
    scale = (bright * contrast).view(-1, 1, 1)
    middle = torch.einsum("c,bchw->b", grey[0], x) / x[0, 0].numel()
    lift = (bright * (1 - contrast) * middle).view(-1, 1, 1)
    changed_pixels: Tensor = (scale * colours) @ x.flatten(2) + lift
    return changed_pixels.clamp(0, 1).view_as(x)


def _turned(turn: Tensor) -> Tensor:
    """Rotations (B, 3, 3) of colours about the axis of greys by `turn` (B,), in full turns (Rodrigues)."""
    angle = 2 * math.pi * turn.view(-1, 1, 1)
    third = torch.full((3, 3), 1 / 3).to(turn)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]).to(turn) / math.sqrt(3)
    return angle.cos() * (torch.eye(3).to(turn) - third) + angle.sin() * cross + third


def _uniform(amount: int, low: float, high: float, draws: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(amount, generator=draws)
