"""The tables of all benchmarks, the README's table and its picture, from results made up here."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path[:] = before
    return made


@pytest.fixture(scope="module")
def summary() -> Any:
    return module("summary")


@pytest.fixture(scope="module")
def picture() -> Any:
    return module("picture")


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}


def run() -> dict[str, Any]:
    """Two budgets, a defense whose static figure is far above its adaptive one, and two attacks."""
    cells, threats = [], []
    for eps, bare, static, adaptive in (("1/20", 0.5, 0.8, 0.4), ("1/10", 0.1, 0.7, 0.05)):
        for attack, weaker in (("pgd", 0.1), ("apgd", 0.0)):
            cells.append({"defense": "none", "attack": attack, "eps": eps, "robust_accuracy": bare + weaker,
                          "static_robust_accuracy": None, "adaptive_robust_accuracy": bare + weaker})  # fmt: skip
            cells.append({"defense": "jpeg<1>", "attack": attack, "eps": eps, "robust_accuracy": adaptive,
                          "static_robust_accuracy": static + weaker,
                          "adaptive_robust_accuracy": adaptive + weaker})  # fmt: skip
        for defense, clean, worst in (("none", 0.95, bare), ("jpeg<1>", 0.9, adaptive)):
            threats.append({"defense": defense, "norm": "linf", "eps": eps, "clean_accuracy": rate(clean),
                            "worst_case_accuracy": rate(worst), "verdict": "trusted"})  # fmt: skip
    command = "advplug eval -m cnn" + " -d jpeg:quality=50" * 10
    return {"command": command, "cells": cells, "threats": threats}


def test_the_table_shows_one_budget(summary: Any) -> None:
    *command, _, _, bare, defended = summary.front_markdown(run(), "1/10").splitlines()
    assert command[:1] + command[-2:] == ["```", "```", ""]
    shown = " ".join(line.removesuffix("\\").strip() for line in command[1:-2])
    assert shown == run()["command"]
    assert len(command) == 6
    assert bare == "| none | 95.0 % |  | 10.0 % [0.0, 20.0] | trusted |"
    assert defended == "| `jpeg<1>` | 90.0 % | 70.0 % | 5.0 % [-5.0, 15.0] | trusted |"


def test_the_picture_draws_what_is_stored(picture: Any) -> None:
    assert picture.curves(run(), "static") == {
        "none": [(0.0, 0.95), (0.05, 0.5), (0.1, 0.1)], "jpeg<1>": [(0.0, 0.9), (0.05, 0.8), (0.1, 0.7)],
    }  # fmt: skip
    assert picture.curves(run(), "adaptive")["jpeg<1>"] == [(0.0, 0.9), (0.05, 0.4), (0.1, 0.05)]
    drawn = ET.fromstring(picture.svg(run()))
    space = "{http://www.w3.org/2000/svg}"
    lines = drawn.findall(f"{space}polyline")
    assert len(lines) == 4
    static, adaptive = (lines[i].get("points", "").split()[-1].split(",") for i in (1, 3))
    bottom, height = picture.TOP + picture.HEIGHT, picture.HEIGHT
    assert float(static[1]) == pytest.approx(bottom - 0.7 * height, abs=0.1)
    assert float(adaptive[1]) == pytest.approx(bottom - 0.05 * height, abs=0.1)
    texts = [node.text for node in drawn.iter(f"{space}text")]
    assert {"undefended", "jpeg<1>", "0.05", "0.1", "100 %"} <= set(texts)
    # A ground of its own under all of it, so that a dark page does not swallow the words.
    ground = drawn.find(f"{space}rect")
    assert ground is not None
    assert (ground.get("width"), ground.get("fill")) == (drawn.get("width"), "#ffffff")
    width = float(drawn.get("width", "0"))
    assert all(0 <= float(node.get("x", "0")) <= width for node in drawn.iter(f"{space}text"))


def test_what_was_not_written_down_is_a_dash(summary: Any) -> None:
    new = {"date": "2026-11-30", "cpu": "CPU 9", "cpu flags": ["avx2"], "cores": 4, "threads": 1, "load": 0.12,
           "torch": "2.13.0", "command": "python benchmarks/load.py --sizes 20"}  # fmt: skip
    old = {"cpu": {"capability": "AVX2"}, "threads": 1, "torch": "2.13.0"}
    _, _, first, second = summary.machines_markdown({"load": new, "engine": old}).splitlines()
    assert first == (
        "| `load` | 2026-11-30 | CPU 9, avx2 | 4 | 1 | 0.1 | 2.13.0 | `python benchmarks/load.py --sizes 20` |"
    )
    assert second == "| `engine` | - | AVX2 | - | 1 | - | 2.13.0 | `python benchmarks/engine.py` |"


def test_a_missed_bar_stands_out(summary: Any) -> None:
    result = {"matrix": "m", "cells": 2, "passes": {"ratio": 0.25}, "seconds": {"ratio": 1.9}}
    _, _, missed, held = summary.bars_markdown({"forecast": result}).splitlines()
    assert missed == "| `forecast` | forecast of passes, off by a factor | 4 | at most 2 | **no** | m, 2 cells |"
    assert held.endswith("| 1.9 | at most 2 | yes | m, 2 cells |")


def test_libraries_stand_side_by_side(summary: Any) -> None:
    table = summary.libraries_markdown(summary.kept())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(row) for row in rows} == {7}
    pgd = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())["pgd"]
    (ours,) = [r for r in pgd if (r["variant"], r["eps"]) == ("advplug float32", "8/255")]
    (theirs,) = [r for r in pgd if (r["variant"], r["eps"]) == ("torchattacks", "8/255")]
    assert rows[2][2:4] == [f"{r['seconds']:.3g} s, {100 * r['robust accuracy']:.1f} %" for r in (ours, theirs)]
    assert rows[2][5:] == ["", ""], "not measured"


def test_numbers_are_short(summary: Any) -> None:
    assert [summary.number(v) for v in (27.04, 0.0012345, 3103.4, 16, 0.0)] == ["27", "0.00123", "3103", "16", "0"]


def test_results_are_read_in_the_order_of_the_benchmarks(summary: Any, tmp_path: Path) -> None:
    for name in ("load", "engine", "unknown"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert list(summary.kept(tmp_path)) == ["engine", "load"]
