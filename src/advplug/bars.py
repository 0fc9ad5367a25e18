"""Bars on a terminal: one of all cells, one of what is at work, each with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Left(ProgressColumn):
    """The time that is left: as the task was told, or by its own speed."""

    def __init__(self) -> None:
        super().__init__()
        self._by_speed = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        if not task.fields["told"]:
            return self._by_speed.render(task)
        left = task.fields["left"]
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


class Bars:
    """Follows a run; the bars vanish at its end."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._all = bar.add_task("cells", total=None, visible=False, told=True, left=None)
        self._now = bar.add_task("starting", total=None, told=False, left=None)

    def cells(self, done: int, total: int, left: float | None) -> None:
        self._bar.update(self._all, completed=done, total=total, left=left, visible=True)

    def stage(self, text: str, total: int) -> None:
        self._bar.reset(self._now, description=text, total=total or None, completed=0)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._now, steps)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Left()


@contextmanager
def bars() -> Iterator[Bars]:
    """On standard error."""
    with Progress(*columns(), console=Console(stderr=True, emoji=False), transient=True) as bar:
        yield Bars(bar)
