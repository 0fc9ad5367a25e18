"""The folder of runs, read again: what a run returned, what an interrupted one left, several in one folder."""

from __future__ import annotations

from dataclasses import replace

import pytest

import advplug
from advplug.errors import UsageError
from advplug.runner import Runner
from advplug.stored.runs import observed, read
from conftest import python

SMALL = {"n": 24, "audit": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def result(folder):
    return advplug.evaluate("cnn", ["fgsm", "ba:count=70"], ["bit-depth"], output=folder, **SMALL)


def by_key(rows):
    return {row.key: row for row in rows}


def test_a_folder_reads_as_what_the_run_returned(folder, result):
    found = read(folder)
    assert by_key(found.cells) == by_key(result.cells)
    assert found.threats == result.threats
    assert by_key(found.poisonings) == by_key(result.poisonings)
    assert any(p.differences for p in found.poisonings)
    assert found.run == result.run


def test_evidence_comes_with_its_cell(folder, result):
    for cell, evidence in observed(folder):
        assert cell in result.cells
        value = cell.metrics["robust_accuracy"]
        assert value is not None
        assert evidence.n == value.n


def test_a_second_run_in_the_folder_adds_to_the_first(folder, result, tmp_path):
    (tmp_path / "results.sqlite").write_bytes((folder / "results.sqlite").read_bytes())
    more = advplug.evaluate("cnn", "noise", [], output=tmp_path, **SMALL)
    found = read(tmp_path)
    assert by_key(result.cells) | by_key(more.cells) == by_key(found.cells)
    assert replace(found.run, output=None) == replace(more.run, output=None)
    undefended = [t for t in found.threats if t.defense == "none"]
    assert [t.attacks for t in undefended] == [t.attacks for t in more.threats]


def test_an_interrupted_run_can_be_read(tmp_path, monkeypatch):
    once = Runner.settle

    def interrupted(self, job, outcome):
        once(self, job, outcome)
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        advplug.evaluate("cnn", ["fgsm", "noise"], [], output=tmp_path, **SMALL)
    found = read(tmp_path)
    assert [c.attack for c in found.cells] == ["fgsm"]
    assert [t.attacks for t in found.threats] == [("fgsm",)]


def test_reading_needs_no_torch_and_no_lock(folder, result):
    done = python(
        "-c",
        "import sys; from pathlib import Path; from advplug.stored.runs import read;"
        "assert read(Path(sys.argv[1])).cells; assert 'torch' not in sys.modules",
        str(folder),
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"holds no results\.sqlite"):
        read(tmp_path)
