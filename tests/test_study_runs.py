"""`benchmarks/studies.py`: what is kept of a study's run, and what is said where it cannot be run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import benchmark_module

NAME = "s4-cnn-cifar10"


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, which keeps its results and figures in folders of its own."""
    with benchmark_module("studies") as module:
        monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
        monkeypatch.setattr(module, "PAGES", tmp_path / "pages")
        monkeypatch.setenv("ADVPLUG_DATA", str(tmp_path))
        yield module


def cell(defense: str = "none", seconds: Any = None, **more: Any) -> dict[str, Any]:
    facts = {"cnn": {"training_seconds": 2.5, "curve": [1, 2]}}
    return {
        "key": "k", "dataset": "mnist", "model": "cnn", "defense": defense, "attack": "pgd", "norm": "linf",
        "eps": "1/10", "goal": "untargeted", "shape": "", "seed": 0, "status": "ok", "reason": None,
        "seconds": seconds, "passes": None, "draws": 1,
        "metrics": {"clean_accuracy": {"value": 1}, "robust_accuracy_8bit": None, "l2_median": {"value": 2}},
        "flags": [{"name": "near-chance", "level": "error", "detail": "x", "more": "y"}],
        "provenance": {"facts": facts, "images": {"n": 5}}, **more,
    }  # fmt: skip


def result(*cells: dict[str, Any]) -> dict[str, Any]:
    threat = {"dataset": "mnist", "model": "cnn", "verdict": "trusted", "flags": [], "audit": {"level": "quick"}}
    proven = {"model": "cnn", "seconds": 3.0, "provenance": {}, "certified_accuracy": []}
    return {"run": {"versions": {"torch": "2"}}, "cells": list(cells) or [cell()], "threats": [threat],
            "certificates": [proven], "poisonings": [cell(poisons=7)]}  # fmt: skip


def test_what_is_kept_of_a_result(studies: Any) -> None:
    made = studies.slimmed(result())
    (kept,), (poisoned,) = made["cells"], made["poisonings"]
    assert kept["metrics"] == {"clean_accuracy": {"value": 1}}  # the others are no part of a table, or apply not
    assert kept["flags"] == [{"name": "near-chance", "level": "error", "detail": "x"}]
    assert kept["facts"] == {"cnn": {"training_seconds": 2.5}}
    assert not {"key", "provenance", "draws"} & set(kept)
    assert (poisoned["poisons"], poisoned["facts"]) == (7, kept["facts"])
    (threat,) = made["threats"]
    assert (threat["verdict"], threat["recovery"], threat["flags"]) == ("trusted", None, [])
    assert "audit" not in threat
    assert made["certificates"] == [{"model": "cnn", "seconds": 3.0, "certified_accuracy": []}]
    assert (made["versions"], made["leakage"]) == ({"torch": "2"}, None)
    assert studies.slimmed(result(cell(metrics=None, status="failed")))["cells"][0]["metrics"] == {}


def test_a_victim_is_trained_once_whatever_its_cells(studies: Any) -> None:
    spent = {"train": 10.0, "defend": 2.0, "attack": 1.0, "decide": None}
    cells = [cell(seconds=spent), cell(seconds=spent), cell("jpeg", seconds={**spent, "defend": 5.0}), cell()]
    found = {"cells": cells, "certificates": [{"seconds": 3.0}], "poisonings": [{"seconds": None}]}
    assert studies.seconds(found) == (12 + 1 + 1) + (15 + 1) + 3


def test_a_study_is_measured_and_its_date_stays_where_nothing_is_new(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Path] = []
    monkeypatch.setattr(studies, "run", lambda name, folder: ran.append(folder))
    monkeypatch.setattr(studies, "draw", lambda name, folder: [f"{name}-curve.svg"])
    monkeypatch.setattr(studies, "exported", lambda folder: result())
    file = tmp_path / "kept" / f"{NAME}.json"

    def measured(date: str, finished: bool = False) -> dict[str, Any]:
        head = {"date": date, "cpu": "a CPU", "cores": 2, "threads": 1}
        monkeypatch.setattr(studies.kept, "header", lambda: head)
        studies.measure(NAME, tmp_path / "runs", finished)
        made: dict[str, Any] = json.loads(file.read_text())
        return made

    first = measured("monday")
    assert (first["date"], first["hardware"], first["threads"], first["seconds"]) == ("monday", "a CPU, 2 cores", 1, 3)
    assert first["command"] == f"advplug run recipes/{NAME}.yaml --scale small"
    assert first["figures"] == [f"{NAME}-curve.svg"]
    assert first["command_seconds"] is None, "the folder was filled by other means"
    assert measured("tuesday", finished=True)["date"] == "monday"
    assert ran == [tmp_path / "runs" / NAME]
    monkeypatch.setattr(studies, "exported", lambda folder: result(cell("jpeg")))
    assert measured("wednesday")["date"] == "wednesday"
    assert f"{NAME}: 1 cells, 1 poisonings, 3 s" in capsys.readouterr().out


def commands(monkeypatch: pytest.MonkeyPatch, studies: Any, code: int = 0, out: str = "", err: str = "") -> list[Any]:
    """What the module runs, answered as given."""
    seen: list[Any] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command[3:])
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(studies.subprocess, "run", answer)
    return seen


def test_a_run_that_fails_says_where_to_look(studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = commands(monkeypatch, studies, 3)
    with pytest.raises(SystemExit, match=f"^{NAME}: exit code 3; advplug status {tmp_path}$"):
        studies.run(NAME, tmp_path)
    assert seen == [["run", f"recipes/{NAME}.yaml", "--scale", "small", "-o", str(tmp_path), "-q"]]
    commands(monkeypatch, studies, 2, err="Error: no results\n")
    with pytest.raises(SystemExit, match=r"^Error: no results$"):
        studies.exported(tmp_path)
    commands(monkeypatch, studies, out='{"cells": []}')
    assert studies.exported(tmp_path) == {"cells": []}


def test_the_time_of_a_run_in_parts_is_that_of_its_parts(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 100.4, 200.0, 260.0])
    monkeypatch.setattr(studies.time, "perf_counter", lambda: next(clock))
    commands(monkeypatch, studies, 130)
    assert studies.took(tmp_path) is None
    with pytest.raises(SystemExit):
        studies.run(NAME, tmp_path)
    assert studies.took(tmp_path) == 100
    commands(monkeypatch, studies)
    studies.run(NAME, tmp_path)
    assert studies.took(tmp_path) == 160


def test_figures_that_cannot_be_drawn_are_left_out(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = commands(monkeypatch, studies)
    assert studies.draw("s5-x", tmp_path) == ["s5-x-curve.svg", "s5-x-pareto.svg"]
    assert [command[3] for command in seen] == ["curve", "pareto"]
    commands(monkeypatch, studies, 2, err="Error: no curve\n")
    assert studies.draw("s4-x", tmp_path) == []
    assert capsys.readouterr().err == "s4-x: no curve: Error: no curve\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["s9-nothing"], "unknown: s9-nothing; known: s1-"),
        (["--read"], "--read goes with --keep FOLDER, which holds the runs"),
        ([], "ADVPLUG_DATA names no folder with data"),
    ],
)
def test_what_cannot_be_run_ends_in_one_line(
    arguments: list[str], told: str, studies: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ADVPLUG_DATA")
    monkeypatch.setattr(sys, "argv", ["studies.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        studies.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_only_what_is_missing_is_run(studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / f"{NAME}.json").write_text("{}")
    measured: list[str] = []
    monkeypatch.setattr(studies, "measure", lambda name, keep, finished: measured.append(name))
    monkeypatch.setattr(sys, "argv", ["studies.py", "--only-missing"])
    studies.main()
    assert measured == [name for name in studies.RECIPES if name != NAME]
    monkeypatch.setattr(sys, "argv", ["studies.py", NAME])
    studies.main()
    assert measured[-1] == NAME
