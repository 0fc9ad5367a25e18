"""The pages of the studies: what was kept of a run to the tables that a page shows."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

RECIPE = """
variants: {net: 'cnn:epochs=1', squash: 'jpeg:quality=50'}
attacks: fgsm
scales:
  small: {models: net}
"""
PAGE = "# A study\n\n<!-- threats eps=1/10: generated -->\nold\n<!-- end of threats eps=1/10 -->\n\nmore\n"
THREATS = """| defense | eps | clean % | static % | adaptive % | worst case % | verdict | flags |
|---|---|---|---|---|---|---|---|
| none | 1/10 | 90.0 | - | 20.0 | 20.0 [10.0, 30.0] | trusted | - |
| `squash` | 1/10 | 90.0 | 50.0 | 40.0 | 40.0 [30.0, 50.0] | - | `zero-gradients` |"""


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, on folders of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("study_pages")
    for name, folder in (("STUDIES", "studies"), ("KEPT", "kept"), ("RECIPES", "recipes")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(module, name, tmp_path / folder)
    (tmp_path / "recipes" / "s1-x.yaml").write_text(RECIPE)
    (tmp_path / "studies" / "s1-x.md").write_text(PAGE)
    yield module
    sys.modules.pop("study_pages")


def share(value: float, wide: float | None = 0.1) -> dict[str, Any]:
    low, high = (None, None) if wide is None else (value - wide, value + wide)
    return {"value": value, "low": low, "high": high, "n": 50}


def row(defense: str, eps: str = "1/10", **more: Any) -> dict[str, Any]:
    named = {"dataset": "npz:a.npz", "model": "cnn:epochs=1", "defense": defense, "norm": "linf", "eps": eps}
    return {**named, "goal": "untargeted", "shape": "", "seed": 0, "flags": [], **more}


def cell(defense: str, attack: str, eps: str = "1/10", facts: Any = None, **metrics: float | None) -> dict[str, Any]:
    found = {"clean_accuracy": share(0.9), **{k: None if v is None else share(v) for k, v in metrics.items()}}
    return row(defense, eps, attack=attack, status="ok", metrics=found, facts=facts or {})


def threat(defense: str, worst: float, eps: str = "1/10", **more: Any) -> dict[str, Any]:
    given = {"clean_accuracy": share(0.9), "worst_case_accuracy": share(worst), "worst_case_similarity": None}
    return row(defense, eps, **{**given, "verdict": "trusted", **more})


def result(**change: Any) -> dict[str, Any]:
    """Two attacks on an undefended and on a defended model."""
    flags = [{"name": "zero-gradients", "level": "warn"}, {"name": "lost-in-rounding", "level": "info"}]
    trained = {"jpeg": {"training_seconds": 12.4, "parameters": 12345}, "cnn": {"images": 3}}
    made = {
        "command": "advplug run recipes/s1-x.yaml --scale small", "date": "2026-01-02", "hardware": "a CPU",
        "threads": 1, "seconds": 90, "figures": ["s1-x-curve.svg"], "versions": {"torch": "2.13.0"},
        "cells": [
            cell("none", "fgsm", robust_accuracy=0.3, adaptive_robust_accuracy=0.3),
            cell("none", "pgd", robust_accuracy=0.2, adaptive_robust_accuracy=0.2),
            cell("jpeg:quality=50", "fgsm", facts=trained, robust_accuracy=0.6, adaptive_robust_accuracy=0.6,
                 static_robust_accuracy=0.7),
            cell("jpeg:quality=50", "pgd", robust_accuracy=0.4, adaptive_robust_accuracy=0.4,
                 static_robust_accuracy=0.5),
            cell("none", "pgd", "1/5", robust_accuracy=0.0),
        ],
        "threats": [
            threat("none", 0.2),
            threat("jpeg:quality=50", 0.4, verdict=None, flags=flags),
            threat("none", 0.0, "1/5"),
        ],
        "certificates": [], "poisonings": [],
    }  # fmt: skip
    return {**made, **change}


def filled(pages: Any, what: str, **change: Any) -> str:
    """What stands in a place, without the marks around it."""
    text: str = pages.Study("s1-x", result(**change)).filled(what)
    begin, end = f"<!-- {what}: generated -->\n", f"\n<!-- end of {what} -->"
    assert text.startswith(begin)
    assert text.endswith(end)
    return text.removeprefix(begin).removesuffix(end)


def test_a_page_keeps_its_text_and_gets_its_tables(pages: Any, tmp_path: Path) -> None:
    (tmp_path / "kept" / "s1-x.json").write_text(json.dumps(result()))
    ((path, text),) = [make() for make in pages.pages()]
    assert path == tmp_path / "studies" / "s1-x.md"
    assert text == PAGE.replace("old", THREATS)


def test_a_page_of_a_study_of_which_nothing_was_kept_stays(pages: Any) -> None:
    assert pages.page("s1-x")[1] == PAGE


def test_threats_stand_beside_the_least_of_their_attacks(pages: Any) -> None:
    assert filled(pages, "threats eps=1/10") == THREATS
    only = filled(pages, "threats defense=s*|none eps=1/5")
    assert only.splitlines()[2:] == ["| none | 1/5 | 90.0 | - | - | 0.0 [-10.0, 10.0] | trusted | - |"]


def test_attacks_and_budgets_are_columns(pages: Any) -> None:
    assert filled(pages, "attacks eps=1/10").splitlines() == [
        "| defense | clean % | `fgsm` | `pgd` |",
        "|---|---|---|---|",
        "| none | 90.0 | 30.0 | 20.0 |",
        "| `squash` | 90.0 | 60.0 | 40.0 |",
    ]
    assert filled(pages, "budgets attack=pgd").splitlines()[0::2] == [
        "| defense | clean % | 1/10 | 1/5 |",
        "| none | 90.0 | 20.0 | 0.0 |",
    ]
    assert filled(pages, "budgets attack=pgd").splitlines()[-1] == "| `squash` | 90.0 | 40.0 | - |"
    static = filled(pages, "attacks defense=squash value=static_robust_accuracy")
    assert static.splitlines()[-1] == "| `squash` | 90.0 | 70.0 | 50.0 |"


def test_cells_that_failed_are_in_no_table(pages: Any) -> None:
    failed = {**cell("none", "square"), "status": "failed", "metrics": {}}
    shown = filled(pages, "attacks eps=1/10", cells=[*result()["cells"], failed])
    assert "square" not in shown


def test_worst_cases_have_intervals(pages: Any) -> None:
    assert filled(pages, "worst model=net").splitlines() == [
        "| defense | 1/10 | 1/5 |",
        "|---|---|---|",
        "| none | 20.0 [10.0, 30.0] | 0.0 [-10.0, 10.0] |",
        "| `squash` | 40.0 [30.0, 50.0] | - |",
    ]


def test_what_was_run_is_told(pages: Any) -> None:
    assert filled(pages, "ran").splitlines() == [
        "```",
        "advplug run recipes/s1-x.yaml --scale small",
        "```",
        "",
        "5 cells, 50 images each, intervals at 95 %; 2 minutes of training and attacking on one thread of a CPU, "
        "torch 2.13.0, 2026-01-02.",
    ]
    assert "95 %; 3 minutes on one thread" in filled(pages, "ran", command_seconds=170)
    few = cell("none", "fgsm")
    few["metrics"]["clean_accuracy"]["n"] = 20
    assert "6 cells, 20 to 50 images each" in filled(pages, "ran", cells=[*result()["cells"], few], threads=2)


def test_trainings_poisonings_certificates_and_figures(pages: Any) -> None:
    assert filled(pages, "training").splitlines()[2:] == ["| `squash` | 12 | 12,345 |"]
    assert filled(pages, "figure kind=curve") == "![Accuracy by budget](s1-x-curve.svg)"
    poisoned = row("none", attack="ba", status="ok", poisons=7, verdict="trusted",
                   metrics={"attack_success_rate": share(0.8), "clean_accuracy": share(0.9, None)})  # fmt: skip
    assert filled(pages, "poisonings dataset=*", poisonings=[poisoned]).splitlines() == [
        "| defense | poisons | triggered as target % | clean % | verdict | flags |",
        "|---|---|---|---|---|---|",
        "| none | 7 | 80.0 [70.0, 90.0] | 90.0 | trusted | - |",
    ]
    at = [{"radius": "1/4", "certified_accuracy": share(0.5)}]
    proven = row("smoothing", certified_accuracy=at) | {"norm": "l2"}
    assert filled(pages, "certificates", certificates=[proven]).splitlines()[2:] == [
        "| `net` | `smoothing` | l2 1/4 | 50.0 [40.0, 60.0] | - |"
    ]


def test_similarities_are_no_percentages(pages: Any) -> None:
    cells = [cell("none", "caption-pgd", adaptive_similarity=0.1)]
    lowered = threat("none", 0.0, clean_similarity=share(0.5), worst_case_accuracy=None, recovery=None,
                     static_recovery=0.25, worst_case_similarity=share(0.1))  # fmt: skip
    shown = filled(pages, "threats model=net", cells=cells, threats=[lowered])
    assert shown.splitlines()[2:] == ["| none | 0.500 | - | 0.100 | 0.100 | - | 25 | trusted | - |"]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("threat eps=1/10", "s1-x: there is no 'threat'; known are ran, threats"),
        ("threats eps=1/7", "s1-x: there are no threats of {'eps': '1/7'}"),
        ("certificates", "s1-x: there are no certificates of {}"),
        ("threats modle=net", "s1-x: 'modle=net' chooses nothing; write KEY=VALUE, of dataset, model"),
        ("attacks net", "s1-x: 'net' chooses nothing"),
        ("figure kind=pareto", "s1-x: there is no figure s1-x-pareto.svg"),
        ("figure", "s1-x: there is no figure"),
    ],
)
def test_a_place_of_which_nothing_is_known_ends_in_one_line(what: str, told: str, pages: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        filled(pages, what)
    assert str(stopped.value).startswith(told)
