"""The recipes at the scale `small`, which docs/studies quotes: runs each and keeps what came out.

    python benchmarks/studies.py [NAME ...] [--keep FOLDER [--read]] [--only-missing]

Each is `advplug run recipes/NAME.yaml --scale small`, 15 to 30 minutes on two cores, on the data in the folder named by
ADVPLUG_DATA. With --keep the run's folder stays, so that a run that was interrupted goes on; with --read it is only
read. Kept are a JSON file a study and its figures; `make docs` writes the tables from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kept

HERE = Path(__file__).parent
ROOT = HERE.parent
KEPT = HERE / "results" / "studies"
PAGES = ROOT / "docs" / "studies"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("s[1-9]-*.yaml"))

FIGURES: dict[str, tuple[str, ...]] = {
    "s1": ("heatmap",),
    "s2": ("sweep",),
    "s3": ("static-adaptive",),
    "s4": ("curve",),
    "s5": ("curve", "pareto"),
}
"""Kinds of `advplug plot` that a page shows."""
METRICS = ("accuracy", "similarity", "drop", "recall_at_1", "8bit", "queries_median", "norm_median", "rejection_rate")
CELL = ("dataset", "model", "defense", "attack", "norm", "eps", "goal", "shape", "seed", "status", "reason", "seconds",
        "passes")  # fmt: skip
THREAT = (
    "dataset", "model", "defense", "norm", "eps", "goal", "shape", "seed", "clean_accuracy", "worst_case_accuracy",
    "difference_to_baseline", "clean_similarity", "worst_case_similarity", "recovery", "static_recovery", "verdict",
    "unchecked",
)  # fmt: skip
POISONING = (
    "dataset", "model", "attack", "defense", "seed", "status", "reason", "poisons", "training_images", "metrics",
    "differences", "verdict", "seconds",
)  # fmt: skip


TOOK = "seconds"
"""The file of a run's folder that holds how long the commands took that filled it."""


def run(name: str, folder: Path) -> None:
    """Runs the study into `folder`, or what is missing of it. Raises SystemExit where it fails."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "advplug.cli", "run", f"recipes/{name}.yaml", "--scale", "small"]
    done = subprocess.run([*command, "-o", str(folder), "-q"], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if folder.is_dir():
        (folder / TOOK).write_text(f"{(took(folder) or 0) + time.perf_counter() - begun:.0f}\n")
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}; advplug status {folder}")


def took(folder: Path) -> float | None:
    """How long the whole run took by the clock, if `run` filled the folder."""
    file = folder / TOOK
    return float(file.read_text()) if file.exists() else None


def exported(folder: Path) -> dict[str, Any]:
    """The whole result of a stored run."""
    command = [sys.executable, "-m", "advplug.cli", "export", str(folder), "-f", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def slimmed(result: dict[str, Any]) -> dict[str, Any]:
    """What tables are made of: without the bits of every image and what is the same in every cell."""
    return {
        "versions": result["run"]["versions"],
        "leakage": result["run"].get("leakage"),
        "cells": [_cell(cell) for cell in result["cells"]],
        "threats": [_picked(threat, THREAT) for threat in result["threats"]],
        "certificates": [{k: v for k, v in made.items() if k != "provenance"} for made in result["certificates"]],
        "poisonings": [_picked(made, POISONING) | {"facts": _facts(made)} for made in result["poisonings"]],
    }


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    metrics = {k: m for k, m in (cell["metrics"] or {}).items() if m and k.endswith(METRICS)}
    return {k: cell.get(k) for k in CELL} | {"metrics": metrics, "flags": _flags(cell), "facts": _facts(cell)}


def _picked(made: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: made.get(k) for k in names} | {"flags": _flags(made)}


def _flags(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: flag[k] for k in ("name", "level", "detail")} for flag in made["flags"]]


def _facts(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    told = made["provenance"].get("facts", {})
    return {name: {k: v for k, v in facts.items() if isinstance(v, int | float | str)} for name, facts in told.items()}


def seconds(found: dict[str, Any]) -> float:
    """What trainings, attacks and decisions took when they were computed, whenever that was. The training and the
    defending are the victim's, and stand in each of its cells."""
    total, victims = 0.0, dict[tuple[str, ...], float]()
    for part in (part for kind in ("cells", "certificates", "poisonings") for part in found[kind]):
        taken = part["seconds"] or {}
        if not isinstance(taken, dict):
            total += taken
            continue
        victim = tuple(str(part.get(key)) for key in ("dataset", "model", "defense", "seed"))
        victims[victim] = max(victims.get(victim, 0.0), sum(taken.get(key) or 0.0 for key in ("train", "defend")))
        total += sum(value or 0.0 for key, value in taken.items() if key not in ("train", "defend"))
    return total + sum(victims.values())


def draw(name: str, folder: Path) -> list[str]:
    """The study's figures beside its page; the names of their files."""
    PAGES.mkdir(parents=True, exist_ok=True)
    made = []
    for kind in FIGURES.get(name.partition("-")[0], ()):
        file = PAGES / f"{name}-{kind}.svg"
        command = [sys.executable, "-m", "advplug.cli", "plot", str(folder), "-k", kind, "-o", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: no {kind}: {done.stderr.strip()}", file=sys.stderr)
        else:
            made.append(file.name)
    return made


@contextmanager
def _folder(name: str, keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name


def measure(name: str, keep: Path | None, finished: bool) -> None:
    """Runs one study and writes what is kept of it. Where nothing is new the date stays."""
    file = KEPT / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    with _folder(name, keep) as folder:
        if not finished:
            run(name, folder)
        found = slimmed(exported(folder))
        figures = draw(name, folder)
        by_clock = took(folder)
    same = before.get("cells") == found["cells"]
    head = kept.header()
    told = {
        "command": f"advplug run recipes/{name}.yaml --scale small",
        "date": before["date"] if same else head["date"],
        "hardware": before["hardware"] if same else f"{head['cpu']}, {head['cores']} cores",
        "threads": before["threads"] if same else head["threads"],
        "seconds": round(seconds(found)),
        "command_seconds": before.get("command_seconds") if same else by_clock and round(by_clock),
        "figures": figures,
    }
    kept.write(told | found, file)
    print(
        f"{name}: {len(found['cells'])} cells, {len(found['poisonings'])} poisonings, {told['seconds']} s", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}; all unless given")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs' folders in it")
    parser.add_argument("--read", action="store_true", help="the runs in that folder are finished; only read them")
    parser.add_argument("--only-missing", action="store_true", help="leave out what is kept already")
    given = parser.parse_args()
    unknown = set(given.names) - set(RECIPES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}")
    if given.read and given.keep is None:
        parser.error("--read goes with --keep FOLDER, which holds the runs")
    if "ADVPLUG_DATA" not in os.environ:
        parser.error("ADVPLUG_DATA names no folder with data")
    for name in given.names or RECIPES:
        if not (given.only_missing and (KEPT / f"{name}.json").exists()):
            measure(name, given.keep, given.read)


if __name__ == "__main__":
    main()
