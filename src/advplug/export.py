"""A stored run in other programs' formats: flat rows as CSV, JSON lines and Parquet, tables as papers print them.

No torch, and the folder is read only.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from advplug.errors import UsageError
from advplug.estimate import Estimate
from advplug.evidence import Evidence, worst_case
from advplug.results import Cell, Certificate, Flag, Poisoning, RunResult, ThreatRow
from advplug.store import THREAT
from advplug.stored.runs import observed, read
from advplug.studies.shown_names import renamed

FORMATS = ("csv", "jsonl", "json", "md", "latex", "parquet")
PARTS = ("cells", "threats", "certificates", "poisonings", "images")
"""What flat rows can be made of; `images` are the images of every cell."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First signs by which spreadsheets take a text for a formula (OWASP, CSV injection)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What is to be written, and what of the run it leaves out."""

    data: bytes
    notes: tuple[str, ...] = ()


def export(folder: Path, form: str, part: str | None = None) -> Exported:
    """The run in `folder` as a `form` of FORMATS; `part` of PARTS, by default the first that the folder holds.

    Raises UsageError where the folder is no run's, holds nothing of that part, or the two do not go together.
    """
    result = read(folder)
    if form == "json":
        if part is not None:
            raise UsageError("json is the whole result; leave --what out, or take another --format")
        return Exported((json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n").encode())
    if form in ("md", "latex"):
        from advplug.tables.paper import latex, markdown, tables

        made = tables(renamed(result), part)
        return Exported((markdown if form == "md" else latex)(made).encode())
    chosen, notes = (part, ()) if part is not None else _first(folder, result)
    rows = flat(folder, result, chosen)
    if not rows:
        held = ", ".join(f"{n} {name}" for name, n in _counts(result).items() if n)
        raise UsageError(f"{folder} holds no {chosen}" + (f", but {held}: choose with --what" if held else ""))
    return Exported(_WRITERS[form](rows), notes)


def _counts(result: RunResult) -> dict[str, int]:
    return {name: len(getattr(result, name)) for name in ("cells", "poisonings", "certificates", "threats")}


def _first(folder: Path, result: RunResult) -> tuple[str, tuple[str, ...]]:
    counts = {name: n for name, n in _counts(result).items() if n}
    if not counts:
        raise UsageError(f"{folder} holds no finished cell; advplug eval -o {folder} makes some")
    chosen, *others = counts
    told = ", ".join(f"{counts[name]} {name}" for name in others)
    return chosen, (f"these are the {counts[chosen]} {chosen}; --what gives the {told}",) if told else ()


# --- flat rows ---------------------------------------------------------------------------------------


def flat(folder: Path, result: RunResult, part: str) -> list[Row]:
    """Rows of text, numbers, booleans and None, all with the same columns; none that is empty in every row.

    Raises UsageError for an unknown part.
    """
    makers: dict[str, Callable[[], Iterable[Row]]] = {
        "cells": lambda: map(row_of, result.cells),
        "threats": lambda: map(row_of, result.threats),
        "certificates": lambda: (row for c in result.certificates for row in _certified(c)),
        "poisonings": lambda: map(row_of, result.poisonings),
        "images": lambda: (row for cell, evidence in observed(folder) for row in _images(cell, evidence)),
    }
    if part not in makers:
        raise UsageError(f"there is no '{part}' to export; choose from {', '.join(PARTS)}")
    rows = list(makers[part]())
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if value not in (None, "")))
    return [{name: row.get(name) for name in columns} for row in rows]


def row_of(item: Cell | ThreatRow | Certificate | Poisoning) -> Row:
    """Text, numbers, booleans and None by column: an estimate takes four, what an object holds one each.

    Provenance is in the JSON only.
    """
    row: Row = {}
    for field in fields(item):
        name, value = field.name, getattr(item, field.name)
        if name == "provenance":
            continue
        if name in ("metrics", "differences"):
            for key, estimate in value.items():
                row |= _estimate(key if name == "metrics" else f"{key}_difference", estimate)
        elif name in _ESTIMATES:
            row |= _estimate(name, value)
        elif name in ("passes", "seconds", "audit") and not isinstance(value, float):
            row |= {} if value is None else {f"{name}_{key}": v for key, v in asdict(value).items()}
        else:
            row[name] = _told(value)
        if name == "eps":
            row["eps_value"] = float(Fraction(value))
    return row


_ESTIMATES = frozenset(
    {
        "clean_accuracy", "worst_case_accuracy", "difference_to_baseline", "clean_similarity", "worst_case_similarity",
        "abstention_rate",
    }
)  # fmt: skip


def _told(value: Any) -> Any:
    if isinstance(value, tuple):
        # Names of checks and references hold no semicolon and no line break.
        return "; ".join(v.name if isinstance(v, Flag) else str(v) for v in value)
    return value


def _estimate(name: str, e: Estimate | None) -> Row:
    found = (None,) * 4 if e is None else (e.value, e.low, e.high, e.n)
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_n"), found, strict=True))


def _certified(made: Certificate) -> Iterable[Row]:
    """A row a radius; one without where nothing was proven."""
    whole = {k: v for k, v in row_of(made).items() if k != "certified_accuracy"}
    for at in made.certified_accuracy or (None,):
        radius: Row = {"radius": at.radius if at else None, "radius_value": float(Fraction(at.radius)) if at else None}
        for name in ("certified_accuracy", "worst_case_accuracy"):
            radius |= _estimate(name, getattr(at, name) if at else None)
        yield whole | radius


def _images(cell: Cell, evidence: Evidence) -> Iterable[Row]:
    """A row an image: bits as shares of the repeated decisions, 0 or 1 where there is one decision."""
    named = {k: getattr(cell, k) for k in ("key", *THREAT, "attack")}
    named["eps_value"] = float(Fraction(cell.eps))
    columns: dict[str, Any] = {"index": evidence.index, "label": evidence.y, "attacked": evidence.attacked}
    bits = {"clean": evidence.clean, "rejected": evidence.rejected}
    bits |= {f"{name}_success": getattr(evidence, name) for name in ("adaptive", "static", "bare", "rounded")}
    if not evidence.minimised:
        bits["robust"] = worst_case(evidence.robust_by_origin())
    columns |= {name: None if found is None else found.mean(axis=1) for name, found in bits.items()}
    columns |= {name: getattr(evidence, name) for name in ("linf", "l2", "found", "steps", "queries")}
    columns |= {name: evidence.similarity(getattr(evidence, "cosine" if not where else f"cosine_{where}"))
                for name, where in (("clean_similarity", ""), ("adaptive_similarity", "adaptive"),
                                    ("static_similarity", "static"), ("bare_similarity", "bare"))}  # fmt: skip
    for i in range(evidence.n):
        yield named | {name: None if found is None else _scalar(found[i]) for name, found in columns.items()}


def _scalar(value: Any) -> Any:
    """NumPy's number as Python's; None for one that is not finite, which JSON cannot say."""
    found = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(found, float) and not math.isfinite(found) else found


# --- formats -----------------------------------------------------------------------------------------


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Comma-separated values with a header; a text that a spreadsheet would run as a formula gets an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_safe(name) for name in rows[0]])
    writer.writerows([_safe(value) for value in row.values()] for row in rows)
    return buffer.getvalue().encode()


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return int(value) if isinstance(value, bool) else value


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A Parquet file. Raises UsageError where pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'advplug[parquet]'; csv and jsonl need nothing") from None
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


_WRITERS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], bytes]] = {
    "csv": as_csv,
    "jsonl": as_jsonl,
    "parquet": as_parquet,
}


def write(data: bytes, path: Path) -> None:
    """Writes `data` to `path`. Raises UsageError where that cannot be."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
