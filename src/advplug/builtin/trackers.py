"""The tracker that needs nothing: a log of runs in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from advplug.contracts import Param, Spec, Tracker, TrackerCaps
from advplug.errors import UsageError

if TYPE_CHECKING:
    from advplug.results import RunResult


def jsonl(
    file: Annotated[Path, Param("file to append to; made where there is none", positional=True)],
) -> Tracker:
    """Appends a JSON object a line for every threat, certificate and attack on training data of a run.

    Each has the columns of `advplug export` and when, by which command and with which versions it was made.
    """
    if not file.expanduser().absolute().parent.is_dir():
        raise UsageError(f"the folder of {file} does not exist; create it first")

    def track(result: RunResult, files: Mapping[str, Path]) -> str:
        from advplug.export import row_of

        when = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"tracked": when, "command": result.run.command, "versions": result.run.versions}
        parts = (("threat", result.threats), ("certificate", result.certificates), ("poisoning", result.poisonings))
        rows = [{**head, "kind": kind, **row_of(item)} for kind, items in parts for item in items]
        # One write, so that runs that end at the same time do not mix their lines.
        with file.expanduser().open("a", encoding="utf-8") as log:
            log.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        return f"{len(rows)} line{'' if len(rows) == 1 else 's'} in {file}"

    return track


TRACKERS = [Spec("jsonl", "advplug.builtin.trackers:jsonl", TrackerCaps(), "appends a line a figure to a file of JSON")]
