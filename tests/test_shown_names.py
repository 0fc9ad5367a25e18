"""Names of a matrix file stand wherever people read, and the references wherever programs do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advplug.studies.shown_names import called, names_of, renamed, shared, spelled_out
from cli_tools import CNN, TINY, run

NAMES = names_of({"strong": "pgd:steps=3,eps=1/10", "small": TINY, "squash": "jpeg:quality=50", "net": CNN})


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("pgd:steps=3", "strong"),
        ("pgd:steps=4", "pgd:steps=4"),
        ("jpeg:quality=50+prune", "squash+prune"),
        ("prune+jpeg:quality=50", "prune+squash"),
        ("none", "none"),
        (f"transfer:from=({CNN}+jpeg:quality=50),attack=(pgd:steps=3)", "transfer:from=net+squash,attack=pgd:steps=3"),
        ("a label (of one's own", "a label (of one's own"),
    ],
)
def test_what_a_label_is_called(label: str, shown: str) -> None:
    assert called(label, NAMES) == shown


def test_attacks_that_differ_in_their_threat_only_keep_their_reference() -> None:
    """Their label is the same, so that a name would be wrong for all but one."""
    variants = {"near": "pgd:steps=3,eps=1/10", "far": "pgd:steps=3,eps=1/5", "to-3": "fgsm:target=3"}
    names = names_of(variants, variants.values())
    assert called("pgd:steps=3", names) == "pgd:steps=3"
    assert called("fgsm", names) == "to-3"
    names = names_of(variants, ["fgsm", "fgsm:target=3", "pgd:steps=3,eps=1/5"])
    assert called("fgsm", names) == "fgsm"
    assert called("pgd:steps=3", names) == "far"
    names = names_of({"usual": "pgd:steps=3", "far": "pgd:steps=3,eps=1/5"}, ["pgd:steps=3", "pgd:steps=3,eps=1/5"])
    assert called("pgd:steps=3", names) == "pgd:steps=3"


def test_a_defense_with_a_budget_lends_its_name_to_no_other() -> None:
    names = names_of({"at8": "advtrain:eps=8/255"}, ["fgsm"])
    assert called("advtrain", names) == "advtrain"
    assert called("advtrain:eps=8/255+jpeg", names) == "at8+jpeg"


def test_names_of_two_runs_that_mean_the_same() -> None:
    ours = {"jpeg": "squash", "pgd:steps=3": "strong", "prune": "thin"}
    theirs = {"jpeg": "squash", "pgd:steps=4": "strong", "cnn:epochs=1": "net"}
    assert shared(ours, theirs) == {"jpeg": "squash", "prune": "thin", "cnn:epochs=1": "net"}


def test_a_run_with_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matrix = {
        "variants": {"small": TINY, "net": CNN, "squash": "jpeg:quality=50", "strong": "pgd:steps=3"},
        "datasets": "small", "models": "net", "defenses": ["squash"], "attacks": ["fgsm", "strong"], "eps": "1/10",
        "n": 16, "audit": "none",
    }  # fmt: skip
    (tmp_path / "m.yaml").write_text(json.dumps(matrix))
    ran = run("run", "m.yaml", "-o", "out", "-q")
    assert ran.code == 0, ran.err
    assert "strong" in ran.out
    assert "squash" in ran.out
    assert "pgd:steps=3" not in ran.out
    result = json.loads(run("run", "m.yaml", "-o", "out", "-q", "--json").out)
    assert {c["attack"] for c in result["cells"]} == {"fgsm", "pgd:steps=3"}
    assert result["run"]["names"]["jpeg:quality=50"] == "squash"
    table = run("export", "out", "-f", "md").out
    assert "squash" in table
    assert "jpeg:quality" not in table
    assert "jpeg:quality=50" in run("export", "out", "-f", "csv").out
    for command in (("run", "m.yaml", "-o", "out", "--dry-run"), ("status", "out")):
        shown, told = (run(*command, *more).out for more in ((), ("--json",)))
        assert " squash " in shown
        assert "jpeg:quality" not in shown
        assert "fake:" not in shown
        assert {c["defense"] for c in json.loads(told)["cells"]} == {"none", "jpeg:quality=50"}
    made = run("report", "out", "--explain")
    assert made.code == 0, made.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Names of the matrix file" in page
    assert ">strong<" in page
    assert "not explained" not in page
    for kind in ("heatmap", "sweep"):
        drawn = run("plot", "out", "-k", kind, "-o", f"{kind}.svg")
        assert drawn.code == (0 if kind == "heatmap" else 2), drawn.err
    assert "squash" in (tmp_path / "heatmap.svg").read_text()


def test_renaming_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("eval", "-m", CNN, "-d", "jpeg:quality=50", "-a", "fgsm", "--dataset", TINY, "-n", "8", "--audit", "none",
        "-o", "out", "-q")  # fmt: skip
    from dataclasses import replace

    from advplug.stored.runs import read

    found = read(tmp_path / "out")
    assert renamed(found) is found
    named = replace(found, run=replace(found.run, names=NAMES))
    shown = renamed(named)
    assert [c.defense for c in shown.cells] == ["none", "squash"]
    assert [spelled_out(c, NAMES) for c in shown.cells] == list(named.cells)
