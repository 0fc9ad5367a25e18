"""What a run tells while it goes on: stages, images, and how many cells are done. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


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
    """What one sweep, certificate or poisoning is of a run: its cells, and the passes that are forecast for it."""

    cells: int = 1
    passes: int = 1


@dataclass
class Tally:
    """Counts what is done of `todo`, shares by key, beside `before` cells that were stored already.

    The time left follows from the time that passed and the forecast, and is never more than `most` seconds in all.
    """

    progress: Progress
    todo: Mapping[str, Share]
    before: int = 0
    most: float | None = None
    _left: dict[str, Share] = field(init=False)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._left = dict(self.todo)
        self._tell()

    @property
    def total(self) -> int:
        return self.before + sum(share.cells for share in self.todo.values())

    @property
    def done(self) -> int:
        return self.total - sum(share.cells for share in self._left.values())

    @property
    def seconds_left(self) -> float | None:
        """None until something is done."""
        left = sum(share.passes for share in self._left.values())
        spent = sum(share.passes for share in self.todo.values()) - left
        if not spent:
            return None
        passed = time.perf_counter() - self._began
        rest = passed * left / spent
        return rest if self.most is None else max(0.0, min(rest, self.most - passed))

    def settled(self, key: str) -> None:
        """That is done, or failed; a key that was not to be done is passed over."""
        if self._left.pop(key, None) is not None:
            self._tell()

    def _tell(self) -> None:
        if isinstance(self.progress, CellProgress):
            self.progress.cells(self.done, self.total, self.seconds_left)


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
