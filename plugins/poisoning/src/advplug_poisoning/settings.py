"""What a trigger is, as it was asked for: checked before anything is loaded. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from advplug.errors import UsageError, did_you_mean

Kind: TypeAlias = Literal["patch", "checker", "random", "blended", "sig", "wanet"]
_PATCH = ("size", "place", "margin", "opacity")
TAKES: Mapping[Kind, tuple[str, ...]] = {
    "patch": _PATCH,
    "checker": _PATCH,
    "random": (*_PATCH, "fresh"),
    "blended": ("opacity", "fresh"),
    "sig": ("amplitude", "frequency"),
    "wanet": ("strength", "grid"),
}
"""The parameters that have an effect, by trigger."""
CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")
PLACES = (*CORNERS, "corners", "centre", "random")
_POINT = re.compile(r"(\d{1,5}):(\d{1,5})")

BLENDED_OPACITY = 0.2
"""Chen et al. 2017, arXiv 1712.05526."""
SIG_AMPLITUDE, SIG_FREQUENCY = 40 / 255, 6.0
"""As in BackdoorBench (Wu et al. 2022, arXiv 2206.12654)."""
WANET_STRENGTH, WANET_GRID = 0.5, 4
"""The defaults of the authors of WaNet (Nguyen and Tran 2021, arXiv 2102.10369)."""


@dataclass(frozen=True)
class TriggerSettings:
    """A trigger: `size` of a patch (None: by the images), `place` a name or its upper left pixel as X:Y, `margin` to
    the edges in pixels, `opacity` in (0, 1]; `fresh` draws the pattern anew for each image. `amplitude` in pixel
    units and `frequency` in waves an image's width are those of `sig`, `strength` and `grid` those of `wanet`."""

    kind: Kind = "patch"
    size: int | None = None
    place: str = "bottom-right"
    margin: int = 1
    opacity: float = 1.0
    fresh: bool = False
    amplitude: float = SIG_AMPLITUDE
    frequency: float = SIG_FREQUENCY
    strength: float = WANET_STRENGTH
    grid: int = WANET_GRID

    @property
    def point(self) -> tuple[int, int] | None:
        """Row and column of the upper left pixel, where `place` gives one."""
        found = _POINT.fullmatch(self.place)
        return (int(found[2]), int(found[1])) if found else None


def trigger_settings(kind: Kind, given: Mapping[str, object]) -> TriggerSettings:
    """The trigger with what was `given`; None stands for its default.

    Raises UsageError for a parameter that this trigger has no use for and for a place that is none.
    """
    said = {name: value for name, value in given.items() if value is not None}
    takes = TAKES[kind]
    for name in said:
        if name not in takes:
            others = ", ".join(k for k in get_args(Kind) if name in TAKES[k])
            raise UsageError(
                f"ba: {name} has no effect on trigger={kind}, which takes {', '.join(takes)}; {name} is for {others}"
            )
    place = str(said.get("place", "bottom-right"))
    place = {"center": "centre"}.get(place, place)
    if place not in PLACES and not _POINT.fullmatch(place):
        hint = did_you_mean(place, PLACES) or f"; write {', '.join(PLACES)} or X:Y, the patch's upper left pixel"
        raise UsageError(f"ba: place cannot be '{place}'{hint}")
    if "margin" in said and place not in (*CORNERS, "corners", "random"):
        raise UsageError(f"ba: margin has no effect on place={place}; it is for corners and random places")
    defaults: dict[str, object] = {"opacity": BLENDED_OPACITY} if kind == "blended" else {}
    return TriggerSettings(kind, **{**defaults, **said, "place": place})  # type: ignore[arg-type]
