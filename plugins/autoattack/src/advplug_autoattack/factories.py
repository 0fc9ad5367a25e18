"""Parameters of the attacks, with the published defaults. Torch is imported only when an attack is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from advplug.contracts import Access, Param
from advplug.errors import UsageError

if TYPE_CHECKING:
    from advplug.wrapping import Call, Wrapped

# Fewer than five steps leave no room for the three radii of the L1 schedule.
Steps: TypeAlias = Annotated[int, Param("gradient steps a run", ge=5)]
Restarts: TypeAlias = Annotated[int, Param("random starts, later ones only for survivors", ge=1)]
Targets: TypeAlias = Annotated[int, Param("likeliest other classes to aim at; never more than there are", ge=1)]
Queries: TypeAlias = Annotated[int, Param("Square's steps, one query an image each", ge=1)]
Draws: TypeAlias = Annotated[int, Param("samples a gradient is averaged over; 1 is enough for fixed victims", ge=1)]


def _wrapped(label: str, call: Call, access: Access = Access.GRADIENT) -> Wrapped:
    from advplug.wrapping import Wrapped

    return Wrapped(label, call, access)


def standard(steps: Steps = 100, targets: Targets = 9, queries: Queries = 5000) -> Wrapped:
    """The published ensemble. In L1, as published, APGD-CE starts 5 times and APGD-T aims at 5 classes at most."""
    from advplug_autoattack import parts

    return _wrapped("aa.standard", parts.Standard(steps, targets, queries))


def plus(steps: Steps = 100, restarts: Restarts = 5, targets: Targets = 9, queries: Queries = 5000) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.plus", parts.Plus(steps, restarts, targets, queries))


def rand(steps: Steps = 100, draws: Draws = 20) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.rand", parts.Rand(steps, draws))


def apgd_ce(steps: Steps = 100, restarts: Restarts = 1, draws: Draws = 1) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.apgd-ce", parts.Apgd("ce", steps, restarts, draws))


def apgd_dlr(steps: Steps = 100, restarts: Restarts = 1, draws: Draws = 1) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.apgd-dlr", parts.Apgd("dlr", steps, restarts, draws))


def apgd_t(steps: Steps = 100, targets: Targets = 9, restarts: Restarts = 1, draws: Draws = 1) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.apgd-t", parts.ApgdTargeted(steps, targets, restarts, draws))


def fab(steps: Steps = 100, restarts: Restarts = 5) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.fab", parts.Fab(steps, restarts))


def fab_t(steps: Steps = 100, targets: Targets = 9) -> Wrapped:
    from advplug_autoattack import parts

    return _wrapped("aa.fab-t", parts.FabTargeted(steps, targets))


def square(
    queries: Annotated[int, Param("most that is asked about an image, over all restarts", ge=4)] = 5000,
    restarts: Restarts = 1,
    first: Annotated[float, Param("share of the pixels in the first squares", gt=0, le=1)] = 0.8,
    rescale: Annotated[bool, Param("shrink the squares over these queries; no: over 10000, as in AutoAttack")] = False,
) -> Wrapped:
    from advplug_autoattack import parts

    # Asked beside its steps: the clean image once, and in each restart the start and the end.
    steps = (queries - 1) // restarts - 2
    if steps < 1:
        raise UsageError(f"aa.square: {restarts} restarts need at least {3 * restarts + 1} queries, got {queries}")
    return _wrapped("aa.square", parts.Square(steps, restarts, first, rescale), Access.SCORE)
