"""The Adversarial Robustness Toolbox as an advplug plugin: its attacks and defenses under names `art.NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_art.attack_table import ATTACKS
from advplug_art.defense_table import DEFENSES

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_attacks() -> list[Spec]:
    """Evasion attacks."""
    return ATTACKS


@hookimpl
def advplug_defenses() -> list[Spec]:
    """Defenses."""
    return DEFENSES
