"""All attacks of ART that are registered. Imports no torch and no ART."""

from __future__ import annotations

from advplug.contracts import Spec
from advplug_art import blackbox_rows, gradient_rows, other_rows
from advplug_art.rows import Row

ROWS: dict[str, Row] = {row.name: row for row in (*gradient_rows.ROWS, *blackbox_rows.ROWS, *other_rows.ROWS)}
ATTACKS: list[Spec] = [row.spec() for row in ROWS.values()]
