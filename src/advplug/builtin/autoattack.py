"""FAB-T and the AutoAttack cascade: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.builtin.gradient import Precision, apgd, apgd_t
from advplug.contracts import Access, AttackCaps, Param, Spec, Strength, Targeted

if TYPE_CHECKING:
    from advplug.attacks.cascade import Cascade, Part
    from advplug.attacks.fab import FabT
    from advplug.contracts import Goal
    from advplug.victim import Victim


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
    from advplug.attacks.fab import FabT

    return FabT(steps, n_targets, alpha_max, eta, beta)


def autoattack(
    steps: Annotated[int, Param("steps of each gradient part and target", ge=1)] = 100,
    n_targets: Annotated[int, Param("wrong classes that apgd-t and fab-t try, best-scoring first", ge=1)] = 9,
    queries: Annotated[int, Param("questions an image that square may ask", ge=1)] = 5000,
    draws: Annotated[int, Param("samples that make one gradient of a randomised victim", ge=1)] = 20,
    precision: Precision = "auto",
) -> Cascade:
    """apgd-ce, apgd-t, fab-t and square; for randomised victims apgd-ce and apgd-dlr."""
    from advplug.attacks.cascade import Cascade, Part
    from advplug.attacks.square import Square

    def choose(victim: Victim, goal: Goal) -> tuple[Part, ...]:
        if victim.stochastic:
            # The published version for randomised victims ("rand"); the ratio loss needs 3 classes, targeted 4.
            second: Literal["dlr", "margin"] = (
                "dlr" if victim.classes >= (4 if isinstance(goal, Targeted) else 3) else "margin"
            )
            return (
                Part("apgd-ce", apgd(steps, draws=draws, precision=precision)),
                Part(f"apgd-{second}", apgd(steps, loss=second, draws=draws, precision=precision)),
            )
        return (
            Part("apgd-ce", apgd(steps, precision=precision)),
            Part("apgd-t", apgd_t(steps, n_targets=n_targets, precision=precision)),
            Part("fab-t", fab_t(steps, n_targets)),
            Part("square", Square(queries), gradient=False),
        )

    return Cascade(choose)


def _effort(params: Mapping[str, Any]) -> tuple[float, float]:
    """All parts on an image that none of them breaks."""
    steps, aims = params["steps"], params["n_targets"]
    if params["stochastic"]:
        return 2 * (steps + 1), 2 * steps
    return (1 + aims) * (steps + 1) + aims * steps + params["queries"], (1 + 2 * aims) * steps


ATTACKS: list[Spec] = [
    Spec(
        "autoattack",
        "advplug.builtin.autoattack:autoattack",
        AttackCaps(
            Access.GRADIENT,
            frozenset({"linf", "l2"}),
            frozenset({"untargeted", "targeted"}),
            Strength.STRONG,
            stochastic=True,
        ),
        "AutoAttack: APGD-CE, APGD-T, FAB-T and Square, each on what the others left standing",
        "Croce and Hein 2020, arXiv 2003.01690",
        effort=_effort,
    ),
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
