"""Defenses of ART: names, what they are made of, parameters. Imports no torch and no ART."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advplug.contracts import Spec

DEFENSES: list[Spec] = []
