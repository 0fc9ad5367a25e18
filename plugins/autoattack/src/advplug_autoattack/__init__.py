"""AutoAttack, its variants and its parts, from the authors' own code, under names `aa.NAME`.

Imported whenever plugins are listed: no torch here, nor in the factories.
"""

from __future__ import annotations

from dataclasses import replace

from advplug.contracts import Access, AttackCaps, Spec, Strength
from advplug.hooks import hookimpl

_AUTOATTACK = "Croce and Hein 2020, arXiv 2003.01690"
_FAB = "Croce and Hein 2020, arXiv 1907.02044"
_SQUARE = "Andriushchenko et al. 2020, arXiv 1912.00049"
_L1 = "L1: Croce and Hein 2021, arXiv 2103.01208"

_APGD = AttackCaps(
    Access.GRADIENT,
    frozenset({"linf", "l2", "l1"}),
    strength=Strength.STRONG,
    stochastic=True,
    per_batch=True,
)
_NO_L1 = replace(_APGD, norms=frozenset({"linf", "l2"}))
_FEWER = (4, "below 4 classes there is no targeted DLR loss: APGD-T climbs the cross-entropy")
_TWO = (3, "with 2 classes there is no DLR loss: APGD-DLR is left out")
_DLR = replace(_APGD, min_classes=3)
_FAB_CAPS = replace(_APGD, strength=Strength.ITERATIVE)
_FAB_T = replace(_FAB_CAPS, stochastic=False, per_batch=False)
_SQUARE_CAPS = replace(
    _APGD, access=Access.SCORE, goals=frozenset({"untargeted", "targeted"}), strength=Strength.ITERATIVE
)


def _spec(name: str, factory: str, caps: AttackCaps, summary: str, *papers: str) -> Spec:
    return Spec(f"aa.{name}", f"advplug_autoattack.factories:{factory}", caps, summary, paper="; ".join(papers))


ATTACKS = [
    _spec("standard", "standard", replace(_APGD, fewer_classes=(_FEWER,)),
          "AutoAttack: APGD-CE, APGD-T, FAB-T, Square, each on what is left; below 4 classes APGD-T uses cross-entropy",
          _AUTOATTACK, _L1),
    _spec("plus", "plus", replace(_NO_L1, fewer_classes=(_FEWER, _TWO)),
          "AutoAttack+: APGD-CE, APGD-DLR, FAB, Square, APGD-T, FAB-T; with 2 classes without APGD-DLR",
          _AUTOATTACK),
    _spec("rand", "rand", replace(_NO_L1, fewer_classes=(_TWO,)),
          "AutoAttack for randomised victims: APGD-CE and APGD-DLR on averaged gradients; with 2 classes APGD-CE alone",
          _AUTOATTACK),
    _spec("apgd-ce", "apgd_ce", _APGD, "Auto-PGD on cross-entropy", _AUTOATTACK, _L1),
    _spec("apgd-dlr", "apgd_dlr", _DLR, "Auto-PGD on the difference of logits ratio", _AUTOATTACK, _L1),
    _spec("apgd-t", "apgd_t", replace(_APGD, fewer_classes=(_FEWER,)),
          "Auto-PGD towards each likely class in turn; below 4 classes on cross-entropy instead of DLR",
          _AUTOATTACK, _L1),
    _spec("fab", "fab", _FAB_CAPS, "FAB: projections on linearised decision boundaries, kept within eps", _FAB),
    _spec("fab-t", "fab_t", _FAB_T, "FAB towards each likely class in turn", _FAB),
    _spec("square", "square", _SQUARE_CAPS, "Random search with squares, by scores alone", _SQUARE, _L1),
]  # fmt: skip


@hookimpl
def advplug_attacks() -> list[Spec]:
    """AutoAttack and its parts."""
    return ATTACKS
