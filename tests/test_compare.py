"""`advplug compare`: paired differences of stored runs, what is matched with what, the gate, and its messages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from advplug.compare import compare, gate, render
from advplug.errors import GateError, UsageError
from advplug.estimate import paired_difference
from advplug.evidence import Evidence
from advplug.results import Cell, Flag, RunInfo, RunResult, ThreatRow
from advplug.store import Store
from cli_tools import run
from conftest import python

N = 200
KEYS = iter(range(10**6))


def evidence(broken, n=N, first=0, draws=1):
    index = np.arange(first, first + n)
    clean = np.ones((n, draws), dtype=bool)
    adaptive = np.isin(index, broken)[:, None].repeat(draws, 1)
    return Evidence(index, index % 10, clean, clean[:, 0], adaptive)


def cell(**change):
    facts = {"dataset": "digits", "model": "cnn", "defense": "none", "attack": "pgd", "norm": "linf", "eps": "1/10",
             "goal": "untargeted", "seed": 0, "status": "ok"}  # fmt: skip
    return Cell(str(next(KEYS)), **(facts | change))


def store(folder: Path, *cells: tuple[Cell, Evidence | None]) -> Path:
    with Store(folder) as kept:
        kept.put("sweep", cells)
    return folder


@pytest.fixture
def runs(tmp_path):
    """A loses 100 images; B 60 of these and 5 others."""
    a = store(tmp_path / "a", (cell(), evidence(range(100))))
    b = store(tmp_path / "b", (cell(), evidence([*range(60), *range(195, 200)])))
    return a, b


def test_the_difference_is_paired_image_by_image(runs):
    (row,) = compare(*runs).rows
    ours, theirs = np.ones(N), np.ones(N)
    ours[[*range(60), *range(195, 200)]] = 0
    theirs[:100] = 0
    assert row.worst_case_difference == paired_difference(ours, theirs)
    assert row.worst_case_difference.value == pytest.approx(35 / 200)
    assert row.clean_difference.value == 0
    assert (row.images, row.conclusion) == (N, "B is more robust")
    assert compare(*reversed(runs)).rows[0].conclusion == "B is less robust"


def test_an_interval_around_zero_shows_no_difference(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence(range(100))))
    b = store(tmp_path / "b", (cell(), evidence(range(2, 100))))
    (row,) = compare(a, b).rows
    assert row.worst_case_difference.low < 0 < row.worst_case_difference.value
    assert row.conclusion == "no difference shown"
    assert "no difference shown" in render(compare(a, b))


def test_the_worst_case_is_over_all_attacks_of_a_threat(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence(range(10))), (cell(attack="square"), evidence(range(5, 20))))
    b = store(tmp_path / "b", (cell(), evidence(range(30))))
    compared = compare(a, b)
    (row,) = compared.rows
    assert row.a.attacks == ("pgd", "square")
    assert row.worst_case_difference.value == pytest.approx(-10 / 200)
    assert compared.notes == (
        "cnn (none) on digits, linf 1/10, untargeted, seed 0: other attacks may explain the difference: "
        "pgd, square against pgd",
    )


def test_other_images_are_left_out_and_their_order_does_not_matter(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence([50], n=100)))
    turned = evidence([50, 60], n=100, first=40).rows(np.arange(100)[::-1])
    b = store(tmp_path / "b", (cell(), turned))
    (row,) = compare(a, b).rows
    assert row.images == 60
    assert row.worst_case_difference.value == pytest.approx(-1 / 60)


def test_of_two_sets_of_images_the_larger_is_compared(tmp_path):
    both = ((cell(), evidence([1], n=20)), (cell(), evidence([1], n=50)))
    (row,) = compare(store(tmp_path / "a", *both), store(tmp_path / "b", *both)).rows
    assert row.images == 50


def test_single_threats_on_the_same_data_are_compared_whatever_the_model(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence(range(100))), (cell(eps="1/5"), evidence(range(150))))
    b = store(tmp_path / "b", (cell(model="cnn-b", defense="prune"), evidence(range(20))))
    compared = compare(a, b)
    (row,) = compared.rows
    assert (row.a.model, row.b.model, row.b.defense) == ("cnn", "cnn-b", "prune")
    assert compared.only_a == ("cnn (none) on digits, linf 1/5, untargeted, seed 0",)
    assert "cnn (none) | cnn-b (prune)" in render(compared)


def test_failed_cells_are_no_results(tmp_path, runs):
    failed = store(tmp_path / "c", (cell(status="failed", reason="x"), None))
    with pytest.raises(UsageError, match="holds no finished cell"):
        compare(runs[0], failed)


def test_runs_without_common_images_or_threats_are_told_apart(tmp_path, runs):
    other = store(tmp_path / "c", (cell(), evidence([], first=1000)))
    compared = compare(runs[0], other)
    assert compared.rows == ()
    assert "the runs judged no image in common" in compared.notes[0]
    assert render(compared).startswith("note: cnn (none)")
    elsewhere = store(tmp_path / "d", (cell(dataset="mnist"), evidence([])))
    with pytest.raises(UsageError, match="share no dataset, norm, eps and goal"):
        compare(runs[0], elsewhere)


def test_the_gate_counts_points_lost(runs):
    gate(compare(*runs), 0)
    back = compare(*reversed(runs))
    gate(back, 17.5)
    with pytest.raises(GateError, match=r"accuracy is 17.5 points lower than before, 17 are allowed"):
        gate(back, 17)


def test_the_command_prints_a_table_or_json_and_ends_with_the_gate(runs):
    ran = run("compare", *runs)
    assert ran.code == 0
    assert "+17.5 [" in ran.out
    assert "B is more robust" in ran.out
    told = run("compare", *reversed(runs), "--json", "--fail-under", "5")
    assert told.code == 1
    assert "17.5 points lower than before, 5 are allowed" in told.err
    (row,) = json.loads(told.out)["rows"]
    assert row["conclusion"] == "B is less robust"
    assert row["worst_case_difference"]["value"] == pytest.approx(-0.175)
    assert row["a"]["attacks"] == ["pgd"]


def test_a_folder_that_is_no_run_ends_in_one_line(tmp_path, runs):
    ran = run("compare", runs[0], tmp_path / "nothing")
    assert ran.code == 2
    assert ran.err.strip().endswith("nothing holds no results.sqlite; give the folder of a run, the one named with -o")
    (tmp_path / "spoiled").mkdir()
    (tmp_path / "spoiled" / "results.sqlite").write_text("no database")
    assert "is no results file or is damaged" in run("compare", runs[0], tmp_path / "spoiled").err


def test_comparing_needs_no_torch(runs):
    done = python(
        "-c",
        "import sys; from pathlib import Path; from advplug.compare import compare, render;"
        "render(compare(*map(Path, sys.argv[1:]))); assert 'torch' not in sys.modules",
        *map(str, runs),
    )
    assert done.returncode == 0, done.stderr


def said(folder: Path, verdict: str, *flags: Flag) -> None:
    row = ThreatRow(
        "digits", "cnn", "none", "linf", "1/10", "untargeted", 0, ("pgd",), None, None, None, verdict, flags
    )  # type: ignore[arg-type]
    with Store(folder) as kept:
        kept.put_shown(RunResult(RunInfo({}, 0, "cpu", ""), (), (row,)))


def test_a_number_that_is_not_trustworthy_is_no_gain(runs):
    said(runs[0], "trusted")
    said(runs[1], "not trustworthy", Flag("zero-gradients", "error", "x"), Flag("lost-in-rounding", "info", "y"))
    compared = compare(*runs)
    (row,) = compared.rows
    assert (row.a.verdict, row.b.verdict, row.b.flags) == ("trusted", "not trustworthy", ("zero-gradients",))
    assert row.conclusion == "B not trustworthy"
    assert "trusted | not trustworthy" in render(compared)
    with pytest.raises(GateError, match="not trustworthy: zero-gradients"):
        gate(compared, 50)
    said(runs[1], "upper bound")
    assert compare(*runs).rows[0].conclusion == "B is more robust"
    gate(compare(*runs), 0)


def test_similarities_are_no_accuracy(tmp_path):
    lowered = replace(evidence(range(10)), minimised=1)
    with pytest.raises(UsageError, match="holds no finished cell"):
        compare(store(tmp_path / "a", (cell(), lowered)), tmp_path / "a")
