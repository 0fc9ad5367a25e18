"""Plain text for people: tables that align, and figures as they read in them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence

from advplug.estimate import Estimate

Row = Sequence[str]


def _figure(estimate: Estimate | None, interval: bool, scale: int, digits: int) -> str:
    """`scale` times the value, with its interval where asked for; a dash where the quantity does not apply."""
    if estimate is None:
        return "-"
    text = f"{scale * estimate.value:.{digits}f}"
    if interval and estimate.low is not None and estimate.high is not None:
        text += f" [{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"
    return text


def percent(estimate: Estimate | None, interval: bool = False) -> str:
    """`93.4`, or `93.4 [90.3, 95.6]`; a dash where the quantity does not apply."""
    return _figure(estimate, interval, 100, 1)


def cosine(estimate: Estimate | None, interval: bool = False) -> str:
    """`0.533`, or `0.533 [0.520, 0.546]`; a dash where the quantity does not apply."""
    return _figure(estimate, interval, 1, 3)


def points(estimate: Estimate | None) -> str:
    """`+2.5 [-0.1, +5.0]`: a difference in points."""
    if estimate is None:
        return "-"
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def titled(title: str, columns: Mapping[str, Callable[..., str]], items: Sequence[object], constant: Row) -> str:
    """A table of `items`; columns named in `constant` that never vary move into the title.

    What reads the same stands once: undefended cells may be there alone and within a curve.
    """
    if not items:
        return ""
    rows = list(dict.fromkeys(tuple(cell(item) for cell in columns.values()) for item in items))
    fixed = [(i, name) for i, name in enumerate(columns) if name in constant and len({row[i] for row in rows}) == 1]
    heading = ", ".join(f"{name} {rows[0][i]}" for i, name in fixed)
    skip = {i for i, _ in fixed} | {
        i for i, name in enumerate(columns) if len(rows) and all(row[i] == "-" for row in rows)
    }
    kept = [i for i in range(len(columns)) if i not in skip]
    names = list(columns)
    return grid(
        f"{title} ({heading})" if heading else title,
        [names[i] for i in kept],
        [[r[i] for i in kept] for r in rows],
    )


def grid(title: str, header: Row, rows: Sequence[Row]) -> str:
    """A plain table; numbers align right. It is never cut to the width of a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if "%" in name or name == "eps" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    buffer = io.StringIO()
    width = max(
        shutil.get_terminal_size().columns,
        sum(max(map(len, c)) + 3 for c in zip(header, *rows, strict=True)),
        40,
    )
    Console(file=buffer, width=width, color_system=None, legacy_windows=False, emoji=False).print(table)
    # Above the table, not in it: there it would be wrapped to the width of a narrow table.
    return "\n".join([title, *(line.rstrip() for line in buffer.getvalue().splitlines())]).strip("\n")
