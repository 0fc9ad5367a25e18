"""A tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from advplug.contracts import Param, Tracker

if TYPE_CHECKING:
    from advplug.results import RunResult


def count(file: Annotated[Path, Param("file to write to")]) -> Tracker:
    """Writes how many cells a run has, and what it was given beside them."""

    def track(result: RunResult, files: Mapping[str, Path]) -> str:
        file.write_text(", ".join([f"{len(result.cells)} cells", *files]) + "\n")
        return str(file)

    return track
