"""Folders of several runs: of one attack on one victim and the same images the last result counts, everywhere."""

from __future__ import annotations

import json

import pytest

from advplug.comparisons.runs import compare
from advplug.results import Cell
from advplug.stored.runs import observed, read
from cli_tools import run
from run_folders import cell, certificate, evidence, poisoned, poisoning, stored, threat

WEAK, STRONG = evidence(range(5)), evidence(range(25))


def told(weights: str = "a", images: str = "first", steps: int = 1) -> dict[str, object]:
    """Provenance as a run writes it: the victim, the images and the attack."""
    return {"model": {"identity": weights}, "images": {"indices_sha256": images}, "attack": {"steps": steps}}


def test_what_a_later_version_computed_anew_replaces_the_earlier_result(tmp_path):
    """Pooled, the worst case would be that of both versions: 50 % here, where the last word is 90 %."""
    old, new = cell(STRONG, provenance=told()), cell(WEAK, provenance=told())
    folder = stored(tmp_path / "a", (old, STRONG), (new, WEAK))
    assert [made.key for made in read(folder).cells] == [new.key]
    assert [made.key for made, _ in observed(folder)] == [new.key]
    (row,) = compare(folder, folder).rows
    assert row.a.worst_case_accuracy is not None
    assert row.a.worst_case_accuracy.value == 0.9
    (exported,) = map(json.loads, run("export", folder, "--what", "cells", "--format", "jsonl").out.splitlines())
    assert exported["key"] == new.key


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": told(weights="b")},
        {"provenance": told(images="second")},
        {"provenance": told(), "attack": "pgd:steps=2"},
        {"provenance": told(), "eps": "1/5"},
        {"provenance": told(), "goal": "targeted"},
        {"provenance": told(), "seed": 1},
        {"provenance": told(), "shape": "square"},
        {"provenance": {}},
    ],
)
def test_another_victim_budget_attack_or_set_of_images_replaces_nothing(tmp_path, change):
    first, second = cell(WEAK, provenance=told()), cell(STRONG, **change)
    folder = stored(tmp_path / "a", (first, WEAK), (second, STRONG))
    assert [made.key for made in read(folder).cells] == [first.key, second.key]
    assert len(observed(folder)) == 2


def test_a_failure_is_told_until_a_later_result_of_that_name(tmp_path):
    lost, mended = cell(status="failed", reason="x"), cell(WEAK, provenance=told())
    assert read(stored(tmp_path / "a", (lost, None), (mended, WEAK))).cells == (mended,)
    again = cell(status="failed", reason="y")
    later = read(stored(tmp_path / "b", (lost, None), (mended, WEAK), (again, None)))
    assert later.cells == (mended, again), "a failure is no result that could replace one"
    assert [made.reason for made in later.failed] == ["y"]


def test_a_failure_that_was_tried_again_is_told_again(tmp_path):
    """Of 500 images it fails, of 100 it works, and then of 500 again it fails: the last word is a failure."""
    lost, mended = cell(status="failed", reason="x"), cell(WEAK, provenance=told())
    folder = stored(tmp_path / "a", (lost, None), (mended, WEAK))
    assert read(folder).failed == ()
    assert [made.key for made in read(stored(folder, (lost, None))).cells] == [lost.key, mended.key]


def test_a_result_that_a_later_run_took_from_the_folder_counts_again(tmp_path):
    """`-e 8/255`, then `-e 4/255 -e 8/255`, which is another series, then the first again, which is stored already."""
    first, second = cell(STRONG, provenance=told()), cell(WEAK, provenance=told())
    folder = stored(tmp_path / "a", (first, STRONG), (second, WEAK), threats=[threat()])
    assert [made.key for made in read(folder).cells] == [second.key]
    stored(folder, (first, STRONG), threats=[threat()])
    assert [made.key for made in read(folder).cells] == [first.key]
    assert [made.key for made, _ in observed(folder)] == [first.key]


def test_certificates_and_poisonings_likewise(tmp_path):
    seen = poisoned(3)
    proofs = [certificate(provenance=told()) for _ in range(2)]
    poisons = [poisoning(seen, provenance=told()) for _ in range(2)]
    folder = stored(tmp_path / "a", certificates=proofs, poisonings=[(made, seen) for made in poisons])
    result = read(folder)
    assert [made.key for made in result.certificates] == [proofs[1].key]
    assert [made.key for made in result.poisonings] == [poisons[1].key]


def test_an_order_of_writing_that_a_retry_changed_is_kept(tmp_path):
    """The row of a cell that failed and was computed after all stays where it was."""
    lost, other = cell(status="failed", reason="x"), cell(WEAK, attack="square", provenance=told())
    folder = stored(tmp_path / "a", (lost, None), (other, WEAK))
    done = Cell(**{**vars(lost), "status": "ok", "reason": None, "provenance": told()})
    assert [made.key for made in read(stored(folder, (done, STRONG))).cells] == [lost.key, other.key]
