"""Attacks by scores alone: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from advplug.contracts import Access, AttackCaps, Param, Spec, Strength

if TYPE_CHECKING:
    from advplug.attacks.square import Square


def square(
    queries: Annotated[int, Param("questions to the model, an image and restart", ge=1)] = 5000,
    p_init: Annotated[float, Param("share of the pixels that the first windows cover", gt=0, le=1)] = 0.8,
    rescale: Annotated[bool, Param("shrink windows by the share of queries spent; no: by their number")] = False,
    restarts: Annotated[int, Param("starts, later ones only for survivors", ge=1)] = 1,
) -> Square:
    """Random search over square windows; no gradient is needed."""
    from advplug.attacks.square import Square

    return Square(queries, p_init, rescale, restarts)


ATTACKS: list[Spec] = [
    Spec(
        "square",
        "advplug.builtin.blackbox:square",
        AttackCaps(
            Access.SCORE,
            frozenset({"linf", "l2"}),
            frozenset({"untargeted", "targeted"}),
            Strength.ITERATIVE,
            stochastic=True,
        ),
        "Square attack: random search over square windows by scores alone",
        "Andriushchenko et al. 2019, arXiv 1912.00049",
    )
]
