"""Training of CLIP models that withstands poisoned pairs, as an advplug plugin: SafeCLIP, RoCLIP and CleanCLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_safeclip.defense_specs import DEFENSES

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_defenses() -> list[Spec]:
    """Defenses against poisoned training pairs."""
    return DEFENSES
