"""What of a run becomes which parameter, metric and tag of MLflow. Neither MLflow nor torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from advplug.export import row_of
from advplug.results import Cell, Certificate, Poisoning, RunResult, ThreatRow

PARAM, TAG, KEY = 6000, 5000, 250
"""MLflow's longest parameter, tag and name, in characters; its limits lie a little higher or there."""
_NAMES = ("dataset", "model", "defense", "attack", "attacks", "norm", "eps", "goal", "seed")
_TAGS = ("verdict", "flags", "unchecked", "status", "reason", "notes")


@dataclass
class Entry:
    """One run of MLflow."""

    name: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def whole(result: RunResult) -> Entry:
    """The run itself: what was asked for, with which versions, and how much of it was done."""
    made = Entry("advplug")
    axes = {"datasets": "dataset", "models": "model", "defenses": "defense", "attacks": "attack", "budgets": "eps"}
    for axis, name in axes.items():
        found = dict.fromkeys(getattr(item, name) for item in result.done if hasattr(item, name))
        made.params[axis] = "; ".join(found)
    seeds = result.run.seeds or (result.run.seed,)
    made.params |= {"seeds": "; ".join(map(str, seeds)), "device": result.run.device}
    made.params |= {f"version.{_name(name)}": version for name, version in result.run.versions.items()}
    states = Counter(item.status for item in result.done)
    made.metrics = {f"cells_{state}": float(states[state]) for state in ("ok", "refused", "failed")}
    made.metrics |= {"passes": float(result.run.passes), "seconds": result.run.seconds}
    made.tags = {"advplug.kind": "run", "advplug.command": result.run.command}
    if result.run.output:
        made.tags["advplug.folder"] = result.run.output
    return _cut(made)


def parts(result: RunResult) -> Iterable[Entry]:
    """A run a threat, with the figures of each of its attacks; and one a certificate and attack on training data."""
    for row in result.threats:
        made = _entry("threat", row, f"{_victim(row)} {row.norm} {row.eps}")
        own = [c for c in result.cells if _group(c) == _group(row)]
        for prefix, cell in _prefixed(own):
            if cell.status == "ok":
                made.metrics |= {f"{prefix}/{name}": value for name, value in _estimates(row_of(cell))}
            else:
                made.tags[f"{cell.status}.{prefix}"] = cell.reason or ""
        yield _cut(made)
    for proven in result.certificates:
        made = _entry("certificate", proven, f"{_victim(proven)} certified {proven.norm}")
        for at in proven.certified_accuracy:
            if at.certified_accuracy is not None:
                made.metrics[f"certified_accuracy/{_name(at.radius)}"] = at.certified_accuracy.value
        yield _cut(made)
    for poisoned in result.poisonings:
        yield _cut(_entry("poisoning", poisoned, f"{_victim(poisoned)} {poisoned.attack}"))


def _entry(kind: str, item: ThreatRow | Certificate | Poisoning, name: str) -> Entry:
    row = row_of(item)
    params = {k: str(row[k]) for k in _NAMES if row.get(k) not in (None, "")}
    tags = {k: str(row[k]) for k in _TAGS if row.get(k) not in (None, "")}
    return Entry(name, params, dict(_estimates(row)), {"advplug.kind": kind, **tags})


def _estimates(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The numbers of a row that are figures, their intervals and counts among them."""
    for name, value in row.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and name not in (*_NAMES, "eps_value"):
            yield _name(name), float(value)


def _prefixed(cells: Iterable[Cell]) -> Iterable[tuple[str, Cell]]:
    """Each with a name of its own that MLflow takes for a metric's, from the attack's."""
    taken: Counter[str] = Counter()
    for cell in cells:
        name = _name(cell.attack)[:150]
        taken[name] += 1
        yield (name if taken[name] == 1 else f"{name} {taken[name]}"), cell


def _name(text: str) -> str:
    """Without signs that MLflow refuses in names, and without the slash, which makes groups of metrics."""
    return re.sub(r"[^\w\-. :]", "_", text, flags=re.ASCII)


def _victim(item: ThreatRow | Certificate | Poisoning) -> str:
    return item.model if item.defense == "none" else f"{item.model} ({item.defense})"


def _group(item: Cell | ThreatRow) -> tuple[Any, ...]:
    return item.dataset, item.model, item.defense, item.norm, item.eps, item.goal, item.seed


def _cut(made: Entry) -> Entry:
    made.params = {k[:KEY]: v[:PARAM] for k, v in made.params.items()}
    made.tags = {k[:KEY]: v[:TAG] for k, v in made.tags.items()}
    made.metrics = {k[:KEY]: v for k, v in made.metrics.items()}
    return made
