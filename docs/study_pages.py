"""Fills the tables and figures of docs/studies from what `benchmarks/studies.py` kept.

A place in a page is `<!-- KIND key=value ...: generated -->` to `<!-- end of KIND key=value ... -->`. The keys choose
rows by what the recipe calls things, with `*` and `?`, and several choices between `|`:

    ran                                    command, images, hardware, time and date
    threats model=a|b eps=4/255            worst cases: a row a defense and budget, with verdict and flags
    attacks eps=8/255                      a row a victim, a column an attack
    budgets attack=apgd                    a row a victim, a column a budget
    worst model=a                          the same of worst cases, with intervals
    poisonings dataset=mnist               attacks on training data
    certificates                           certified accuracy by radius
    training                               what each defense took to train
    pruned                                 filters and parameters that pruning took away
    figure kind=curve                      a figure of `advplug plot`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

from advplug.studies.file import load
from advplug.studies.shown_names import called, names_of

HERE = Path(__file__).parent
STUDIES = HERE / "studies"
KEPT = HERE.parent / "benchmarks" / "results" / "studies"
RECIPES = HERE.parent / "recipes"
PLACE = re.compile(r"<!-- (?P<what>[^\n]*?): generated -->\n.*?<!-- end of (?P=what) -->", re.DOTALL)
NAMED = ("dataset", "model", "defense", "attack")
VICTIM = ("dataset", "model", "defense")
CHOICES = (*NAMED, "eps", "norm", "goal", "value", "kind")
"""Keys that a place may have."""
DATASETS = {
    "npz": "CIFAR-10", "cifar10-part": "CIFAR-10", "mnist": "MNIST", "mnist-part": "MNIST",
    "digit-scenes": "digit-scenes", "flickr8k": "Flickr8k",
}  # fmt: skip

Row = dict[str, Any]
Choice = Mapping[str, str]


def page(name: str) -> tuple[Path, str]:
    """The page of a study as it should be. Raises SystemExit for a place that nothing is known of."""
    path = STUDIES / f"{name}.md"
    text = path.read_text()
    file = KEPT / f"{name}.json"
    if not file.exists():
        return path, text
    study = Study(name, json.loads(file.read_text()))
    return path, PLACE.sub(lambda found: study.filled(found["what"]), text)


def pages() -> list[Callable[[], tuple[Path, str]]]:
    """One function a study that has a page."""
    return [lambda name=path.stem: page(name) for path in sorted(STUDIES.glob("s[1-9]-*.md"))]


class Study:
    """What was kept of one study, with the names of its recipe."""

    def __init__(self, name: str, result: dict[str, Any]) -> None:
        self.name, self.result = name, result
        names = names_of(load(RECIPES / f"{name}.yaml", "small").matrix.variants)
        for kind in ("cells", "threats", "certificates", "poisonings"):
            for row in result[kind]:
                for key in NAMED:
                    if isinstance(row.get(key), str):
                        row[key] = called(row[key], names)
                row["dataset"] = _dataset(row["dataset"])

    def filled(self, what: str) -> str:
        kind, *keys = what.split()
        made = _KINDS.get(kind)
        if made is None:
            raise SystemExit(f"{self.name}: there is no '{kind}'; known are {', '.join(_KINDS)}")
        wrong = [key for key in keys if key.partition("=")[0] not in CHOICES or "=" not in key]
        if wrong:
            raise SystemExit(f"{self.name}: '{wrong[0]}' chooses nothing; write KEY=VALUE, of {', '.join(CHOICES)}")
        content = made(self, dict(key.split("=", 1) for key in keys))
        return f"<!-- {what}: generated -->\n{content}\n<!-- end of {what} -->"

    def rows(self, kind: str, choice: Choice) -> list[Row]:
        """The rows that are meant. Raises SystemExit where there are none."""
        wanted = {key: value.split("|") for key, value in choice.items() if key in (*NAMED, "eps", "norm", "goal")}
        found = [row for row in self.result[kind] if all(_fits(row, key, wanted[key]) for key in wanted)]
        if not found:
            raise SystemExit(f"{self.name}: there are no {kind} of {dict(choice)}")
        return found


def _fits(row: Row, key: str, patterns: list[str]) -> bool:
    return any(row[key] == p or fnmatchcase(str(row[key]), p) for p in patterns)


def _dataset(label: str) -> str:
    return DATASETS.get(label.partition(":")[0], label)


# --- figures in words ---


def percent(estimate: Row | None, interval: bool = True) -> str:
    """A share, with its interval where there is one."""
    if estimate is None:
        return "-"
    value = f"{100 * estimate['value']:.1f}"
    if not interval or estimate["low"] is None:
        return value
    return f"{value} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def cosine(estimate: Row | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def budget(row: Row) -> str:
    return str(row["eps"]) if row["norm"] == "linf" else f"{row['norm']} {row['eps']}"


def code(label: str) -> str:
    return label if label in ("none", *DATASETS.values()) else f"`{label}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _varying(rows: list[Row], keys: Iterable[str]) -> list[str]:
    """Those of `keys` in which the rows differ; the others need no column."""
    return [key for key in keys if len({str(row.get(key)) for row in rows}) > 1]


def flags(row: Row) -> str:
    """What counts against a number, by name."""
    return ", ".join(f"`{flag['name']}`" for flag in row["flags"] if flag["level"] != "info") or "-"


# --- the kinds of places ---


def ran(study: Study, choice: Choice) -> str:
    result = study.result
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    n = sorted({m["n"] for cell in result["cells"] if (m := _first(cell))})
    images = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    return "\n".join(
        [
            "```",
            result["command"],
            "```",
            "",
            f"{len(result['cells'])} cells, {images} images each, intervals at 95 %; {_minutes(result)} "
            f"on {threads} of {result['hardware']}, torch {result['versions']['torch']}, {result['date']}.",
        ]
    )


def _minutes(result: Row) -> str:
    """How long the command took; where it was run in parts, what is known of these."""
    if by_clock := result.get("command_seconds"):
        return f"{by_clock / 60:.0f} minutes"
    return f"{result['seconds'] / 60:.0f} minutes of training and attacking"


def _first(cell: Row) -> Row | None:
    found = cell["metrics"]
    return found.get("clean_accuracy") or found.get("clean_similarity")


def threats(study: Study, choice: Choice) -> str:
    rows = study.rows("threats", choice)
    if all(row["worst_case_similarity"] for row in rows):
        return _similarities(study, rows)
    columns = _varying(rows, ("dataset", "model"))
    head = [*columns, "defense", "eps", "clean %", "static %", "adaptive %", "worst case %", "verdict", "flags"]
    made = []
    for row in rows:
        static, adaptive = (_least(study, row, f"{kind}_robust_accuracy") for kind in ("static", "adaptive"))
        made.append(
            [
                *(code(row[key]) for key in columns), code(row["defense"]), budget(row),
                percent(row["clean_accuracy"], False), static, adaptive, percent(row["worst_case_accuracy"]),
                row["verdict"] or "-", flags(row),
            ]
        )  # fmt: skip
    return table(head, made)


def _same(study: Study, row: Row) -> list[Row]:
    keys = (*VICTIM, "norm", "eps", "goal", "shape", "seed")
    return [cell for cell in study.result["cells"] if all(cell.get(key) == row.get(key) for key in keys)]


def _least(study: Study, row: Row, metric: str) -> str:
    found = [m for cell in _same(study, row) if (m := cell["metrics"].get(metric))]
    return percent(min(found, key=lambda m: m["value"]), False) if found else "-"


def _similarities(study: Study, rows: list[Row]) -> str:
    columns = _varying(rows, ("dataset", "model", "eps"))
    head = [*columns, "defense", "clean", "static", "adaptive", "worst case", "recovery %", "static recovery %",
            "verdict", "flags"]  # fmt: skip
    made = []
    for row in rows:
        found = [cell["metrics"] for cell in _same(study, row)]
        least = {
            kind: min(
                (m for own in found if (m := own.get(f"{kind}_similarity"))), key=lambda m: m["value"], default=None
            )
            for kind in ("static", "adaptive")
        }
        made.append(
            [
                *(code(row[key]) for key in columns), code(row["defense"]), cosine(row["clean_similarity"]),
                cosine(least["static"]), cosine(least["adaptive"]), cosine(row["worst_case_similarity"]),
                share(row["recovery"]), share(row["static_recovery"]), row["verdict"] or "-", flags(row),
            ]
        )  # fmt: skip
    return table(head, made)


def _across(study: Study, choice: Choice, axis: str) -> str:
    """A row a victim, a column a value of `axis`; `value=` names the metric, robust accuracy unless it says so."""
    rows = [row for row in study.rows("cells", choice) if row["status"] == "ok"]
    metric = choice.get("value", "robust_accuracy")
    plain = metric.endswith(("similarity", "median"))
    left = [key for key in (*VICTIM, "norm", "attack", "eps") if key != axis]
    columns = [key for key in _varying(rows, left) if not (axis == "eps" and key == "norm")] or ["defense"]
    values = list(dict.fromkeys(row[axis] for row in rows))
    if axis == "eps":
        values.sort(key=Fraction)
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in columns), {})[row[axis]] = row
    made = []
    for names, cells in found.items():
        first = next(iter(cells.values()))
        shown = [(cosine if plain else _bare)(_metric(cells.get(value), metric)) for value in values]
        clean = first["metrics"].get("clean_similarity" if plain else "clean_accuracy") or _first(first)
        made.append([*(code(name) for name in names), (cosine if plain else _bare)(clean), *shown])
    return table(
        [*columns, "clean" if plain else "clean %", *(code(v) if axis == "attack" else v for v in values)], made
    )


def _bare(estimate: Row | None) -> str:
    return percent(estimate, False)


def _metric(cell: Row | None, name: str) -> Row | None:
    return None if cell is None else cell["metrics"].get(name)


def attacks(study: Study, choice: Choice) -> str:
    return _across(study, choice, "attack")


def budgets(study: Study, choice: Choice) -> str:
    return _across(study, choice, "eps")


def worst(study: Study, choice: Choice) -> str:
    """A row a victim, a column a budget, with intervals."""
    rows = study.rows("threats", choice)
    columns = _varying(rows, VICTIM) or ["defense"]
    values = sorted(dict.fromkeys(row["eps"] for row in rows), key=Fraction)
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in columns), {})[row["eps"]] = row
    made = [
        [*(code(name) for name in names), *(percent(_field(own.get(value), "worst_case_accuracy")) for value in values)]
        for names, own in found.items()
    ]
    return table([*columns, *values], made)


def _field(row: Row | None, name: str) -> Row | None:
    return None if row is None else row[name]


RATES = {
    "attack_success_rate": "triggered as target %",
    "clean_model_success_rate": "the same of a clean model %",
    "poison_success_rate": "targets taken %",
    "clean_accuracy": "clean %",
    "clean_model_accuracy": "clean model's %",
}


def poisonings(study: Study, choice: Choice) -> str:
    rows = study.rows("poisonings", choice)
    columns = _varying(rows, ("dataset", "model", "attack", "seed"))
    rates = {name: title for name, title in RATES.items() if any(row["metrics"].get(name) for row in rows)}
    made = [
        [
            *(code(str(row[key])) for key in columns), code(row["defense"]), str(row["poisons"]),
            *(percent(row["metrics"].get(name)) for name in rates), row["verdict"] or row["status"], flags(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table([*columns, "defense", "poisons", *rates.values(), "verdict", "flags"], made)


def certificates(study: Study, choice: Choice) -> str:
    made = []
    for row in study.rows("certificates", choice):
        for at in row["certified_accuracy"]:
            made.append(
                [
                    code(row["model"]), code(row["defense"]), f"{row['norm']} {at['radius']}",
                    percent(at["certified_accuracy"]), percent(at.get("worst_case_accuracy")),
                ]
            )  # fmt: skip
    return table(["model", "defense", "radius", "certified %", "worst case found %"], made)


def training(study: Study, choice: Choice) -> str:
    """Seconds as they were measured when the weights were made, and how many parameters changed."""
    found: dict[tuple[str, ...], list[str]] = {}
    rows = study.rows("cells", choice)
    columns = _varying(rows, ("dataset", "model"))
    for row in rows:
        for told in row["facts"].values():
            if "training_seconds" in told:
                amount = told.get("adapter_parameters", told.get("parameters"))
                key = (*(code(row[k]) for k in columns), code(row["defense"]))
                found[key] = [f"{told['training_seconds']:.0f}", "-" if amount is None else f"{amount:,}"]
    return table([*columns, "defense", "seconds", "parameters"], ([*key, *shown] for key, shown in found.items()))


def pruned(study: Study, choice: Choice) -> str:
    """What is left of the network after each pruning, beside the clean accuracy that this leaves."""
    found: dict[str, list[str]] = {}
    for row in study.rows("cells", choice):
        for told in row["facts"].values():
            if "filters_after" in told and row["defense"] not in found:
                counts = [f"{told[f'{what}_{when}']:,}" for what in ("filters", "parameters")
                          for when in ("before", "after")]  # fmt: skip
                found[row["defense"]] = [told["layers"], *counts, _bare(row["metrics"].get("clean_accuracy"))]
    head = ["defense", "layers", "filters before", "after", "parameters before", "after", "clean %"]
    return table(head, ([code(defense), *shown] for defense, shown in found.items()))


FIGURES = {
    "curve": "accuracy by budget",
    "sweep": "accuracy by the strength of the defense",
    "pareto": "clean against robust accuracy",
    "heatmap": "victims by attacks",
    "static-adaptive": "static against adaptive evaluation",
    "success": "success by the number of poisons",
    "rounds": "what was trusted, by round",
}


def figure(study: Study, choice: Choice) -> str:
    kind = choice.get("kind", "")
    file = f"{study.name}-{kind}.svg"
    if file not in study.result["figures"] or kind not in FIGURES:
        raise SystemExit(f"{study.name}: there is no figure {file}")
    return f"![{FIGURES[kind].capitalize()}]({file})"


_KINDS: dict[str, Callable[[Study, Choice], str]] = {
    "ran": ran, "threats": threats, "attacks": attacks, "budgets": budgets, "worst": worst, "poisonings": poisonings,
    "certificates": certificates, "training": training, "pruned": pruned, "figure": figure,
}  # fmt: skip
