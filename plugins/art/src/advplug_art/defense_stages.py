"""From ART's NumPy functions to wraps: pixels or probabilities out to an array and back, gradients around it.

An inner model maps images (B, C, H, W) to logits (B, K); functions of ART map arrays of either to arrays alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advplug.contracts import Gradient, Wrap
from advplug.rng import Stream

Array: TypeAlias = npt.NDArray[Any]
Process: TypeAlias = Callable[[Array], Array]
Inner: TypeAlias = Callable[[Tensor], Tensor]

FLOOR = 1e-12
"""Probabilities are at least this before their logarithm is taken."""


def input_stage(process: Process, stochastic: bool = False, draws: int = 1) -> Wrap:
    """Changes pixels before the model; the attacker sees the true images with the identity's gradient (BPDA)."""

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(_processed(process, x, rng if stochastic else None))

    def straight_through(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(_carried(_processed(process, x, rng if stochastic else None), x))

    return Wrap(forward, Gradient.BPDA, (straight_through,), stochastic, draws)


def smoothing_stage(process: Process, window: int) -> Wrap:
    """ART's median filter, attacked with the gradients of the identity, of the mean of the window and of the median,
    which belongs to the pixel that was picked: by itself it leaves most pixels without any (BPDA)."""

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(_processed(process, x, None))

    def along(path: Callable[[Tensor], Tensor]) -> Callable[[Inner, Tensor, torch.Generator], Tensor]:
        return lambda inner, x, rng: inner(_carried(_processed(process, x, None), path(x)))

    paths = (lambda x: x, lambda x: _windows(x, window).mean(4), lambda x: running_median(x, window))
    return Wrap(forward, Gradient.BPDA, tuple(map(along, paths)))


def noise_stage(noise: Process, draws: int) -> Wrap:
    """Adds noise (drawn for zeros of the images' shape) to the pixels and clips; differentiable."""

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner((x + _processed(noise, x, rng)).clamp(0, 1))

    return Wrap(forward, stochastic=True, draws=draws)


def output_stage(
    process: Process, stochastic: bool = False, accepts: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Wrap:
    """Changes the answered probabilities; answers their logarithms, of which softmax makes them again.

    The attacker differentiates the logits inside (BPDA). Rows whose logits are not finite become NaN.
    """

    def forward(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        logits = inner(x)
        return _answered(process, logits.detach(), rng if stochastic else None).to(logits)

    def inside(inner: Inner, x: Tensor, rng: torch.Generator) -> Tensor:
        return inner(x)

    return Wrap(forward, Gradient.BPDA, (inside,), stochastic, accepts=accepts)


def reaches(cutoff: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Accepts answers whose best probability is at least `cutoff`; withheld ones are uniform, and lie below it."""
    # What was withheld had a best probability of at least 1 / K and less than the cutoff.
    return lambda x, logits: logits.softmax(1).amax(1) >= cutoff - 1e-6


def running_median(x: Tensor, window: int) -> Tensor:
    """The median of the window around each pixel of (B, C, H, W), differentiable; even windows lean up and left.

    Of an even number of values it is the upper of the two in the middle. Borders are mirrored with the edge doubled.
    """
    values: Tensor = _windows(x, window).kthvalue(window * window // 2 + 1, dim=4).values
    return values


def _windows(x: Tensor, window: int) -> Tensor:
    """(B, C, H, W, window * window): the pixels around each."""
    rows, columns = (_mirrored(side, window).to(x.device) for side in x.shape[2:])
    return x[:, :, rows][:, :, :, columns].unfold(2, window, 1).unfold(3, window, 1).flatten(4)


def _mirrored(side: int, window: int) -> Tensor:
    before = window // 2
    place = torch.arange(-before, side + window - 1 - before) % (2 * side)
    return torch.minimum(place, 2 * side - 1 - place)


def _carried(value: Tensor, path: Tensor) -> Tensor:
    """`value` with the gradient of `path`."""
    return path + (value - path).detach()


def _processed(process: Process, x: Tensor, rng: torch.Generator | None) -> Tensor:
    """`process` of images, without gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Rounding may leave a pixel just outside [0, 1], which ART's JPEG refuses.
    pixels = x.detach().to("cpu", wide).clamp(0, 1).numpy()
    return torch.from_numpy(np.ascontiguousarray(_run(process, pixels, rng))).to(x)


def _answered(process: Process, logits: Tensor, rng: torch.Generator | None) -> Tensor:
    """(B, K) logarithms of the changed probabilities, float64 on the CPU."""
    logits = logits.cpu().double()
    sound = logits.isfinite().all(1)
    scores = torch.full_like(logits, torch.nan)
    if bool(sound.any()):
        # Where noise takes every probability below 0, ART divides 0 by 0.
        with np.errstate(invalid="ignore"):
            made = _run(process, logits[sound].softmax(1).numpy(), rng)
        scores[sound] = torch.from_numpy(made).nan_to_num(0).clamp_min(FLOOR).log()
    return scores


def _run(process: Process, values: Array, rng: torch.Generator | None) -> Array:
    """Calls ART; its draws come from NumPy's global generator, seeded from `rng` and restored."""
    with warnings.catch_warnings():
        # Some releases of Pillow want images made another way than ART makes them.
        warnings.filterwarnings("ignore", message=".*mode.*", category=DeprecationWarning, module="art")
        if rng is None:
            return process(values)
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        with Stream(seed, "art").as_global():
            return process(values)
