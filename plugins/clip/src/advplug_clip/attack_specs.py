"""Attacks on what an image says: parameters and specs. Torch is imported only when one is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Access, AttackCaps, Param, Spec, Stack, Strength

if TYPE_CHECKING:
    from advplug.attacks.engine import GradientAttack

THOROUGH_STEPS, THOROUGH_RESTARTS = 50, 3
"""The effort from which on it counts as a strong attack; the audit sees whether it has converged."""


def caption_pgd(
    steps: Annotated[int, Param("gradient steps", ge=1)] = 20,
    alpha: Annotated[Fraction | None, Param("step in pixel units; none: a quarter of eps", gt=0)] = None,
    restarts: Annotated[int, Param("starts; the lowest similarity counts", ge=1)] = 1,
    random_start: Annotated[bool, Param("begin at a random point; no: at the clean image")] = True,
    transforms: Annotated[
        Stack | None, Param("what images must survive, as rotation:degrees=15+noise:sigma=0.05 (EOT); none: nothing")
    ] = None,
    draws: Annotated[int, Param("samples that make one gradient, of transforms and randomised victims", ge=1)] = 1,
    precision: Annotated[
        Literal["auto", "float32"],
        Param("auto: the fastest of float32 and bfloat16, by a short timing; decisions stay float32"),
    ] = "float32",
) -> GradientAttack:
    """PGD that lowers the mean cosine of an image and its own captions, or raises that to the captions of `target`.

    Every image takes all steps, and its iterate of lowest similarity counts. Gradients reach the image tower only;
    the texts are encoded once. Texts are never changed.
    """
    from advplug.attacks.aims import SIMILARITY
    from advplug.attacks.engine import GradientAttack
    from advplug.attacks.transforms import build

    attack = GradientAttack(
        steps=steps,
        alpha=alpha,
        fraction=0.25,
        restarts=restarts,
        start="uniform" if random_start else "clean",
        loss=SIMILARITY,
        draws=draws,
        keep_going=True,
        precision=precision,
    )
    return replace(attack, transforms=build(transforms))


def _caps(params: Mapping[str, Any]) -> AttackCaps:
    thorough = params["steps"] >= THOROUGH_STEPS and params["restarts"] >= THOROUGH_RESTARTS
    return replace(CAPS, strength=Strength.STRONG if thorough else Strength.ITERATIVE)


CAPS = AttackCaps(
    Access.GRADIENT,
    frozenset({"linf", "l2"}),
    frozenset({"minimise", "targeted"}),
    stochastic=True,
    warm_start=True,
    modality="image-text",
)

ATTACKS: list[Spec] = [
    Spec(
        "caption-pgd",
        "advplug_clip.attack_specs:caption_pgd",
        CAPS,
        "PGD on the similarity of an image and its own captions, or toward other captions",
        "Madry et al. 2017, arXiv 1706.06083; Zhang et al. 2022, arXiv 2206.09391",
        narrow=_caps,
    )
]
