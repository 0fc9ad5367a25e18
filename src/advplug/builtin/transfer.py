"""Transfer attacks: parameters and spec. Torch is imported only when an attack is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from advplug.contracts import Access, AttackCaps, Param, Spec, Stack, Strength, VictimRef
from advplug.defaults import CRAFTED_BY
from advplug.errors import UsageError
from advplug.parse import parse_reference

if TYPE_CHECKING:
    from advplug.attacks.transfer import Transfer
    from advplug.registry import Entry

INNER = Stack((parse_reference(CRAFTED_BY),))


def transfer(
    from_: Annotated[VictimRef, Param("what it is crafted on: a model, or (MODEL+DEFENSE)")],
    attack: Annotated[Stack, Param(f"how, as ({CRAFTED_BY}); loss-maximising attacks take all their steps")] = INNER,
) -> Transfer:
    """Crafts on a surrogate."""
    from advplug.attacks.transfer import Transfer

    entry, params, caps = _inner(attack)
    surrogate: Any = from_
    return Transfer(surrogate, entry.make(params), str(attack), caps)


def _inner(attack: Stack) -> tuple[Entry, dict[str, Any], AttackCaps]:
    """The attack that crafts, its parameters and what it can do with them.

    Raises UsageError for one that has no images to hand over.
    """
    from advplug.registry import registry

    if len(attack) != 1:
        raise UsageError(f"transfer: attack takes one attack, like ({CRAFTED_BY}), got '{attack}'")
    (reference,) = attack
    entry = registry().get("attack", reference.name)
    params = entry.bind(reference)
    caps = entry.spec.caps_of(params)
    assert isinstance(caps, AttackCaps)
    if caps.minimum_norm or entry.name == "transfer" or caps.access is Access.TRAINING_SET:
        raise UsageError(f"transfer: {entry.name} has no images of a given budget to hand over; use one like pgd")
    # An image that just fools the surrogate rarely fools anybody else.
    if "keep_going" in params and reference.get("keep_going") is None:
        params["keep_going"] = True
    return entry, params, caps


def _caps(bound: Mapping[str, Any]) -> AttackCaps:
    """What the crafting attack can do, as far as its images say what was done to them. Raises UsageError."""
    entry, _, caps = _inner(bound["attack"])
    norms = caps.norms - {"spatial"}
    if not norms:
        raise UsageError(f"transfer: what {entry.name} does cannot be read off its images; use one like pgd")
    strength = min(caps.strength, Strength.ONE_STEP)
    return replace(caps, access=Access.DECISION, norms=norms, strength=strength, stochastic=True, warm_start=False)


def _effort(params: Mapping[str, Any]) -> tuple[float, float]:
    """What crafting takes, on the surrogate."""
    from advplug.costs.forecast import effort_by

    entry, inner, caps = _inner(params["attack"])
    made = effort_by(entry.spec.effort, {**inner, "classes": params["classes"], "stochastic": False}, caps)
    return made.forward, made.backward


ATTACKS: list[Spec] = [
    Spec(
        "transfer",
        "advplug.builtin.transfer:transfer",
        AttackCaps(
            Access.DECISION,
            frozenset({"linf", "l2", "l1"}),
            frozenset({"untargeted", "targeted"}),
            Strength.ONE_STEP,
            stochastic=True,
        ),
        "Crafted on another model or defended model, judged on the victim",
        "Szegedy et al. 2013, arXiv 1312.6199, section 4.2; Papernot et al. 2016, arXiv 1605.07277",
        narrow=_caps,
        effort=_effort,
    )
]
