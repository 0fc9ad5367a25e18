"""The folder of one or more runs, read again: cells, threats and what was observed of each image. Torch-free."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from advplug.evidence import Evidence
from advplug.keys import digest
from advplug.results import (
    Cell,
    Poisoning,
    RunInfo,
    RunResult,
    ThreatRow,
    cell_from_json,
    certificate_from_json,
    poisoning_from_json,
    run_from_json,
    threat_from_json,
)
from advplug.store import classes, evidences, latest, reading, samples, shown
from advplug.stored.samples import PoisonSample, Sample
from advplug.training.launch import TRAINED_BY
from advplug.versions import versions


def read(folder: Path) -> RunResult:
    """Everything the folder holds, whatever its status, in the order of its writing.

    Threats, with their verdicts, are those of runs that came to an end, the last word on each; cells of a run that was
    killed have no threat yet. Several runs in one folder are one result, told as the last of them was; of one attack on
    one victim and the same images the last result counts. Raises UsageError where `folder` is no run's.
    """
    with reading(folder) as db:
        certified, poisoned = shown(db, "certificate"), shown(db, "poisoning")
        runs = list(shown(db, "run").values())
        info = run_from_json(runs[-1]) if runs else RunInfo(versions(), 0, "unknown", "", str(folder))
        info = replace(info, names={text: name for run in runs for text, name in run.get("names", {}).items()})
        return RunResult(
            info,
            tuple(cell_from_json(made) for made in current(db)),
            tuple(threat_from_json(row) for row in shown(db, "threat").values()),
            tuple(certificate_from_json(_last(made, certified)) for made in current(db, "certificate")),
            tuple(poisoning_from_json(_last(made, poisoned)) for made in current(db, "poisoning")),
        )


def observed(folder: Path) -> list[tuple[Cell, Evidence]]:
    """The finished cells that have evidence, with it, in the order of their writing, those that a later one replaced
    left out. Raises UsageError likewise."""
    with reading(folder) as db:
        seen = evidences(db)
        rows = [cell_from_json(made) for made in current(db) if made["status"] == "ok" and made["key"] in seen]
    return [(cell, Evidence.from_bytes(seen[cell.key])) for cell in rows]


def victim_of(made: Cell | Poisoning) -> str:
    """Names what was attacked: a label stays when the file, the code or the data behind it changes, this does not."""
    return _victim(made.provenance)


def _victim(provenance: dict[str, Any]) -> str:
    of = ("poison", "dataset", "model", "defense", "seed", TRAINED_BY)
    return digest({name: provenance[name] for name in of if name in provenance})


_NAMED = ("dataset", "model", "defense", "attack", "norm", "eps", "goal", "seed", "shape")


def current(db: sqlite3.Connection, kind: str = "cell") -> list[Any]:
    """What holds of stored cells, certificates or poisonings, in the order of their writing.

    A key also names the version of the code and the series of budgets, so that a folder may hold several results of
    one attack on one victim and the same images: that of the last run replaces the others. Of what failed or was
    refused nothing is known but its names: any later result of these replaces it.
    """
    kept: list[tuple[int, Any]] = []
    names, whole = set(), set()
    for place, made in reversed(latest(db, kind)):
        named = tuple(made.get(name, "") for name in _NAMED)
        told = made.get("provenance") or {}
        # Results from before images were named are each of their own.
        images = told.get("images", {}).get("indices_sha256", made["key"])
        of = (*named, _victim(told), images)
        if (named in names) if made["status"] != "ok" else (of in whole):
            continue
        kept.append((place, made))
        names.add(named)
        whole.add(of)
    return [made for _, made in sorted(kept, key=itemgetter(0))]


def apart(evidence: Evidence, row: ThreatRow) -> float:
    """How far what was observed without attack is from the clean accuracy of a row; 0 where it tells none."""
    clean = row.clean_accuracy
    return 0.0 if clean is None else abs(float(evidence.clean.mean()) - clean.value)


def pictured(folder: Path) -> dict[str, Sample]:
    """A few images of each cell that has some, by its key. Raises UsageError likewise."""
    with reading(folder) as db:
        return {key: Sample.from_bytes(found) for key, found in samples(db)}


def poisons_pictured(folder: Path) -> dict[str, PoisonSample]:
    """A few poisons of each attack on training data that has some, by its key. Raises UsageError likewise."""
    with reading(folder) as db:
        return {key: PoisonSample.from_bytes(found) for key, found in samples(db, "poisoning")}


def class_names(folder: Path) -> dict[str, tuple[str, ...]]:
    """How the classes are called, by dataset; of datasets of cells that were computed. Raises UsageError likewise."""
    with reading(folder) as db:
        return classes(db)


def _last(made: Any, told: dict[str, Any]) -> Any:
    """A row as the last run that came to an end completed it, unless it was computed anew since."""
    found = told.get(made["key"])
    return found if found is not None and found["status"] == made["status"] else made
