"""Transfer attacks: parameters and spec. Torch is imported only when an attack is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

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

    entry, params = _inner(attack)
    caps, surrogate = entry.spec.caps, cast("Any", from_)
    assert isinstance(caps, AttackCaps)
    return Transfer(surrogate, entry.make(params), str(attack), caps)


def _inner(attack: Stack) -> tuple[Entry, dict[str, Any]]:
    """The attack that crafts, with its parameters. Raises UsageError for one that has no images to hand over."""
    from advplug.registry import registry

    if len(attack) != 1:
        raise UsageError(f"transfer: attack takes one attack, like ({CRAFTED_BY}), got '{attack}'")
    (reference,) = attack
    entry = registry().get("attack", reference.name)
    caps = entry.spec.caps
    assert isinstance(caps, AttackCaps)
    if caps.minimum_norm or entry.name == "transfer" or caps.access is Access.TRAINING_SET:
        raise UsageError(f"transfer: {entry.name} has no images of a given budget to hand over; use one like pgd")
    params = entry.bind(reference)
    # An image that just fools the surrogate rarely fools anybody else.
    if "keep_going" in params and reference.get("keep_going") is None:
        params["keep_going"] = True
    return entry, params


def needs(bound: Mapping[str, Any]) -> dict[str, VictimRef]:
    """No victims but `from`; a mistake in `attack` is found here, before anything is trained. Raises UsageError."""
    if "attack" in bound:
        _inner(bound["attack"])
    return {}


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
        needs=needs,
    )
]
