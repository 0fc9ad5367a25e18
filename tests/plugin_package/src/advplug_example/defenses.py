"""Two wraps, an objective and a data stage. Listing reads their signatures, so torch waits for their first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np

from advplug.contracts import Defense, Gradient, Objective, TrainingData, Wrap
from advplug.data import Split
from advplug.params import Param
from advplug.rng import Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Inner: TypeAlias = Callable[[Tensor], Tensor]


def quantise(bits: Annotated[int, Param("bits a pixel keeps", ge=1, le=8)] = 4) -> Defense:
    """Rounding has no gradient; the attacker is given the rounded image with the identity's gradient."""
    levels = 2**bits - 1

    def rounded(x: Tensor) -> Tensor:
        return (x * levels).round() / levels

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(rounded(x))

    def straight_through(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x + (rounded(x) - x).detach())

    return (Wrap(forward, Gradient.BPDA, surrogates=(straight_through,)),)


def gaussian(
    sigma: Annotated[float, Param("standard deviation in pixel units", gt=0)] = 0.05,
    draws: Annotated[int, Param("samples an attacker averages over", ge=1)] = 8,
) -> Defense:
    """Fresh noise on every call."""

    import torch

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        return inner(x + sigma * noise)

    return (Wrap(forward, stochastic=True, draws=draws),)


def smooth_labels(amount: Annotated[float, Param("weight of the uniform label", ge=0, lt=1)] = 0.1) -> Defense:
    from torch.nn import functional as F

    def loss(model: nn.Module, x: Tensor, y: Tensor, rng: Stream) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=amount)

    return (Objective(loss),)


def thin(share: Annotated[float, Param("share of the images that is kept", gt=0, le=1)] = 0.5) -> Defense:
    import torch

    def apply(split: Split, rng: Stream) -> Split:
        keep = torch.randperm(len(split), generator=rng.generator("thin"))[: max(2, round(share * len(split)))]
        return split.subset(np.sort(keep.numpy()))

    return (TrainingData(apply),)
