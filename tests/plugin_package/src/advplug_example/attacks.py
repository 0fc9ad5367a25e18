"""A random search and a transfer attack. Listing them reads their signatures, so torch waits for their first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from advplug.contracts import Batch, Crafted, EvasionAttack, Threat
from advplug.errors import UsageError
from advplug.params import Param
from advplug.parse import Stack, VictimRef, parse_stack
from advplug.registry import registry
from advplug.rng import Stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from advplug.victim import Victim


def noise(tries: Annotated[int, Param("sign patterns to try", ge=1)] = 4) -> EvasionAttack:
    """Tries sign patterns at full budget until one is answered wrongly."""
    import torch

    def attack(victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        def pattern(generator: torch.Generator) -> Tensor:
            return torch.randint(0, 2, batch.x.shape[1:], generator=generator) * 2 - 1

        found = batch.x.clone()
        for i in range(tries):
            sign = rng.per_image(pattern, batch.index, i).to(batch.x)
            candidate = (batch.x + threat.eps * sign).clamp(0, 1)
            # Solved images keep what solved them.
            open_still = victim.decide(found).label == batch.y
            found = torch.where(open_still[:, None, None, None], candidate, found)
        return Crafted(found)

    return attack


def transfer(
    from_: Annotated[VictimRef, Param("the victim that it is crafted on")],
    attack: Annotated[Stack, Param("the attack that crafts")] = parse_stack("pgd:steps=5"),  # noqa: B008
) -> EvasionAttack:
    """Crafts on a victim of the attacker's own; the attacked one is never asked."""
    surrogate: Any = from_  # the built victim stands in its place
    if len(attack) != 1:
        raise UsageError(f"attack takes one attack, got '{attack}'")
    entry = registry().get("attack", attack.parts[0].name)
    crafting: EvasionAttack = entry.make(entry.bind(attack.parts[0]))

    def run(victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        # The trace tells of the surrogate, not of the attacked victim: it is left out.
        return Crafted(crafting(surrogate, batch, threat, rng).x)

    return run
