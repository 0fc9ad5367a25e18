"""What a person sees while a run goes on: progress on standard error, results on standard output."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from advplug.results import RunResult

if TYPE_CHECKING:
    from advplug.runner import Progress


def quieten(verbose: bool) -> None:
    """Libraries' warnings are for developers: they show with -v only."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:
        warnings.simplefilter("ignore")


@contextmanager
def console_progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, otherwise only notes; nothing with `quiet`."""
    from advplug.runner import Silent

    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield _Notes()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar)


class _Notes:
    """Notes as plain lines, no bar."""

    def stage(self, text: str, total: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def note(self, text: str) -> None:
        click.echo(text, err=True)


class _Bar:
    """One bar that follows the stages."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def stage(self, text: str, total: int) -> None:
        self._bar.reset(self._task, description=text.replace("[", "\\["), total=total or None, completed=0)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def show_transfer(result: RunResult, as_json: bool, quiet: bool) -> None:
    """Like `show`, with one matrix a dataset and threat in place of the list of cells."""
    from advplug.transfer_table import render

    _print(result, as_json, quiet, render)


def show(result: RunResult, as_json: bool, quiet: bool) -> None:
    """Prints the result; with `as_json`, standard output holds nothing but one JSON object."""
    from advplug.table import render

    _print(result, as_json, quiet, render)


def _print(result: RunResult, as_json: bool, quiet: bool, render: Callable[[RunResult], str]) -> None:
    click.echo(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else render(result))
    if not quiet and not as_json and result.run.output:
        click.echo(f"kept in {result.run.output}: the same command again computes only what is missing", err=True)
