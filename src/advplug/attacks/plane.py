"""The nearest point of a hyperplane inside the unit box, in L-inf, L2 and L1."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30


def nearest_on_plane(x: Tensor, normal: Tensor, need: Tensor, norm: str) -> Tensor:
    """The smallest change d (B, n) in `norm` with <normal, d> = need and x + d in [0, 1].

    x (B, n) lies in [0, 1], `need` is (B,). Where the box keeps the plane out of reach, d goes as far toward it as
    the box allows; where `normal` vanishes, d is 0. The solutions are exact up to rounding (Croce and Hein 2019,
    arXiv 1907.02044).
    """
    # Squares of small gradients underflow in float32: entries are brought to at most 1 first.
    scale = normal.abs().amax(1).clamp_min(_TINY)
    toward = normal / scale[:, None] * need.sign()[:, None]
    wanted = (need.abs() / scale).nan_to_num(0.0)
    room = torch.where(toward > 0, 1 - x, x).clamp_min(0)
    weight = toward.abs()
    if norm == "l1":
        length = _fill(weight, room, wanted)
    elif norm == "l2":
        limit = torch.where(weight > 0, room / weight.clamp_min(_TINY), 0)
        length = torch.minimum(limit, _level(weight.square(), limit, wanted)) * weight
    else:
        limit = torch.where(weight > 0, room, 0)
        length = torch.minimum(limit, _level(weight, limit, wanted))
    return torch.minimum(length, room) * toward.sign()


def _level(slope: Tensor, limit: Tensor, wanted: Tensor) -> Tensor:
    """The smallest t (B, 1) with sum(slope * min(limit, t)) = wanted, at least every limit where there is none.

    The sum is concave and piecewise linear in t, so Newton's method from the left never passes t, and ends exactly
    where the next step crosses no further limit: a few sums, in place of sorting the limits.
    """
    target = wanted[:, None]
    level = target / slope.sum(1, keepdim=True).clamp_min(_TINY)
    while True:
        free = limit > level
        steepness = (slope * free).sum(1, keepdim=True)
        used = (slope * torch.where(free, 0, limit)).sum(1, keepdim=True)
        # On this piece the sum is used + steepness * t.
        following = torch.where(steepness > 0, (target - used) / steepness.clamp_min(_TINY), level)
        level = torch.maximum(level, following)
        if not bool(((limit > level) != free).any()):
            return level


def _fill(weight: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """Lengths (B, n) that reach `wanted` with the smallest sum: the heaviest coordinates go first, each to its end."""
    heavy, order = weight.sort(1, descending=True)
    space = room.gather(1, order)
    # Thousands of terms are added up: in float32 the last coordinate would not make up for the rounding.
    gain = (heavy * space).to(torch.float32 if weight.device.type == "mps" else torch.float64)
    before = gain.cumsum(1) - gain
    missing = ((wanted[:, None] - before) / heavy.clamp_min(_TINY)).clamp_min(0).to(weight.dtype)
    length = torch.where(heavy > 0, torch.minimum(missing, space), 0)
    return torch.zeros_like(weight).scatter_(1, order, length)
