"""Finished runs are handed to trackers; one that fails is told of and costs nothing else. No torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advplug.contracts import Tracker
from advplug.errors import AdvplugError, PluginError
from advplug.parse import parse_reference
from advplug.plans import Bound, bind
from advplug.registry import registry
from advplug.results import RunResult


@dataclass(frozen=True)
class Tracked:
    """What became of one tracker's part, in a line."""

    ok: bool
    text: str


def trackers(references: Sequence[str]) -> list[Bound]:
    """What was asked for, checked and not yet made. Raises UsageError."""
    return [bind(registry(), "tracker", parse_reference(text)) for text in dict.fromkeys(references)]


def made(asked: Sequence[Bound]) -> list[tuple[str, Tracker]]:
    """The trackers by name: made before a run, so that what is wrong with one is known before hours are spent.

    Raises UsageError.
    """
    return [(tracker.label, _made(tracker)) for tracker in asked]


def _made(tracker: Bound) -> Tracker:
    try:
        found: Tracker = tracker.make()
    except AdvplugError:
        raise
    except Exception as error:  # the plugin's code may raise anything
        raise PluginError(f"tracker '{tracker.label}' cannot be made: {_one_line(error)}") from error
    return found


def track(result: RunResult, ready: Sequence[tuple[str, Tracker]]) -> list[Tracked]:
    """Hands the result to every tracker, one after the other. Raises nothing that a tracker raises."""
    if not ready:
        return []
    with tempfile.TemporaryDirectory(prefix="advplug-") as folder:
        files, told = _files(result, Path(folder))
        return [*told, *(_tracked(name, tracker, result, files) for name, tracker in ready)]


def _tracked(name: str, tracker: Tracker, result: RunResult, files: dict[str, Path]) -> Tracked:
    try:
        where = tracker(result, dict(files))
    except (Exception, SystemExit) as error:  # the results are kept; no tracker may cost them
        kept = f"; the results are kept in {result.run.output}" if result.run.output else ""
        return Tracked(False, f"tracker '{name}' failed: {_one_line(error)}{kept}")
    return Tracked(True, f"tracked by '{name}'" + (f": {' '.join(str(where).split())}" if where else ""))


def _files(result: RunResult, folder: Path) -> tuple[dict[str, Path], list[Tracked]]:
    """What trackers may keep beside the figures, and why the report is not among it."""
    files = {"result.json": folder / "result.json"}
    files["result.json"].write_text(json.dumps(result.to_json(), indent=2, allow_nan=False), encoding="utf-8")
    if result.run.output is None or not result.done:
        return files, []
    try:
        from advplug.report.page import write

        files["report.html"] = write(Path(result.run.output), folder / "report.html")
    except Exception as error:  # a report that cannot be drawn is no reason to lose the figures
        return files, [Tracked(False, f"trackers get no report: {_one_line(error)}")]
    return files, []


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AdvplugError) else f"{type(error).__name__}: {text}" if text else repr(error)


def named(tracker: Any) -> str:
    """What a tracker of the user's own is called."""
    return str(getattr(tracker, "__name__", type(tracker).__name__))
