"""torchattacks' attacks as `ta.NAME`. This module is imported whenever plugins are listed, so it imports no torch."""

from __future__ import annotations

from advplug.contracts import Spec
from advplug.hooks import hookimpl
from advplug_torchattacks.table import LEFT_OUT, ROWS

__all__ = ["LEFT_OUT", "advplug_attacks"]


@hookimpl
def advplug_attacks() -> list[Spec]:
    """One spec a row of the table."""
    return [row.spec() for row in ROWS]
