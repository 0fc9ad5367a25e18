"""DeepFool and the spatial attack: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Access, AttackCaps, Param, Spec, Strength

if TYPE_CHECKING:
    from advplug.attacks.deepfool import DeepFool
    from advplug.attacks.spatial import SpatialAttack

SHIFTS, ANGLES = 5, 31
"""The grid of the spatial attack: places along each axis, and angles."""


def deepfool(
    steps: Annotated[int, Param("steps to the nearest boundary, at most", ge=1)] = 50,
    overshoot: Annotated[float, Param("how far beyond the boundary, as a share of the way", ge=0)] = 0.02,
    candidates: Annotated[int, Param("best-scoring classes to consider, the label's among them", ge=2)] = 10,
    refine: Annotated[int, Param("halvings of the way back at the end; 0: as published", ge=0)] = 0,
) -> DeepFool:
    """The smallest change that is misclassified, by steps to the nearest linearised boundary."""
    from advplug.attacks.deepfool import DeepFool

    return DeepFool(steps, overshoot, candidates, refine)


def spatial(
    shift: Annotated[float, Param("largest shift as a share of the image's side, to whole pixels", ge=0, le=1)] = 0.1,
    angle: Annotated[float, Param("largest angle in degrees, either way", ge=0, le=180)] = 30.0,
    scale: Annotated[float, Param("largest relative change of size; 0.2: factors 0.8 to 1.2", ge=0, lt=1)] = 0.0,
    method: Annotated[Literal["grid", "random"], Param("775 combinations and more, or random draws")] = "grid",
    tries: Annotated[int, Param("draws of an image, for method=random", ge=1)] = 10,
    scales: Annotated[int, Param("sizes on the grid where scale is not 0, an odd number", ge=3)] = 5,
) -> SpatialAttack:
    """The worst of many shifts, rotations and changes of size; eps is a share of their ranges."""
    from advplug.attacks.spatial import Ranges, SpatialAttack

    return SpatialAttack(Ranges(shift, angle, scale), method, tries, scales)


def _effort(params: Mapping[str, Any]) -> tuple[float, float]:
    """A forward pass for each combination that is tried; of what may not change there is one."""
    sides = {"shift": SHIFTS**2, "angle": ANGLES, "scale": params["scales"]}
    grid = math.prod(many for name, many in sides.items() if params[name])
    return (grid if params["method"] == "grid" else params["tries"]) + 1, 0


_BOTH = frozenset({"untargeted", "targeted"})
_HERE = "advplug.builtin.geometric:"

ATTACKS: list[Spec] = [
    Spec(
        "deepfool",
        _HERE + "deepfool",
        AttackCaps(Access.GRADIENT, frozenset({"linf", "l2"}), _BOTH, Strength.ITERATIVE, minimum_norm=True),
        "Minimum-norm: steps to the nearest boundary of the linearised model",
        "Moosavi-Dezfooli et al. 2015, arXiv 1511.04599",
        effort=lambda params: (params["steps"] + 1, params["steps"] * min(params["candidates"], params["classes"])),
    ),
    Spec(
        "spatial",
        _HERE + "spatial",
        AttackCaps(
            Access.SCORE,
            frozenset({"spatial"}),
            _BOTH,
            Strength.ITERATIVE,
            stochastic=True,
            threat=("shift", "angle", "scale"),
        ),
        "Translation, rotation and scaling: the worst of a grid or of random draws",
        "Engstrom et al. 2017, arXiv 1712.02779",
        effort=_effort,
    ),
]
