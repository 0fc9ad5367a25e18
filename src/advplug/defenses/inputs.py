"""Wraps that change images before the model, and what an attacker differentiates in their place.

A change maps images (B, C, H, W) in [0, 1] to images of that shape, each image by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from advplug.contracts import Gradient, Wrap

Inner: TypeAlias = Callable[[Tensor], Tensor]
Change: TypeAlias = Callable[[Tensor], Tensor]


def input_wrap(change: Change, stand_ins: tuple[Change, ...] = ()) -> Wrap:
    """The model behind `change`, attacked through each of `stand_ins` (BPDA: Athalye et al. 2018, arXiv 1802.00420).

    Without any, `change` itself is differentiable.
    """
    surrogates = tuple(_forward(stand_in) for stand_in in stand_ins)
    return Wrap(_forward(change), Gradient.BPDA if stand_ins else Gradient.EXACT, surrogates)


def through(change: Change, path: Change | None = None) -> Change:
    """`change` with the gradient of `path`, or of the identity: the model is differentiated at the changed image."""

    def stand_in(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = change(x)
        return carried(value, x if path is None else path(x))

    return stand_in


def carried(value: Tensor, path: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `path`."""
    return value.detach() + (path - path.detach())


def bit_depth(x: Tensor, bits: int) -> Tensor:
    """`x` rounded to 2^bits levels, 0 and 1 among them (Xu et al. 2017, arXiv 1704.01155); ties go to even levels."""
    top: int = 2**bits - 1
    return (x * top).round() / top


def _forward(change: Change) -> Callable[[Inner, Tensor, torch.Generator], Tensor]:
    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(change(x))

    return forward
