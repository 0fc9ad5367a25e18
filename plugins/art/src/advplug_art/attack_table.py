"""Attacks of ART: one row each. Imports no torch and no ART."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advplug.contracts import Spec

ATTACKS: list[Spec] = []
