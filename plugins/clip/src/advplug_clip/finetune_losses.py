"""What fine-tuning of an image tower lowers: contrastive losses, distances of features, and random augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WEAKEST = 0.1
"""Least spread of the blur in pixels, as good as none."""


def contrastive(images: Tensor, texts: Tensor, scale: float, same: Tensor) -> Tensor:
    """Cross-entropy of telling which text belongs to an image, and the reverse, a scalar (Radford et al. 2021).

    `images` (B, D) of any length, `texts` (B, D) of unit length. `same` (B, B) tells which texts read the same: those
    are no wrong answers to each other and are left out, other than the image's own.
    """
    logits = scale * functional.normalize(images, dim=-1) @ texts.T
    own = torch.arange(len(images), device=images.device)
    others = same & ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = logits.masked_fill(others, -math.inf)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def distance(features: Tensor, original: Tensor) -> Tensor:
    """Squared Euclidean distance (B,) of features (B, D): a sum over D, not a mean (Schlarmann et al. 2024, eq. 3)."""
    return (features - original).square().sum(1)


def dissimilarity(features: Tensor, texts: Tensor) -> Tensor:
    """Minus the cosine (B,) of features (B, D) and texts (B, D); means of unit vectors give the mean cosine."""
    return -(functional.normalize(features, dim=-1) * texts).sum(1)


@dataclass(frozen=True)
class Augmentation:
    """Random change of an image: contrast, brightness, blur and noise, in that order, clipped to [0, 1].

    Factors of brightness and contrast are uniform in 1 - b to 1 + b; the blur's spread in pixels in `WEAKEST` to
    `blur`; `noise` is the spread of normal noise. 0 leaves the part out.
    """

    brightness: float
    contrast: float
    blur: float
    noise: float

    def __call__(self, x: Tensor, draws: torch.Generator) -> Tensor:
        """Images of the shape of `x` (B, C, H, W); draws come from `draws`, a generator on the CPU."""

        def uniform(low: float, high: float) -> Tensor:
            return (low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=draws)).to(x)

        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + uniform(1 - self.contrast, 1 + self.contrast) * (x - mean)
        x = x * uniform(1 - self.brightness, 1 + self.brightness)
        if self.blur:
            x = blurred(x, uniform(min(WEAKEST, self.blur), self.blur).flatten(), self.blur)
        return (x + self.noise * torch.randn(x.shape, generator=draws).to(x)).clamp(0, 1)


def blurred(x: Tensor, spread: Tensor, largest: float) -> Tensor:
    """Gaussian blur of images (B, C, H, W) with a spread in pixels for each (B,), of at most `largest`.

    Edges are repeated. Kernels reach three times the largest spread, and no further than the image.
    """
    b, c, height, width = x.shape
    reach = min(max(1, math.ceil(3 * largest)), height - 1, width - 1)
    if reach < 1:
        return x
    at = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (at / spread[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    wide = functional.pad(x, (reach,) * 4, mode="replicate").reshape(1, b * c, height + 2 * reach, width + 2 * reach)
    wide = functional.conv2d(wide, kernel[..., None], groups=b * c)
    return functional.conv2d(wide, kernel[:, :, None], groups=b * c).reshape(x.shape)
