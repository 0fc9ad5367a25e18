"""adv-lib's attacks, most of them in search of the smallest change, under names `adv.NAME`.

Imported whenever plugins are listed: no torch here, nor in the table.
"""

from __future__ import annotations

from advplug.contracts import Spec
from advplug.hooks import hookimpl
from advplug_advlib.table import ROWS


@hookimpl
def advplug_attacks() -> list[Spec]:
    """One attack a row of the table."""
    return [row.spec() for row in ROWS]
