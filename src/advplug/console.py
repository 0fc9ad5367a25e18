"""What a person sees while a run goes on: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from advplug.progress import duration
from advplug.results import RunResult
from advplug.studies.shown_names import renamed

if TYPE_CHECKING:
    from advplug.contracts import Tracker
    from advplug.progress import Progress


EVERY = 10.0
"""Seconds between two lines of progress in a log, at least."""


def quieten(verbose: bool) -> None:
    """Libraries' warnings are for developers: they show with -v only."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:
        warnings.simplefilter("ignore")


@contextmanager
def console_progress(quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal: cells and images, each with the time that is left; otherwise lines; nothing with `quiet`."""
    from advplug.progress import Silent

    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        from advplug.bars import bars

        with bars() as shown:
            yield shown


class _Lines:
    """Plain lines for a log: notes at once, and every now and then how far the run is."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._stage, self._at, self._total = "", 0, 0
        self._cells = ""
        self._left: float | None = None

    def cells(self, done: int, total: int, left: float | None) -> None:
        self._cells, self._left, self._stage = f"{done} of {total} cells done", left, ""
        self._tell()

    def stage(self, text: str, total: int) -> None:
        self._stage, self._at, self._total = text, 0, total
        self._tell()

    def advance(self, steps: int = 1) -> None:
        self._at += steps
        self._tell()

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._last < EVERY:
            return
        self._last = now
        at = f", {self._at} of {self._total}" if self._stage and self._total else ""
        left = f", about {duration(self._left)} left" if self._left else ""
        parts = (self._cells + left, self._stage + at)
        self.note("; ".join(part for part in parts if part))


def resuming(command: str) -> str:
    """The command that goes on with what a command began: --fresh would throw that away."""
    if "--fresh" not in command:
        return command
    return shlex.join(part for part in shlex.split(command) if part != "--fresh")


def same_command(command: str) -> str:
    """The same, in words."""
    return "the same command" + ("" if resuming(command) == command else " without --fresh")


def hand_over(result: RunResult, ready: Sequence[tuple[str, Tracker]], quiet: bool) -> None:
    """Gives the result to its trackers and tells, on standard error, where it is and which of them failed."""
    from advplug.tracking import track

    for told in track(result, ready):
        if not (told.ok and quiet):
            click.echo(told.text, err=True)


def show_transfer(result: RunResult, as_json: bool, quiet: bool) -> None:
    """Like `show`, with one matrix a dataset and threat in place of the list of cells."""
    from advplug.tables.transfer import render

    _print(result, as_json, quiet, render)


def show(result: RunResult, as_json: bool, quiet: bool) -> None:
    """Prints the result; with `as_json`, standard output holds nothing but one JSON object."""
    from advplug.table import render

    _print(result, as_json, quiet, render)


def _print(result: RunResult, as_json: bool, quiet: bool, render: Callable[[RunResult], str]) -> None:
    click.echo(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else render(renamed(result)))
    if not quiet and not as_json and result.run.output:
        next_time = f"{same_command(result.run.command)} again computes only what is missing"
        if not result.run.passes and all(made.status == "ok" for made in result.done):
            next_time = "nothing was computed, all was there; --fresh computes it anew"
        click.echo(f"kept in {result.run.output}: {next_time}", err=True)
