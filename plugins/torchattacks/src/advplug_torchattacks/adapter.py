"""Runs a row of the table: the class is made with its arguments, called on a batch, and what it returns is handed on.

Torch is imported only when an attack is made.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from advplug.errors import UsageError
from advplug_torchattacks.rows import PREFIX, Row
from advplug_torchattacks.table import ROWS

if TYPE_CHECKING:
    from advplug.wrapping import Wrapped

VERSION = "3.5.1"
INSTALL = f"pip install --no-deps torchattacks=={VERSION}"


def library() -> Any:
    """The module torchattacks. Raises UsageError where it is missing or of another version than the table's."""
    try:
        import torchattacks
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "torchattacks":
            raise
        raise UsageError(f"ta.* attacks need torchattacks: {INSTALL}") from error
    if torchattacks.__version__ != VERSION:
        raise UsageError(f"ta.* attacks need torchattacks {VERSION}, found {torchattacks.__version__}: {INSTALL}")
    return torchattacks


def make(row: Row, /, **given: Any) -> Wrapped:
    """The attack of `row` with the parameters `given`. Raises UsageError for parameters that do not fit together."""
    from advplug.wrapping import Wrapped
    from advplug_torchattacks.calls import Call

    _check(row, given)
    queries = given.get("queries") if row.draws == "image" else None
    call = Call(row, given, library())
    return Wrapped(PREFIX + row.name, call, row.access, one_by_one=row.draws == "image", queries=queries)


def _check(row: Row, given: Mapping[str, Any]) -> None:
    if given.get("theta") == 0:
        raise UsageError(f"{PREFIX}{row.name}: theta=0 changes nothing; give a number from -1 to 1")
    if given.get("len_kernel", 1) % 2 == 0:
        raise UsageError(f"{PREFIX}{row.name}: len_kernel must be odd, got {given['len_kernel']}")
    if given.get("patch_min", 0) > given.get("patch_max", 0):
        raise UsageError(f"{PREFIX}{row.name}: patch_min is larger than patch_max")


factories = SimpleNamespace(**{row.name: functools.partial(make, row) for row in ROWS})
"""A factory a row, by the name after `ta.`; specs point here."""
