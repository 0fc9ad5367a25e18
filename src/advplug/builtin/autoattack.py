"""FAB-T and the AutoAttack cascade: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from advplug.contracts import Access, AttackCaps, Param, Spec, Strength

if TYPE_CHECKING:
    from advplug.fab import FabT


def fab_t(
    steps: Annotated[int, Param("steps toward each class", ge=1)] = 100,
    n_targets: Annotated[
        int, Param("wrong classes to try, best-scoring first; with target= only that one is", ge=1)
    ] = 9,
    alpha_max: Annotated[float, Param("most that a step is drawn toward the clean image", ge=0, le=1)] = 0.1,
    eta: Annotated[float, Param("overshoot beyond the boundary", ge=1)] = 1.05,
    beta: Annotated[float, Param("share of a success that the step back keeps", ge=0, le=1)] = 0.9,
) -> FabT:
    """Steps along the linearised boundary to each of several classes."""
    from advplug.fab import FabT

    return FabT(steps, n_targets, alpha_max, eta, beta)


ATTACKS: list[Spec] = [
    Spec(
        "fab-t",
        "advplug.builtin.autoattack:fab_t",
        AttackCaps(
            Access.GRADIENT,
            frozenset({"linf", "l2", "l1"}),
            frozenset({"untargeted", "targeted"}),
            Strength.ITERATIVE,
            minimum_norm=True,
        ),
        "Fast adaptive boundary attack toward each of the best-scoring wrong classes: the smallest change",
        "Croce and Hein 2019, arXiv 1907.02044; written from the paper",
    ),
]
