"""What a check found, and how checks are run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from advplug.errors import AdvplugError


class Result(NamedTuple):
    """One check: `ok` is None where it could not be made."""

    name: str
    ok: bool | None
    detail: str = ""


class Breach(Exception):  # noqa: N818 - what it reports is a breach of contract
    """A check's finding: what the contract asks and what was seen."""


class Unchecked(Exception):  # noqa: N818 - a state, not an error
    """A check that cannot be made here, and why."""


class Report:
    """Collects results; a check that raises is a failed check, never the end of the others."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def check(self, name: str, test: Callable[[], object]) -> bool:
        """Runs one check; True if it passed."""
        try:
            test()
        except Unchecked as reason:
            self.results.append(Result(name, None, str(reason)))
            return False
        except (Breach, AdvplugError) as breach:
            self.results.append(Result(name, False, str(breach)))
            return False
        except Exception as error:  # the plugin's code may raise anything
            text = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
            self.results.append(Result(name, False, text))
            return False
        self.results.append(Result(name, True))
        return True


def require(condition: object, message: str) -> None:
    """Raises Breach with `message` unless `condition` holds."""
    if not condition:
        raise Breach(message)


def demand(what: str, results: list[Result]) -> list[Result]:
    """`results`, unless one of them failed. Raises AssertionError that lists all that did."""
    failed = [f"  {r.name}: {r.detail}" for r in results if r.ok is False]
    if failed:
        raise AssertionError("\n".join([f"{what} breaks its contract:", *failed]))
    return results
