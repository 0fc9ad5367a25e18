"""The errors that end in one clear line. Each carries the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdvplugError(Exception):
    """An expected failure: its text says what is wrong and what to do about it."""

    exit_code = 4

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class UsageError(AdvplugError):
    """A name, parameter, file or combination that cannot be used as given."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no plugin registers."""


class PluginError(UsageError):
    """A plugin that cannot be used: broken, duplicated, or in breach of its contract."""


class CellFailure(AdvplugError):  # noqa: N818 - it is the status of a cell
    """One cell cannot be computed; the others go on and the cell's status becomes `failed`."""

    exit_code = 3


class GateError(AdvplugError):
    """A number is worse than a gate allows."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'pgd'?` for a near miss among `known`, otherwise an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
