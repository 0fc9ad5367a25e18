"""Attacks on training data as an advplug plugin: backdoors and targeted poisoning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from advplug_poisoning.specs import ATTACKS

if TYPE_CHECKING:
    from advplug.contracts import Spec

hookimpl = pluggy.HookimplMarker("advplug")


@hookimpl
def advplug_attacks() -> list[Spec]:
    """Attacks on training data."""
    return ATTACKS
