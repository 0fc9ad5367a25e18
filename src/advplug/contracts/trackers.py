"""What keeps runs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from advplug.results import RunResult


class Tracker(Protocol):
    """Keeps a run that has come to its end: in an experiment tracker, in a log, in a message to a team.

    `files` are what is worth keeping beside the figures, by name: `result.json`, what `eval --json` prints, and
    `report.html` where the run was kept in a folder. They are gone once the call returns, so a tracker copies them.
    Returns where the run can be looked at, as one line, or None. It may raise anything: the results are kept by then,
    and the failure is told in one line.
    """

    def __call__(self, result: RunResult, files: Mapping[str, Path]) -> str | None: ...
