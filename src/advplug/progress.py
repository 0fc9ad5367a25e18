"""What a run tells while it goes on: stages, images, and how many cells are done. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

EARLY = 0.05
"""The share of a run's passes before which the time left is not told: its first training would count too much."""


class Progress(Protocol):
    """Where the runner says what it does; every call is cheap and may be ignored."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None: ...


@runtime_checkable
class CellProgress(Progress, Protocol):
    """One that is told of the cells of a run, too: how many of all are done, and the seconds that the rest takes,
    None as long as that is not known."""

    def cells(self, done: int, total: int, left: float | None) -> None: ...


class Silent:
    """Says nothing."""

    def stage(self, text: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Share:
    """What a sweep, an audit, a certificate or a poisoning is of a run: its cells, and the passes forecast for it."""

    cells: int = 1
    passes: int = 1


class Tally:
    """Counts what is done of `todo`, shares by key, beside `before` cells that were stored already.

    The time left follows from the time that passed and the forecast, and is never more than `most` seconds in all.
    """

    def __init__(
        self, progress: Progress, todo: Mapping[str, Share], before: int = 0, most: float | None = None
    ) -> None:
        self._told = progress if isinstance(progress, CellProgress) else None
        self._todo, self._most, self._began = dict(todo), most, time.perf_counter()
        self.total = before + sum(share.cells for share in todo.values())
        self.done = before
        self._spent, self._all = 0, sum(share.passes for share in todo.values())
        self._tell()

    @property
    def seconds_left(self) -> float | None:
        """None until enough is done to tell."""
        left = self._all - self._spent
        if not left or self._spent < EARLY * self._all:
            return None if left else 0.0
        passed = time.perf_counter() - self._began
        rest = passed * left / self._spent
        return rest if self._most is None else max(0.0, min(rest, self._most - passed))

    def settled(self, key: str) -> None:
        """That is done, or failed; a key that was not to be done is passed over."""
        share = self._todo.pop(key, None)
        if share is not None:
            self.done += share.cells
            self._spent += share.passes
            self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told.cells(self.done, self.total, self.seconds_left)


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
