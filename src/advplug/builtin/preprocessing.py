"""Defenses that change images before the model: parameters and specs. Torch is imported only when one is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Defense, DefenseCaps, Gradient, Param, Spec
from advplug.errors import UsageError

if TYPE_CHECKING:
    from advplug.defenses.inputs import Change

USUAL: dict[str, dict[str, float]] = {
    "bilateral": {"sigma": 1.0, "spread": 0.1, "window": 5},
    "gaussian": {"sigma": 1.0},
    "median": {"window": 3},
    "nlm": {"window": 7, "patch": 3, "strength": 0.1},
    "tv": {"strength": 0.05},
}
"""What each method of `denoise` takes, with the values it has unless others are given."""
CENTRED = {"bilateral": ("window",), "nlm": ("window", "patch")}
"""Sides that must be odd, for the pixel itself to be in the middle."""
WIDEST = 63
TV_STEPS = 60
"""On photographs of 32x32 pixels no pixel is then further than 0.001 from where 2000 steps end, at strength 0.05."""


def jpeg(
    quality: Annotated[int, Param("JPEG quality, from 1 (worst) to 100", ge=1, le=100)] = 75,
    subsampling: Annotated[
        Literal["4:4:4", "4:2:2", "4:2:0"], Param("pixels that share a value of chroma: 1, 2 side by side, or 2x2")
    ] = "4:2:0",
) -> Defense:
    """Compresses images and opens them again, by Pillow; grey ones have no chroma to share.

    Attacked through the compressed image with the identity's gradient, and with that of a differentiable JPEG.
    """
    from advplug.defenses.inputs import input_wrap, through
    from advplug.defenses.jpeg import compress, differentiable

    deployed = partial(compress, quality=quality, subsampling=subsampling)
    smooth = partial(differentiable, quality=quality, subsampling=subsampling)
    return (input_wrap(deployed, (through(deployed), through(deployed, smooth))),)


def bit_depth(
    bits: Annotated[int, Param("bits that each channel of a pixel keeps", ge=1, le=8)] = 4,
) -> Defense:
    """Rounds pixels to 2^bits levels; attacked through the rounded image with the identity's gradient."""
    from advplug.defenses.inputs import bit_depth, input_wrap, through

    squeeze = partial(bit_depth, bits=bits)
    return (input_wrap(squeeze, (through(squeeze),)),)


def denoise(
    method: Annotated[Literal["bilateral", "gaussian", "median", "nlm", "tv"], Param("the filter")] = "bilateral",
    sigma: Annotated[
        float | None, Param("gaussian, bilateral: standard deviation in pixels; none: 1", gt=0, le=64)
    ] = None,
    spread: Annotated[
        float | None, Param("bilateral: standard deviation of the distance between colours; none: 0.1", gt=0)
    ] = None,
    window: Annotated[
        int | None,
        Param("bilateral, median, nlm: side in pixels; none: 2 sigma to each side, 3, and 7", ge=1, le=WIDEST),
    ] = None,
    patch: Annotated[int | None, Param("nlm: side of what is compared, in pixels; none: 3", ge=1, le=31)] = None,
    strength: Annotated[
        float | None,
        Param("nlm: root mean square difference that weighs 1/e, tv: weight of the variation; none: 0.1, 0.05", gt=0),
    ] = None,
) -> Defense:
    """Smooths images. The gaussian filter is differentiable; the others are attacked through two or three stand-ins:
    their own gradient, and the filtered image with a simpler one.

    Raises UsageError for a parameter of another method, and for an even side where there must be a middle.
    """
    own = settled(method, sigma=sigma, spread=spread, window=window, patch=patch, strength=strength)
    return _MAKERS[method](own)


def settled(method: str, **given: float | None) -> dict[str, Any]:
    """The parameters of that method, given or usual. Raises UsageError for those of others."""
    usual = USUAL[method]
    for name, value in given.items():
        if value is not None and name not in usual:
            raise UsageError(f"denoise: method={method} takes {' and '.join(usual)}, not {name}")
    own = {name: usual[name] if given.get(name) is None else given[name] for name in usual}
    if method == "bilateral" and given.get("window") is None:
        # Two standard deviations to each side, or a sweep over sigma would soon change nothing.
        own["window"] = min(2 * math.ceil(2 * own["sigma"]) + 1, WIDEST)  # type: ignore[operator]
    for name in CENTRED.get(method, ()):
        if own[name] % 2 == 0:  # type: ignore[operator]
            raise UsageError(f"denoise: {name} of method={method} must be odd, got {own[name]}")
    return own


def _bilateral(own: Mapping[str, Any]) -> Defense:
    from advplug.defenses.filters import bilateral
    from advplug.defenses.inputs import input_wrap

    smooth = partial(bilateral, **own)
    return (input_wrap(smooth, (smooth, partial(smooth, detached=True))),)


def _gaussian(own: Mapping[str, Any]) -> Defense:
    from advplug.defenses.filters import gaussian
    from advplug.defenses.inputs import input_wrap

    return (input_wrap(partial(gaussian, **own)),)


def _median(own: Mapping[str, Any]) -> Defense:
    from advplug.defenses.filters import mean, median
    from advplug.defenses.inputs import input_wrap, through

    smooth = partial(median, **own)
    return (input_wrap(smooth, (through(smooth), through(smooth, partial(mean, **own)), smooth)),)


def _nlm(own: Mapping[str, Any]) -> Defense:
    from advplug.defenses.filters import nlm

    return _own_gradient_and_identity(partial(nlm, **own))


def _tv(own: Mapping[str, Any]) -> Defense:
    from advplug.defenses.filters import tv

    return _own_gradient_and_identity(partial(tv, steps=TV_STEPS, **own))


def _own_gradient_and_identity(change: Change) -> Defense:
    from advplug.defenses.inputs import input_wrap, through

    return (input_wrap(change, (through(change), change)),)


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Defense]] = {
    "bilateral": _bilateral,
    "gaussian": _gaussian,
    "median": _median,
    "nlm": _nlm,
    "tv": _tv,
}


def _denoise_caps(params: Mapping[str, Any]) -> DefenseCaps:
    settled(**params)
    gradient = Gradient.EXACT if params["method"] == "gaussian" else Gradient.BPDA
    return DefenseCaps(("wrap",), gradient, stand_ins=3 if params["method"] == "median" else 2)


DEFENSES: list[Spec] = [
    Spec(
        "jpeg",
        "advplug.builtin.preprocessing:jpeg",
        DefenseCaps(("wrap",), Gradient.BPDA),
        "JPEG compression of every image",
        "Dziugaite et al. 2016, arXiv 1608.00853; differentiable: Shin and Song 2017",
    ),
    Spec(
        "bit-depth",
        "advplug.builtin.preprocessing:bit_depth",
        DefenseCaps(("wrap",), Gradient.BPDA, stand_ins=1),
        "Pixels rounded to fewer bits",
        "Xu et al. 2017, arXiv 1704.01155",
    ),
    Spec(
        "denoise",
        "advplug.builtin.preprocessing:denoise",
        DefenseCaps(("wrap",), Gradient.BPDA),
        "Smoothing of every image: bilateral, gaussian, median, non-local means or total variation",
        "Xu et al. 2017, arXiv 1704.01155; Guo et al. 2017, arXiv 1711.00117",
        narrow=_denoise_caps,
    ),
]
