"""Trackers: what they are given, when they are made, and that one which fails costs nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import advplug
from advplug import registry as registries
from advplug.contracts import Spec, TrackerCaps
from advplug.errors import UsageError
from advplug.hooks import hookimpl
from advplug.registry import Source
from advplug.results import RunInfo, RunResult, ThreatRow
from advplug.testing import check_tracker
from advplug.testing.trackers import results
from advplug.tracking import track
from cli_tools import CNN, QUICK, TINY, run

EVAL = ("eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, *QUICK)


# --- a plugin of these tests: three trackers ---------------------------------------------------------

SEEN: list[tuple[RunResult, dict[str, str]]] = []


def keeps() -> Any:
    def tracker(result: RunResult, files: Mapping[str, Path]) -> str:
        SEEN.append((result, {name: path.read_text() for name, path in files.items()}))
        return "here,\nto look at"

    return tracker


def breaks() -> Any:
    def tracker(result: RunResult, files: Mapping[str, Path]) -> None:
        raise ConnectionError("no route\nto host")

    return tracker


def cannot_be_made() -> Any:
    raise OSError("no such store")


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("trackers_under_test")

    def specs() -> list[Spec]:
        return [
            Spec(name, f"{__name__}:{name}", TrackerCaps(), "a test") for name in ("keeps", "breaks", "cannot_be_made")
        ]

    module.hook = hookimpl(specs, specname="advplug_trackers")  # type: ignore[attr-defined]

    class Point:
        def load(self) -> ModuleType:
            return module

    installed = registries._installed()
    monkeypatch.setattr(registries, "_installed", lambda: [*installed, (Source("mine", "dist", "1"), Point())])
    registries.registry.cache_clear()
    SEEN.clear()
    yield
    registries.registry.cache_clear()


# --- on the command line -----------------------------------------------------------------------------


def test_a_tracker_gets_the_result_and_the_files_worth_keeping(tmp_path: Path) -> None:
    ran = run(*EVAL, "-o", tmp_path / "out", "--track", "keeps", "--json")
    assert ran.code == 0
    ((result, files),) = SEEN
    assert result.to_json() == ran.json
    assert json.loads(files["result.json"]) == ran.json
    assert files["report.html"].lstrip().startswith("<!doctype html>")
    assert "tracked by 'keeps': here, to look at\n" in ran.err


def test_a_tracker_that_fails_costs_neither_result_nor_exit_code(tmp_path: Path) -> None:
    ran = run(*EVAL, "-o", tmp_path / "out", "--track", "breaks", "--track", "keeps", "-q", "--json")
    assert ran.code == 0
    assert [c["status"] for c in ran.json["cells"]] == ["ok"]
    kept = f"the results are kept in {tmp_path / 'out'}"
    # -q silences what went well, not what failed; the other trackers get their result all the same.
    assert ran.err == f"tracker 'breaks' failed: ConnectionError: no route to host; {kept}\n"
    assert len(SEEN) == 1
    assert run("status", tmp_path / "out").out.startswith("1 cells: 1 done")


def test_what_is_wrong_with_a_tracker_is_known_before_the_run(tmp_path: Path) -> None:
    for reference, told in (
        ("keps", "no tracker is called 'keps'; did you mean 'keeps'?"),
        ("keeps:level=3", "tracker 'keeps' has no parameter 'level'"),
        ("cannot_be_made", "tracker 'cannot_be_made' cannot be made: OSError: no such store"),
        (f"jsonl:{tmp_path / 'none' / 'x'}", "does not exist; create it first"),
    ):
        ran = run(*EVAL, "-o", tmp_path / "out", "--track", reference)
        assert ran.code == 2
        assert told in ran.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tracks_nothing(tmp_path: Path) -> None:
    assert run(*EVAL, "-o", tmp_path / "out", "--track", "keeps", "--dry-run").code == 0
    assert SEEN == []


def test_a_matrix_file_and_a_transfer_are_tracked_too(tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(f"models: [{CNN!r}]\nattacks: [fgsm]\ndatasets: [{TINY!r}]\naudit: none\n")
    ran = run("run", matrix, "-o", tmp_path / "out", "--track", "keeps")
    assert ran.code == 0, ran.err
    moved = run("transfer", "-m", CNN, "-m", "cnn:epochs=2", "-a", "fgsm", "--dataset", TINY, "-o", tmp_path / "moved",
                "--track", "keeps")  # fmt: skip
    assert moved.code == 0, moved.err
    assert [c.attack for c in SEEN[0][0].cells] == ["fgsm"]
    assert len(SEEN[1][0].cells) == 4


def test_failed_cells_are_tracked_and_the_exit_code_says_so(tmp_path: Path) -> None:
    ran = run(*EVAL, "-a", "pgd:steps=1", "-e", "1/10", "-o", tmp_path / "out", "--track", "keeps")
    assert (ran.code, len(SEEN)) == (0, 1)
    broken = run("eval", "-m", "py:usernets:raises", "-m", CNN, "-a", "fgsm", "--dataset", TINY, *QUICK,
                 "-o", tmp_path / "broken", "--track", "keeps")  # fmt: skip
    assert (broken.code, len(SEEN)) == (3, 2)
    assert {c.status for c in SEEN[1][0].cells} == {"ok", "failed"}


# --- in Python ---------------------------------------------------------------------------------------


def test_functions_are_trackers_and_one_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    got = []

    def mine(result: RunResult, files: Mapping[str, Path]) -> None:
        got.append((result, sorted(files)))

    with caplog.at_level(logging.WARNING, logger="advplug"):
        result = advplug.evaluate(CNN, "fgsm", dataset=TINY, audit="none", track=[mine, "keeps", "breaks"])
    # Nothing was kept in a folder, so there is no report, either.
    assert got == [(result, ["result.json"])]
    assert SEEN[0][0] == result
    assert [r.getMessage() for r in caplog.records if r.name == "advplug"] == [
        "tracker 'breaks' failed: ConnectionError: no route to host"
    ]
    with pytest.raises(UsageError, match="a tracker is a reference such as 'mlflow' or a function, got int"):
        advplug.evaluate(CNN, "fgsm", dataset=TINY, track=[3])  # type: ignore[list-item]


def test_a_report_that_cannot_be_drawn_is_no_reason_not_to_track() -> None:
    gone = results()["a run with everything"]  # it names a folder that is not there
    told = track(gone, [("keeps", keeps())])
    assert [t.ok for t in told] == [False, True]
    assert told[0].text.startswith("trackers get no report: ")
    assert list(SEEN[0][1]) == ["result.json"]


# --- the built-in one --------------------------------------------------------------------------------


def test_jsonl_appends_a_line_a_figure(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    check_tracker("jsonl", file=file)
    assert len(file.read_text().splitlines()) == 2 * 5 + 2  # twice 2 threats, 1 certificate and 2 poisonings; 2 threats
    first, *_, proven, poisoned, failed = map(json.loads, file.read_text().splitlines()[:5])
    assert (first["kind"], first["verdict"], first["command"]) == ("threat", "not trustworthy", "advplug eval -m cnn")
    assert (first["worst_case_accuracy"], first["worst_case_accuracy_n"]) == (0.4, 50)
    assert first["worst_case_accuracy_low"] == pytest.approx(0.2761, abs=1e-4)
    assert (proven["kind"], proven["average_radius"]) == ("certificate", 0.3)
    assert (poisoned["attack_success_rate"], failed["reason"]) == (0.96, "no captions")


@pytest.mark.parametrize(("number", "told"), [(1, "1 line in"), (2, "2 lines in")])
def test_jsonl_says_how_many_lines_it_wrote(number: int, told: str, tmp_path: Path) -> None:
    from advplug.builtin.trackers import jsonl

    row = ThreatRow("digits", "cnn", "none", "linf", "1/10", "untargeted", 0, ("pgd",), None, None, None, None)
    result = RunResult(RunInfo({}, 0, "cpu", ""), (), (row,) * number)
    assert jsonl(tmp_path / "log.jsonl")(result, {}) == f"{told} {tmp_path / 'log.jsonl'}"


def test_the_kit_finds_what_a_tracker_does_wrong() -> None:
    with pytest.raises(AssertionError, match="raised ConnectionError: no route to host"):
        check_tracker("breaks")
    with pytest.raises(AssertionError, match="what it returns is more than one line"):
        check_tracker("keeps")
