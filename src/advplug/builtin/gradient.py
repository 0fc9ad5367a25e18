"""Gradient attacks: parameters and specs. Torch is imported only when an attack is made."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from advplug.contracts import Access, AttackCaps, Norm, Param, Spec, Stack, Strength

if TYPE_CHECKING:
    from advplug.attacks.engine import GradientAttack

Steps: TypeAlias = Annotated[int, Param("gradient steps", ge=1)]
Alpha: TypeAlias = Annotated[Fraction | None, Param("step in pixel units; none: a share of eps", gt=0)]
Restarts: TypeAlias = Annotated[int, Param("starts, later ones only for survivors", ge=1)]
LossName: TypeAlias = Annotated[Literal["ce", "margin", "dlr"], Param("loss that is maximised")]
KeepGoing: TypeAlias = Annotated[bool, Param("take all steps and keep the iterate of highest loss")]
Draws: TypeAlias = Annotated[int, Param("samples that make one gradient of a randomised victim", ge=1)]
Precision: TypeAlias = Annotated[
    Literal["auto", "float32"],
    Param("auto: the fastest of float32 and bfloat16, by a short timing; decisions stay float32"),
]

AUTO: Any = "auto"


def _make(**fields: Any) -> GradientAttack:
    from advplug.attacks.engine import GradientAttack

    return GradientAttack(**fields)


def _share(steps: int) -> float:
    """A step of 2.5 eps / steps, as Madry et al. advise: it can cross the ball and still settle."""
    return min(1.0, 2.5 / steps)


def fgsm(loss: LossName = "ce", draws: Draws = 1, keep_going: KeepGoing = False) -> GradientAttack:
    """One step of length eps from the clean image."""
    return _make(steps=1, fraction=1.0, start="clean", loss=loss, draws=draws, keep_going=keep_going)


def ifgsm(
    steps: Steps = 10,
    alpha: Alpha = None,
    loss: LossName = "ce",
    draws: Draws = 1,
    keep_going: KeepGoing = False,
    precision: Precision = "auto",
) -> GradientAttack:
    """Steps from the clean image; alpha is 2.5 eps / steps unless given."""
    return _make(
        steps=steps, alpha=alpha, fraction=_share(steps), start="clean", loss=loss, draws=draws,
        keep_going=keep_going, precision=precision,
    )  # fmt: skip


def mifgsm(
    steps: Steps = 10,
    alpha: Alpha = None,
    decay: Annotated[float, Param("share of the momentum that is kept", ge=0)] = 1.0,
    loss: LossName = "ce",
    draws: Draws = 1,
    keep_going: KeepGoing = False,
    precision: Precision = "auto",
) -> GradientAttack:
    """Steps along accumulated gradients; alpha is eps / steps unless given."""
    return _make(
        rule="momentum", steps=steps, alpha=alpha, fraction=1 / steps, decay=decay, start="clean", loss=loss,
        draws=draws, keep_going=keep_going, precision=precision,
    )  # fmt: skip


def pgd(
    steps: Steps = 20,
    alpha: Alpha = None,
    restarts: Restarts = 1,
    random_start: Annotated[bool, Param("begin at a random point; no: at the clean image")] = True,
    loss: LossName = "ce",
    draws: Draws = 1,
    keep_going: KeepGoing = False,
    precision: Precision = "auto",
) -> GradientAttack:
    """Projected gradient ascent; alpha is 2.5 eps / steps unless given."""
    return _make(
        steps=steps, alpha=alpha, fraction=_share(steps), restarts=restarts, loss=loss, draws=draws,
        start="uniform" if random_start else "clean", keep_going=keep_going, precision=precision,
    )  # fmt: skip


def eot_pgd(
    transforms: Annotated[
        Stack | None,
        Param("what images must survive, as rotation:degrees=15+noise:sigma=0.05; none: the victim's randomness"),
    ] = None,
    draws: Draws = 20,
    steps: Steps = 20,
    alpha: Alpha = None,
    restarts: Restarts = 1,
    loss: LossName = "ce",
    precision: Precision = "auto",
) -> GradientAttack:
    """PGD on gradients that take in draws of transformations and of the victim."""
    from advplug.attacks.transforms import build

    attack = pgd(steps=steps, alpha=alpha, restarts=restarts, loss=loss, draws=draws, precision=precision)
    return replace(attack, transforms=build(transforms))


def apgd(
    steps: Steps = 100,
    restarts: Restarts = 1,
    loss: LossName = "ce",
    draws: Draws = 1,
    keep_going: KeepGoing = False,
    precision: Precision = "auto",
) -> GradientAttack:
    """Steps from 2 eps, with momentum, halved at checkpoints where the loss stalls."""
    return _make(
        rule="adaptive", steps=steps, restarts=restarts, loss=loss, draws=draws, keep_going=keep_going,
        precision=precision,
    )  # fmt: skip


def apgd_t(
    steps: Steps = 100,
    restarts: Restarts = 1,
    n_targets: Annotated[
        int, Param("wrong classes to try, best-scoring first; with target= only that one is", ge=1)
    ] = 9,
    draws: Draws = 1,
    precision: Precision = "auto",
) -> GradientAttack:
    """APGD toward each of the best-scoring wrong classes: targeted dlr, margin below 4 classes."""
    return _make(
        rule="adaptive", steps=steps, restarts=restarts, loss="dlr", n_targets=n_targets, draws=draws,
        precision=precision,
    )  # fmt: skip


_BOTH = frozenset({"untargeted", "targeted"})


def _caps(
    norms: tuple[Norm, ...], strength: Strength, stochastic: bool = False, warm_start: bool = False
) -> AttackCaps:
    return AttackCaps(Access.GRADIENT, frozenset(norms), _BOTH, strength, stochastic, warm_start)


_TWO: tuple[Norm, ...] = ("linf", "l2")
_ALL: tuple[Norm, ...] = ("linf", "l2", "l1")
_HERE = "advplug.builtin.gradient:"

ATTACKS: list[Spec] = [
    Spec(
        "fgsm", _HERE + "fgsm", _caps(_TWO, Strength.ONE_STEP),
        "Fast gradient sign method: one step of length eps",
        "Goodfellow et al. 2014, arXiv 1412.6572",
        effort=lambda params: (2, 1),
    ),
    Spec(
        "ifgsm", _HERE + "ifgsm", _caps(_TWO, Strength.ITERATIVE, warm_start=True),
        "Iterative FGSM (BIM): small steps from the clean image",
        "Kurakin et al. 2016, arXiv 1607.02533",
    ),
    Spec(
        "mifgsm", _HERE + "mifgsm", _caps(_TWO, Strength.ITERATIVE, warm_start=True),
        "Momentum iterative FGSM",
        "Dong et al. 2017, arXiv 1710.06081",
    ),
    Spec(
        "pgd", _HERE + "pgd", _caps(_ALL, Strength.ITERATIVE, True, True),
        "Projected gradient descent from random starts",
        "Madry et al. 2017, arXiv 1706.06083; L1 steps: Tramer and Boneh 2019, arXiv 1904.13000",
    ),
    Spec(
        "eot-pgd", _HERE + "eot_pgd", _caps(_ALL, Strength.ITERATIVE, True, True),
        "PGD on gradients over draws of transformations and of a randomised victim",
        "Athalye et al. 2017, arXiv 1707.07397",
    ),
    Spec(
        "apgd", _HERE + "apgd", _caps(_TWO, Strength.STRONG, True, True),
        "Auto-PGD: step length and momentum adapt to the loss",
        "Croce and Hein 2020, arXiv 2003.01690",
    ),
    Spec(
        "apgd-t", _HERE + "apgd_t", _caps(_TWO, Strength.STRONG, True, True),
        "Auto-PGD toward each of the best-scoring wrong classes",
        "Croce and Hein 2020, arXiv 2003.01690",
    ),
]  # fmt: skip
