"""Content keys: a sha256 over canonical JSON, so that the same recipe always has the same name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from advplug.params import plain

SCHEMA = 1
"""Version of the results, part of every key: raised when the meaning of all changes, of trained networks, too."""
CELLS = 3
"""Raised when the meaning of cells alone changes: earlier ones are then computed anew."""
RANDOMISED = 1
"""Likewise of cells in which answers are drawn at random."""
POISONINGS = 1
"""Likewise of attacks on training data."""


def digest(recipe: Mapping[str, Any]) -> str:
    """The first 32 hex digits of the sha256 of `recipe` in canonical JSON."""
    text = json.dumps(plain(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
