"""`advplug compare`: paired differences of stored runs, what is matched with what, the gate, and its messages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advplug.comparisons.gates import gate, gate_of
from advplug.comparisons.runs import compare, render
from advplug.errors import GateError, UsageError
from advplug.estimate import Estimate, paired_difference
from advplug.evidence import Evidence
from advplug.results import Cell, Flag, RunInfo, RunResult, ThreatRow
from advplug.store import Store
from cli_tools import run
from conftest import python
from run_folders import UNTRUSTED, poisoned, poisoning, stored

N = 200
KEYS = iter(range(10**6))


def evidence(broken, n=N, first=0, draws=1, **more):
    index = np.arange(first, first + n)
    clean = np.ones((n, draws), dtype=bool)
    adaptive = np.isin(index, broken)[:, None].repeat(draws, 1)
    return Evidence(index, index % 10, clean, clean[:, 0], adaptive, **more)


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
    title, heads, *_ = (line for line in render(compare(a, b)).splitlines() if line)
    same = "dataset digits, norm linf, eps 1/10, goal untargeted, seed 0, images 200"
    assert title == f"Worst-case accuracy: A {a}, B {b} ({same})"
    assert heads.startswith(" model (defense)    A %    B %")
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


def test_the_same_attacks_in_another_order_explain_nothing(tmp_path):
    """Workers of a cluster finish in any order; an attack may be stored along two series of budgets."""
    other = "square"
    a = store(tmp_path / "a", (cell(), evidence([1])), (cell(attack=other), evidence([2])), (cell(), evidence([1])))
    b = store(tmp_path / "b", (cell(attack=other), evidence([2])), (cell(), evidence([1])))
    compared = compare(a, b)
    assert compared.notes == ()
    assert compared.rows[0].a.attacks == ("pgd", other)


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


def repaired(folder: Path, *told: tuple[str, int]) -> Path:
    """A checkpoint that was wrong on 40 images and fell on 150, and the mended one under the same name; `told`: what
    the last runs said, verdict and number of images right without attack."""
    old, new = ({"model": {"identity": {"sha256": name}}, "images": {}} for name in ("old", "new"))
    wrong = evidence(range(150))
    wrong = replace(wrong, clean=wrong.clean & (np.arange(N) < 160)[:, None])
    store(folder, (cell(provenance=old), wrong), (cell(provenance=new), evidence(range(20))))
    for verdict, right in told:
        row = ThreatRow("digits", "cnn", "none", "linf", "1/10", "untargeted", 0, ("pgd",),
                        Estimate(right / N, None, None, N), None, None, verdict)  # fmt: skip
        with Store(folder) as kept:
            kept.put_shown(RunResult(RunInfo({}, 0, "cpu", ""), (), (row,)))
    return folder


def test_a_mended_model_under_the_same_name_is_not_mixed_with_what_it_was(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence(range(150))))
    (row,) = compare(a, repaired(tmp_path / "b")).rows
    assert row.b.clean_accuracy.value == 1
    assert row.b.worst_case_accuracy.value == 0.9
    assert row.conclusion == "B is more robust"
    (row,) = compare(a, repaired(tmp_path / "c", ("trusted", 160))).rows
    assert (row.b.worst_case_accuracy.value, row.b.verdict) == (0.25, "trusted"), "the last run was of the old one"
    (row,) = compare(a, repaired(tmp_path / "d", ("upper bound", 160), ("trusted", 200))).rows
    assert (row.b.worst_case_accuracy.value, row.b.verdict) == (0.9, "trusted")


def test_a_verdict_on_fewer_images_is_none_of_more(tmp_path):
    row = ThreatRow("digits", "cnn", "none", "linf", "1/10", "untargeted", 0, ("pgd",),
                    Estimate(1.0, None, None, 50), None, None, "trusted")  # fmt: skip
    a = store(tmp_path / "a", (cell(), evidence([1], n=200)), (cell(), evidence([1], n=50)))
    with Store(a) as kept:
        kept.put_shown(RunResult(RunInfo({}, 0, "cpu", ""), (), (row,)))
    (found,) = compare(a, a).rows
    assert (found.images, found.a.verdict) == (200, None)


def test_images_of_other_data_under_the_same_name_are_not_paired(tmp_path):
    """A file that was written anew, or tensors, all of which are called 'tensors'."""
    seen = evidence(range(10))
    other = replace(seen, y=(seen.y + 1) % 10)
    kept, changed = ({"dataset": {"fingerprint": name}} for name in ("a", "b"))
    a = store(tmp_path / "a", (cell(provenance=kept), seen))
    compared = compare(a, store(tmp_path / "b", (cell(provenance=changed), other)))
    assert compared.rows == ()
    assert compared.notes[0].endswith("the runs judged other data under this name: 200 of 200 labels differ")
    with pytest.raises(GateError, match="no image in common, or other data"):
        gate(compared, gate_of(("robust_accuracy=0.1",), False, None))
    moved = compare(a, store(tmp_path / "c", (cell(provenance=changed), seen)))
    assert moved.rows[0].images == 200
    assert moved.notes[0].endswith("the data changed between the runs; this holds if their images are the same")
    assert compare(a, a).notes == ()


def test_classes_of_galleries_are_numbered_by_the_images_that_are_judged(tmp_path):
    whole = evidence(range(10), right=np.eye(N, dtype=bool), own=np.eye(N, dtype=bool))
    fewer = replace(whole.rows(np.arange(50, 100)), y=np.arange(50))
    compared = compare(store(tmp_path / "a", (cell(), whole)), store(tmp_path / "b", (cell(), fewer)))
    assert compared.rows[0].images == 50


def test_single_threats_on_the_same_data_are_compared_whatever_the_model(tmp_path):
    a = store(tmp_path / "a", (cell(), evidence(range(100))), (cell(eps="1/5"), evidence(range(150))))
    b = store(tmp_path / "b", (cell(model="cnn-b", defense="prune"), evidence(range(20))))
    compared = compare(a, b)
    (row,) = compared.rows
    assert (row.a.model, row.b.model, row.b.defense) == ("cnn", "cnn-b", "prune")
    assert compared.only_a == ("cnn (none) on digits, linf 1/5, untargeted, seed 0",)
    assert "cnn (none) | cnn-b (prune)" in render(compared)


def test_each_set_of_images_is_compared_with_itself_and_named(tmp_path):
    """The same attack fools other images of each; what is left over on either side is paired on the same data alone."""
    sets = {"digits": (100, 60), "mnist": (20, 150)}
    of = {name: [(cell(dataset=d, defense=own), evidence(range(broken[side]))) for d, broken in sets.items()
                 for own in ("none", defense)]
          for side, (name, defense) in enumerate((("a", "jpeg"), ("b", "prune")))}  # fmt: skip
    a, b = (store(tmp_path / name, *cells) for name, cells in of.items())
    compared = compare(a, b)
    told = [(r.a.dataset, r.a.defense, r.b.dataset, r.b.defense, r.conclusion) for r in compared.rows]
    assert told == [
        ("digits", "none", "digits", "none", "B is more robust"),
        ("digits", "jpeg", "digits", "prune", "B is more robust"),
        ("mnist", "none", "mnist", "none", "B is less robust"),
        ("mnist", "jpeg", "mnist", "prune", "B is less robust"),
    ]
    title, heads, _, *rows = (line for line in render(compared).splitlines() if line)
    assert "dataset" not in title
    assert heads.split()[0] == "dataset"
    assert [row.split()[0] for row in rows] == ["digits", "digits", "mnist", "mnist"]
    with pytest.raises(GateError, match=r"^cnn \(none\) on mnist, linf 1/10: robust_accuracy is 0\.250"):
        gate(compared, gate_of(("robust_accuracy=0.9",), False, None))
    failed = store(tmp_path / "c", *of["b"], (cell(dataset="mnist", status="failed", reason="x"), None))
    assert compare(a, failed).failed_b == ("pgd on cnn (none) on mnist, linf 1/10: x",)


def test_runs_that_hold_several_others_on_the_same_data_say_so(tmp_path):
    a, b = (
        store(tmp_path / m, *((cell(model=m, defense=d), evidence([1])) for d in ("none", "jpeg")))
        for m in ("cnn", "cnn-b")
    )
    with pytest.raises(UsageError, match="share no model and defense, and hold several on the same data; compare"):
        compare(a, b)


def test_names_of_matrix_files_are_shown_and_written_nowhere(tmp_path):
    made = (cell(defense="jpeg:quality=50", attack="pgd:steps=3"), evidence(range(50)))
    a, b = store(tmp_path / "a", made), store(tmp_path / "b", made, (cell(attack="fgsm", eps="1/5"), evidence([])))
    for folder, net in ((a, "cnn"), (b, "net")):
        names = {"jpeg:quality=50": "squash", "pgd:steps=3": "strong", "cnn": net}
        with Store(folder) as kept:
            kept.put_shown(RunResult(RunInfo({}, 0, "cpu", "", names=names), (), ()))
    text = run("compare", a, b)
    assert text.code == 0, text.err
    assert " cnn (squash) " in text.out
    assert "only in B: cnn (none) on digits, linf 1/5" in text.out
    assert "quality" not in text.out
    (row,) = run("compare", a, b, "--json").json["rows"]
    assert (row["a"]["defense"], row["b"]["attacks"]) == ("jpeg:quality=50", ["pgd:steps=3"])


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


def test_the_command_prints_a_table_or_json(runs):
    ran = run("compare", *runs)
    assert ran.code == 0
    assert "+17.5 [" in ran.out
    assert "B is more robust" in ran.out
    told = run("compare", *reversed(runs), "--json")
    assert told.code == 0
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
        "import sys; from pathlib import Path; from advplug.comparisons.runs import compare, render;"
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
    said(runs[1], "upper bound")
    assert compare(*runs).rows[0].conclusion == "B is more robust"


def similar(lowered: float, n: int = 50) -> Evidence:
    """Each image and its one text are alike by 0.8; the attack leaves `lowered`, a little more every other time."""
    own = np.ones((n, 1), dtype=bool)
    left = lowered + 0.02 * (np.arange(n)[:, None] % 2)
    return replace(evidence([], n=n), minimised=1, own=own, cosine=np.full((n, 1), 0.8), cosine_adaptive=left)


def test_similarities_are_compared_as_similarities(tmp_path):
    a = store(tmp_path / "a", (cell(goal="minimise"), similar(0.2)))
    b = store(tmp_path / "b", (cell(goal="minimise"), similar(0.3)))
    (row,) = compare(a, b).rows
    assert row.quantity == "similarity"
    assert row.a.worst_case_accuracy is None
    assert row.b.worst_case_similarity.value == pytest.approx(0.31)
    assert row.b.clean_similarity.value == pytest.approx(0.8)
    # Every image gained as much, so the interval of the mean is a point.
    assert (row.worst_case_difference.low, row.worst_case_difference.high) == pytest.approx((0.1, 0.1))
    assert row.conclusion == "B is more robust"
    table = render(compare(a, b))
    assert table.startswith("Worst-case similarity")
    assert "+0.100 [+0.100, +0.100]" in table


def test_a_similarity_is_not_compared_with_an_accuracy(tmp_path):
    a = store(tmp_path / "a", (cell(), similar(0.2)))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(a, store(tmp_path / "b", (cell(), evidence([1]))))


# --- attacks on training data -----------------------------------------------------------------------


def poisons(folder: Path, hits: int, n: int = 40, **change: Any) -> Path:
    seen = poisoned(hits, n)
    return stored(folder, poisonings=[(poisoning(seen, **change), seen)])


def test_success_of_poisons_is_paired_and_more_of_it_is_worse(tmp_path):
    a, b = poisons(tmp_path / "a", 30, verdict="trusted"), poisons(tmp_path / "b", 5, verdict="trusted")
    (row,) = compare(a, b).poisonings
    # The first `hits` images fall: 25 of 40 in A alone, none in B alone.
    ours, theirs = (np.arange(40) < hits for hits in (5, 30))
    success = row.differences["attack_success_rate"]
    assert success == paired_difference(ours, theirs)
    assert success.value == pytest.approx(-25 / 40)
    assert row.differences["clean_accuracy"].value == 0
    assert (row.a.metrics["attack_success_rate"].value, row.a.verdict) == (0.75, "trusted")
    assert row.conclusion == "B is more robust"
    assert compare(b, a).poisonings[0].conclusion == "B is less robust"
    table = render(compare(a, b))
    assert "triggered images" in table
    assert "-62.5 [" in table
    assert json.loads(run("compare", a, b, "--json").out)["poisonings"][0]["conclusion"] == "B is more robust"


def test_single_poisonings_of_one_attack_are_compared_whatever_the_defense(tmp_path):
    a, b = poisons(tmp_path / "a", 30), poisons(tmp_path / "b", 30, defense="spectre")
    compared = compare(a, b)
    assert [(r.a.defense, r.b.defense) for r in compared.poisonings] == [("none", "spectre")]
    assert compared.poisonings[0].conclusion == "no difference shown"
    assert "cnn (none) | cnn (spectre)" in render(compared)


def test_poisonings_on_other_images_or_with_a_doubted_figure(tmp_path):
    a = poisons(tmp_path / "a", 30)
    other = compare(a, poisons(tmp_path / "b", 30, n=60))
    assert other.poisonings == ()
    assert other.notes == ("cnn (none) on digits, ba:count=7, seed 0: the runs judged other images",)
    doubted = compare(a, poisons(tmp_path / "c", 5, **UNTRUSTED)).poisonings[0]
    assert (doubted.conclusion, doubted.b.flags) == ("B not trustworthy", ("zero-gradients",))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(a, poisons(tmp_path / "d", 30, attack="tdpa"))
