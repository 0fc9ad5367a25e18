"""Feature squeezing (Xu et al. 2017, arXiv 1704.01155): answers that change when detail is taken away give one away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from advplug.contracts import DatasetInfo
from advplug.defenses.filters import median, nlm
from advplug.defenses.inputs import Change, Inner, bit_depth, through
from advplug.errors import CellFailure

SMALL = 64
"""Images of at least two channels up to this side are squeezed as CIFAR's are, larger ones as ImageNet's."""


def _squeezers(bits: int, *windows: int) -> dict[str, Change]:
    """Named as in the paper: bit depth, median 2x2 and, with `windows`, non-local means of search window and patch."""
    made: dict[str, Change] = {f"bit-{bits}": partial(bit_depth, bits=bits), "median-2x2": partial(median, window=2)}
    if windows:
        window, patch, strength = windows
        made[f"nlm-{window}-{patch}-{strength}"] = partial(nlm, window=window, patch=patch, strength=strength / 255)
    return made


PRESETS: Mapping[str, Mapping[str, Change]] = {
    "mnist": _squeezers(1),
    "cifar": _squeezers(5, 13, 3, 2),
    "imagenet": _squeezers(5, 11, 3, 4),
}
"""The best joint detectors of the paper (EvadeML-Zoo); their non-local means work in L*a*b*, ours in RGB."""


def preset_for(info: DatasetInfo) -> str:
    """The squeezers for images of that shape."""
    if info.channels == 1:
        return "mnist"
    return "cifar" if min(info.size) <= SMALL else "imagenet"


def score(inner: Inner, x: Tensor, squeezers: Mapping[str, Change]) -> Tensor:
    """(B,), 0 to 2: the largest L1 distance between the probabilities of an image and those of it squeezed.

    Gradients pass the squeezers by the identity.
    """
    whole = inner(x).softmax(1)
    distances = [(whole - inner(through(s)(x)).softmax(1)).abs().sum(1) for s in squeezers.values()]
    return torch.stack(distances).amax(0)


def threshold_at(scores: Tensor, fpr: float) -> float:
    """The smallest of the scores (N,) that at most a share `fpr` of them exceeds. Raises CellFailure for NaN."""
    if not bool(scores.isfinite().all()):
        raise CellFailure("the model's probabilities are not finite on training images, so there is no threshold")
    ordered = scores.double().sort().values
    return float(ordered[max(0, math.ceil(len(ordered) * (1 - fpr) - 1e-9) - 1)])


def rejection(threshold: float, squeezers: Mapping[str, Change]) -> Callable[[Inner, Tensor, torch.Generator], Tensor]:
    """By how much an image's score exceeds the threshold, as `Wrap.rejection` wants it."""

    def beyond(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return score(inner, x, squeezers) - threshold

    return beyond
