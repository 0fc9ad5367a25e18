"""What of a run is done, failed, refused and pending, from its folder. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advplug.certificates import planned
from advplug.costs.forecast import Forecast, forecast
from advplug.defaults import SPEC
from advplug.session import Request
from advplug.store import cells, no_run, reading
from advplug.studies.plan import plan_file
from advplug.studies.shown_names import in_row
from advplug.tables.plan import plan_rows, poison_rows, proof_rows
from advplug.tables.text import grid

STATES = ("done", "failed", "refused", "pending")
_OF_PLAN = {"to do": "pending", "again": "failed", "done": "done", "refused": "refused"}


@dataclass(frozen=True)
class Status:
    """Rows of cells, certificates and poisonings, each with `state` and `reason`; `others` are stored cells that the
    folder's spec does not ask for. `left` is what is still to be spent, `names` what people call references."""

    title: str | None
    rows: tuple[dict[str, Any], ...]
    others: int
    left: Forecast | None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row["state"] for row in self.rows)
        return {state: found[state] for state in STATES}

    def to_json(self) -> str:
        passes = None if self.left is None else self.left.total.passes
        told = {"title": self.title, "counts": self.counts, "others": self.others, "pending_passes": passes}
        return json.dumps({**told, "cells": list(self.rows)}, indent=2)


def status(folder: Path) -> Status:
    """Raises UsageError where `folder` is no run's, or its spec names what is not there any more."""
    if not (folder / "results.sqlite").is_file() and not (folder / SPEC).is_file():
        raise no_run(folder)
    stored = _stored(folder) if (folder / "results.sqlite").is_file() else {}
    if not (folder / SPEC).is_file():
        rows = tuple({**cell, "state": _state(cell["status"])} for cell in stored.values())
        return Status(None, rows, 0, None)
    asked = plan_file(folder / SPEC, Request(models=(), output=folder))
    proofs = planned(asked.sweeps) if asked.request.certify else []
    done = {key: cell["status"] for key, cell in stored.items()}
    found = [*plan_rows(asked.sweeps, done), *proof_rows(proofs, done), *poison_rows(asked.poisons, done)]
    rows = tuple(_row(row, stored) for row in found)
    others = len(set(stored) - {row["key"] for row in rows})
    left = forecast(asked.sweeps, proofs, done, asked.request.audit)
    return Status(asked.matrix.title, rows, others, left, asked.request.names)


def _stored(folder: Path) -> dict[str, dict[str, Any]]:
    with reading(folder) as db:
        return {made["key"]: made for kind in ("cell", "certificate", "poisoning") for made in cells(db, kind)}


def _state(status: str) -> str:
    return "done" if status == "ok" else status


def _row(row: Mapping[str, Any], stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    state = _OF_PLAN[row["state"]]
    reason = stored[row["key"]]["reason"] if state == "failed" else row["reason"]
    return {**row, "state": state, "reason": reason}


def render(found: Status) -> str:
    """How many cells there are of each state, by victim, and why some failed or are refused."""
    counted = ", ".join(f"{n} {state}" for state, n in found.counts.items() if n) or "nothing asked for"
    head = f"{found.title}: " if found.title else ""
    if found.left is None:
        return f"{head}{counted}; this folder has no {SPEC}, so that what is pending is not known"
    victims: dict[tuple[str, ...], list[str]] = {}
    rows = [in_row(row, found.names) for row in found.rows]
    for row in rows:
        named = tuple(str(row[name]) for name in ("dataset", "model", "defense", "seed"))
        victims.setdefault(named, []).append(row["state"])
    shown = [s for s in STATES if found.counts[s]]
    lines = [[*named, *(str(states.count(s)) for s in shown)] for named, states in victims.items()]
    text = grid(f"{head}{len(found.rows)} cells: {counted}", ["dataset", "model", "defense", "seed", *shown], lines)
    more = [f"{row['state']}: {_name(row)}: {row['reason']}" for row in rows if row["reason"]]
    if found.counts["pending"]:
        more.append(f"pending: about {found.left.total.passes:,} passes of an image, trainings aside")
    if found.others:
        more.append(f"{found.others} further cells in this folder are of other runs")
    return "\n\n".join([text, *(["\n".join(dict.fromkeys(more))] if more else [])])


def _name(row: Mapping[str, Any]) -> str:
    attack = row.get("attack", "certificate")
    return f"{attack} on {row['model']} ({row['defense']}), {row.get('norm', '')} {row.get('eps', '')}".rstrip(", ")


def pending(keys: Sequence[str], result: Any) -> int:
    """How many of these cells a result lacks."""
    return len(set(keys) - {made.key for made in result.done})
