"""Tables and remarks of results: what reads the same is told apart, and what is true of several is said once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from advplug.table import _facts, remarks
from cli_tools import CNN, QUICK, TINY, run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(*options: str) -> tuple[list[str], list[str]]:
    """The lines of the table of worst cases, and those of the remarks."""
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-n", "4", *QUICK, *options)
    assert ran.code == 0, ran.err
    worst = ran.out.split("Worst case over the attacks")[1].split("\n\n")
    return worst[1].splitlines(), ran.out.splitlines()


def near_chance(remarks: list[str]) -> set[str]:
    """The threats that the check of that name tripped for: the model is not trained enough to be more."""
    (line,) = (line for line in remarks if line.startswith("error: near-chance: "))
    return set(line.split(": ")[2].split("; "))


def test_shifts_and_rotations_are_threats_that_can_be_told_apart() -> None:
    moves = ("spatial:angle=0,method=random,tries=1", "spatial:shift=0,method=random,tries=1")
    table, remarks = shown("-a", moves[0], "-a", moves[1])
    for move in moves:
        assert sum(move in line for line in table) == 1
        assert f"{CNN} (none), spatial 1, by {move}" in near_chance(remarks)


def test_each_of_them_is_stored_and_reported() -> None:
    moves = ("spatial:angle=0,method=random,tries=1", "spatial:shift=0,method=random,tries=1")
    assert (
        run("eval", "--dataset", TINY, "-m", CNN, "-n", "4", *QUICK, "-a", moves[0], "-a", moves[1], "-o", "out").code
        == 0
    )
    stored = run("export", "out", "-f", "json").json
    shapes = {"shift=0.1,angle=0,scale=0": moves[0], "shift=0,angle=30,scale=0": moves[1]}
    assert {t["shape"]: t["attacks"] for t in stored["threats"]} == {s: [move] for s, move in shapes.items()}
    assert {c["shape"]: c["attack"] for c in stored["cells"]} == shapes
    assert run("report", "out", "-o", "report.html").code == 0
    page = Path("report.html").read_text()
    assert all(shape in page for shape in shapes)
    compared = run("compare", "out", "out")
    assert all(shape in compared.out for shape in shapes), compared.err


def test_attacks_are_named_where_nothing_else_tells_threats_apart_and_only_there() -> None:
    table, remarks = shown("-a", "fgsm", "-a", "spatial:method=random,tries=1")
    assert not any("tries=1" in line or "fgsm" in line for line in table)
    assert near_chance(remarks) == {f"{CNN} (none), linf 8/255", f"{CNN} (none), spatial 1"}


def test_goals_are_named_where_there_are_two() -> None:
    _, remarks = shown("-a", "fgsm", "-a", "fgsm:target=1", "-e", "8/255")
    assert near_chance(remarks) == {f"{CNN} (none), linf 8/255, untargeted", f"{CNN} (none), linf 8/255, targeted:1"}


def test_a_note_on_several_attacks_stands_once() -> None:
    _, remarks = shown("-a", "fgsm", "-a", "pgd:steps=1", "-d", "jpeg")
    notes = [line for line in remarks if "gradients pass the defense" in line]
    assert [line.partition(":")[2].split(" on ")[0].strip() for line in notes] == ["fgsm, pgd:steps=1"]


def test_a_plan_tells_goals_apart() -> None:
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", "-a", "fgsm:target=1", "-a", "ba", "--dry-run")
    assert ran.code == 0, ran.err
    (first, second), (poison,) = ([line for line in ran.out.splitlines() if f" {a} " in line] for a in ("fgsm", "ba"))
    assert " untargeted " in first
    assert " targeted:1 " in second
    assert " targeted" not in poison
    alone = run("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", "--dry-run")
    assert "goal" not in alone.out


def test_why_numbers_are_upper_bounds_is_said_once() -> None:
    def threat(eps: str, *unchecked: str) -> SimpleNamespace:
        named = {"dataset": "digits", "model": "cnn", "defense": "none", "norm": "linf", "goal": "untargeted"}
        said = {"verdict": "upper bound", "unchecked": unchecked, "attacks": ("pgd",), "flags": (), "audit": None}
        return SimpleNamespace(**named, **said, seed=0, eps=eps)

    threats = [threat("1/255"), threat("2/255", "zero-gradients"), threat("4/255")]
    nothing = {"cells": (), "certificates": (), "poisonings": (), "run": SimpleNamespace(leakage=())}
    result: Any = SimpleNamespace(threats=threats, **nothing)
    (text,) = remarks(result)
    assert text.splitlines() == [
        "upper bound: cnn (none), linf 1/255; cnn (none), linf 4/255: a stronger attack may break more",
        "upper bound: cnn (none), linf 2/255: not checked: zero-gradients",
    ]


def test_facts_of_a_models_own_training_name_it_once() -> None:
    facts = {"clip-tiny": {"steps": 3}, "prune": {"ratio": 0.2}}
    cell: Any = SimpleNamespace(model="clip-tiny", provenance={"facts": facts})
    assert _facts([cell]) == ["clip-tiny: steps 3", "prune on clip-tiny: ratio 0.2"]
