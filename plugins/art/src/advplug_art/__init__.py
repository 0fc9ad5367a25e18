"""The Adversarial Robustness Toolbox as an advplug plugin: its attacks and defenses under names `art.NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_art.attack_table import ATTACKS
from advplug_art.defense_table import DEFENSES
from advplug_art.poison_defense_table import POISON_DEFENSES
from advplug_art.poison_specs import POISONS

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_attacks() -> list[Spec]:
    """Attacks on images and on training data."""
    return [*ATTACKS, *POISONS]


@hookimpl
def advplug_defenses() -> list[Spec]:
    """Defenses of images, answers and training data."""
    return [*DEFENSES, *POISON_DEFENSES]
