"""Norm balls inside the unit box: distance, membership, projection, random starts, steepest directions.

Images are (B, ...) tensors in [0, 1], float32 or float64; every result has the input's dtype and device.
Norms are 'linf', 'l2' and 'l1', and the count of changed pixels 'l0' for everything but steps and starts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advplug.errors import UsageError
from advplug.rng import Stream

TOLERANCE = 1e-6
"""A change is inside a ball if its size is at most eps + TOLERANCE * (1 + eps), and every pixel lies in
[-TOLERANCE, 1 + TOLERANCE]. This covers the rounding of float32 pixels and nothing that matters."""

SPARSITY = 0.01
"""Share of coordinates that an L1 step changes (Tramer and Boneh 2019, arXiv 1904.13000: the top 1 %)."""

_TINY = 1e-30
_ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}


def order(norm: str) -> float:
    """The p of a norm's name. Raises UsageError for any other name."""
    if norm not in _ORDER:
        raise UsageError(f"norm '{norm}' is unknown; choose from {', '.join(_ORDER)}")
    return _ORDER[norm]


def columns(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values shaped to multiply (B, ...) images."""
    return values.view(-1, *[1] * (like.dim() - 1))


def size(change: Tensor, norm: str) -> Tensor:
    """The norm of each change, (B,); L0 counts the pixels that changed in any channel."""
    if norm == "l0":
        return (_strength(change) > TOLERANCE).sum(1).to(change.dtype)
    length: Tensor = torch.linalg.vector_norm(change.flatten(1), order(norm), dim=1)
    return length


def _strength(change: Tensor) -> Tensor:
    """The largest change of each pixel over its channels, (B, pixels); vectors are pixels of one channel."""
    return (change.abs().amax(1) if change.dim() > 2 else change.abs()).flatten(1)


def distance(x: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """The norm of x_adv - x for each image, (B,)."""
    return size(x_adv - x, norm)


def inside(x: Tensor, x_adv: Tensor, norm: str, eps: float) -> Tensor:
    """True (B,) where x_adv is within eps of x and within [0, 1], both up to TOLERANCE; NaN is outside."""
    return within(distance(x, x_adv, norm), eps) & in_box(x_adv)


def within(size: Tensor, eps: float) -> Tensor:
    """True (B,) where a size is at most eps, up to TOLERANCE; NaN is not."""
    return size <= eps + TOLERANCE * (1 + eps)


def in_box(x: Tensor) -> Tensor:
    """True (B,) where all pixels lie in [0, 1], up to TOLERANCE; NaN does not."""
    flat = x.flatten(1)
    return (flat >= -TOLERANCE).all(1) & (flat <= 1 + TOLERANCE).all(1)


def project(x: Tensor, x_adv: Tensor, norm: str, eps: float) -> Tensor:
    """x_adv moved into the ball around x and into [0, 1].

    L-inf and L1 give the nearest point of the intersection (L1: Croce and Hein 2021, arXiv 2103.01208);
    L2 scales, then clips, which stays inside because x is in the box; L0 keeps the pixels that changed most.
    Points already inside stay put.
    """
    if norm == "linf":
        return torch.clamp(x_adv, x - eps, x + eps).clamp_(0, 1)
    if norm == "l2":
        change = x_adv - x
        length = size(change, "l2")
        shrink = (eps / length.clamp_min(_TINY)).clamp_max(1.0)
        # Scaling a change that fits already would only round it.
        moved = torch.where(columns(length <= eps, x), x_adv, x + change * columns(shrink, x))
        return moved.clamp_(0, 1)
    order(norm)
    clipped = x_adv.clamp(0, 1)
    if norm == "l0":
        return _keep_strongest(x, clipped, int(eps))
    outside = distance(x, clipped, "l1") > eps
    if bool(outside.any()):
        rows = outside.nonzero().flatten()
        clipped[rows] = _project_l1(x[rows], x_adv[rows], eps)
    return clipped


def _keep_strongest(x: Tensor, x_adv: Tensor, count: int) -> Tensor:
    """x_adv at the `count` pixels that changed most, x elsewhere."""
    strength = _strength(x_adv - x)
    top = strength.topk(min(count, strength.shape[1]), dim=1).indices
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, top, value=True)
    kept &= strength > TOLERANCE
    mask = kept.view(len(x), 1, *x.shape[2:]) if x.dim() > 2 else kept
    return torch.where(mask, x_adv, x)


def _project_l1(x: Tensor, x_adv: Tensor, eps: float) -> Tensor:
    """The nearest point with sum |d| = eps and x + d in [0, 1], for points where clipping alone is too far.

    d_i = sign(u_i) min(max(|u_i| - t, 0), h_i), with h_i the room up to the box. The sum of |d_i| falls
    piecewise linearly in t, so t lies between two of the break points |u_i| and |u_i| - h_i.
    """
    if eps <= 0:
        return x.clone()
    change = (x_adv - x).flatten(1)
    flat = x.flatten(1)
    room = torch.where(change > 0, 1 - flat, flat)
    length = change.abs()
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    breaks = torch.cat([length, length - room], 1).to(exact)
    breaks, where = breaks.sort(1, descending=True)
    slope = torch.where(where < length.shape[1], 1.0, -1.0).to(exact).cumsum(1)
    total = torch.zeros_like(breaks)
    total[:, 1:] = (slope[:, :-1] * (breaks[:, :-1] - breaks[:, 1:])).cumsum(1)
    reached = total >= eps
    first = torch.where(reached.any(1), reached.int().argmax(1), total.argmax(1)).clamp_min(1)[:, None]
    before = first - 1
    missing = eps - total.gather(1, before)
    threshold = breaks.gather(1, before) - missing / slope.gather(1, before).clamp_min(1)
    threshold = threshold.clamp_min(0).to(x.dtype)
    kept = torch.minimum((length - threshold).clamp_min(0), room)
    # The sum is rounded once here, and once more for every pixel when the change is added to the image.
    slack = length.shape[1] * torch.finfo(x.dtype).eps / 4
    total = kept.sum(1, keepdim=True).clamp_min(_TINY)
    kept = kept * (max(eps - slack, 0.0) / total).clamp_max(1.0)
    return (x + (kept * change.sign()).view_as(x)).clamp_(0, 1)


def random_start(x: Tensor, index: Tensor, norm: str, eps: float, rng: Stream, *names: object) -> Tensor:
    """A point drawn uniformly from the ball around each image, then clipped to [0, 1].

    `index` (B,) are dataset positions: each image has a generator of its own, so a start depends on the
    image, the stream and `names` only.
    """
    if eps <= 0 or not len(x):
        return x.clone()
    shape, dtype = x.shape[1:], x.dtype

    def draw(generator: torch.Generator) -> Tensor:
        if norm == "linf":
            return torch.rand(shape, generator=generator, dtype=dtype).mul_(2 * eps).sub_(eps)
        return _uniform_ball(shape, dtype, norm, generator) * eps

    order(norm)
    change = rng.per_image(draw, index, *names).to(x.device)
    return project(x, x + change, norm, eps)


def _uniform_ball(shape: torch.Size, dtype: torch.dtype, norm: str, generator: torch.Generator) -> Tensor:
    """A point of the unit L2 or L1 ball, uniformly."""
    n = shape.numel()
    if norm == "l2":
        ray = torch.randn(n, generator=generator, dtype=dtype)
        radius = torch.rand(1, generator=generator, dtype=dtype) ** (1 / n)
        length: Tensor = torch.linalg.vector_norm(ray)
        return (ray * (radius / length.clamp_min(_TINY))).view(shape)
    # n + 1 exponentials over their sum are uniform on the simplex; leaving one out fills the ball.
    parts = torch.empty(n + 1, dtype=dtype).exponential_(generator=generator)
    signs = torch.randint(0, 2, (n,), generator=generator).mul_(2).sub_(1).to(dtype)
    point: Tensor = parts[:n] / parts.sum().clamp_min(_TINY) * signs
    return point.view(shape)


def direction(gradient: Tensor, norm: str, x: Tensor | None = None) -> Tensor:
    """The steepest ascent direction of length 1 in the norm, for each image; zero where the gradient is.

    L1 spreads the step evenly over the SPARSITY share of coordinates with the largest gradients; with `x`
    given, coordinates that already touch the box in the gradient's direction are passed over.
    """
    if norm == "linf":
        return gradient.sign()
    flat = gradient.flatten(1)
    if norm == "l2":
        # Division by the largest entry first: squares of small gradients underflow in float32.
        scaled = flat / flat.abs().amax(1, keepdim=True).clamp_min(_TINY)
        length: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        return (scaled / length.clamp_min(_TINY)).view_as(gradient)
    order(norm)
    if x is not None:
        pixels = x.flatten(1)
        stuck = ((pixels <= 0) & (flat < 0)) | ((pixels >= 1) & (flat > 0))
        flat = flat.masked_fill(stuck, 0)
    count = max(1, math.ceil(SPARSITY * flat.shape[1]))
    top = flat.abs().topk(count, dim=1).indices
    signs = flat.gather(1, top).sign()
    signs = signs / signs.abs().sum(1, keepdim=True).clamp_min(1)
    return torch.zeros_like(flat).scatter_(1, top, signs).view_as(gradient)
