"""Runs in a real MLflow store: a SQLite file, a folder, and a server that is not there."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from advplug.estimate import rate
from advplug.results import Cell, RunInfo, RunResult, ThreatRow
from advplug.testing import check_tracker
from advplug.testing.trackers import results
from advplug_mlflow.entries import parts, whole
from cli_tools import CNN, QUICK, TINY, run
from conftest import python


def client(uri: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        return MlflowClient(uri)


def kept(uri: str, experiment: str) -> tuple[Any, list[Any]]:
    """The outer run, and those inside it in the order of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = client(uri)
        found = store.search_runs([store.get_experiment_by_name(experiment).experiment_id])
    (outer,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    inner = [r for r in found if r.data.tags.get("mlflow.parentRunId") == outer.info.run_id]
    assert len(inner) == len(found) - 1
    return outer, sorted(inner, key=lambda r: r.info.run_name)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Path]:
    """What `eval` printed as JSON, and the store that it was tracked in."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'runs.db'}"
    before = Path.cwd()
    os.chdir(folder)  # where MLflow puts the artifacts beside a SQLite file
    try:
        ran = run("eval", "-m", CNN, "-d", "bit-depth", "-a", "fgsm", "-a", "pgd:steps=2", "-e", "1/10",
                  "--dataset", TINY, *QUICK, "-o", folder / "out", "--json",
                  "--track", f"mlflow:tiny,uri={uri},run=first")  # fmt: skip
    finally:
        os.chdir(before)
    assert ran.code == 0, ran.err
    assert f"of experiment 'tiny' in {uri}" in ran.err
    return ran.json, uri, folder


def test_the_run_holds_what_was_asked_for_and_counts(tracked: tuple[Any, str, Path]) -> None:
    told, uri, _ = tracked
    outer, _ = kept(uri, "tiny")
    assert (outer.info.run_name, outer.info.status) == ("first", "FINISHED")
    params = outer.data.params
    assert {k: params[k] for k in ("models", "defenses", "attacks", "budgets", "seeds", "device")} == {
        "models": CNN, "defenses": "none; bit-depth", "attacks": "fgsm; pgd:steps=2", "budgets": "1/10", "seeds": "0",
        "device": "cpu",
    }  # fmt: skip
    assert params["version.torch"] == told["run"]["versions"]["torch"]
    counts = {k: v for k, v in outer.data.metrics.items() if k.startswith("cells_")}
    assert counts == {"cells_ok": 4, "cells_refused": 0, "cells_failed": 0}
    assert outer.data.metrics["passes"] == told["run"]["passes"]
    assert outer.data.tags["advplug.command"].startswith("advplug eval ")


def test_every_threat_is_a_run_with_intervals_and_verdict(tracked: tuple[Any, str, Path]) -> None:
    told, uri, _ = tracked
    _, inner = kept(uri, "tiny")
    assert [r.info.run_name for r in inner] == [f"{CNN} (bit-depth) linf 1/10", f"{CNN} linf 1/10"]
    for shown, defense in zip(inner, ("bit-depth", "none"), strict=True):
        (row,) = [t for t in told["threats"] if t["defense"] == defense]
        metrics, tags, params = shown.data.metrics, shown.data.tags, shown.data.params
        for name in ("clean_accuracy", "worst_case_accuracy"):
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high"), ("_n", "n")):
                assert metrics[name + end] == row[name][key]
        assert (tags["verdict"], tags["advplug.kind"]) == (row["verdict"], "threat")
        assert tags["flags"] == "; ".join(f["name"] for f in row["flags"])
        assert params == {"dataset": TINY, "model": CNN, "defense": defense, "norm": "linf", "eps": "1/10",
                          "goal": "untargeted", "seed": "0", "attacks": "fgsm; pgd:steps=2"}  # fmt: skip
        cells = {c["attack"]: c["metrics"] for c in told["cells"] if c["defense"] == defense}
        assert metrics["fgsm/robust_accuracy"] == cells["fgsm"]["robust_accuracy"]["value"]
        assert metrics["pgd:steps_2/robust_accuracy_low"] == cells["pgd:steps=2"]["robust_accuracy"]["low"]
    difference = next(t for t in told["threats"] if t["defense"] == "bit-depth")["difference_to_baseline"]
    assert inner[0].data.metrics["difference_to_baseline"] == difference["value"]
    assert "difference_to_baseline" not in inner[1].data.metrics  # it does not apply, so it is no 0


def test_report_and_result_are_artifacts(tracked: tuple[Any, str, Path], tmp_path: Path) -> None:
    told, uri, folder = tracked
    outer, _ = kept(uri, "tiny")
    before = Path.cwd()
    os.chdir(folder)
    try:
        names = sorted(a.path for a in client(uri).list_artifacts(outer.info.run_id))
        got = {name: Path(client(uri).download_artifacts(outer.info.run_id, name, str(tmp_path))) for name in names}
    finally:
        os.chdir(before)
    assert names == ["report.html", "result.json"]
    assert json.loads(got["result.json"].read_text()) == told
    assert CNN in got["report.html"].read_text()


def test_it_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_tracker("mlflow", experiment="conformance", uri=f"sqlite:///{tmp_path / 'a.db'}")


def test_a_folder_is_a_store_where_mlflow_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advplug_mlflow.tracker import mlflow

    whole_run = results()["a run with everything"]
    file = tmp_path / "result.json"
    file.write_text("{}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    mlflow("folder", uri)(whole_run, {"result.json": file})
    outer, inner = kept(uri, "folder")
    assert outer.data.metrics["cells_failed"] == 2  # an attack on images and one on training data
    assert [r.data.tags["advplug.kind"] for r in inner] == ["poisoning", "certificate", "threat", "poisoning", "threat"]
    first = next(r for r in inner if r.data.params["defense"] != "none" and r.data.tags["advplug.kind"] == "threat")
    assert first.data.tags["failed.square"] == "out of memory\nafter 3 batches"
    assert first.data.tags["refused.fab-t"] == "it needs 4 classes"
    assert not [name for name in first.data.metrics if name.startswith(("square/", "fab-t/"))]
    proven = next(r for r in inner if r.data.tags["advplug.kind"] == "certificate")
    assert proven.data.metrics["certified_accuracy/1_4"] == 0.6
    poisoned = next(r for r in inner if r.data.params.get("attack") == "ba:count=7")
    assert (poisoned.data.metrics["attack_success_rate"], poisoned.data.tags["verdict"]) == (0.96, "upper bound")


def test_a_server_that_is_not_there_costs_seconds_and_no_result(tmp_path: Path) -> None:
    begun = time.monotonic()
    ran = run("eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, *QUICK, "-o", tmp_path / "out", "--json",
              "--track", "mlflow:uri=http://127.0.0.1:9")  # fmt: skip
    assert ran.code == 0
    assert ran.json["cells"][0]["status"] == "ok"
    line = ran.err.strip().splitlines()[-1]
    assert line.startswith("tracker 'mlflow:uri=http://127.0.0.1:9' failed: ")
    assert line.endswith(f"the results are kept in {tmp_path / 'out'}")
    assert time.monotonic() - begun < 60
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_an_address_that_mlflow_does_not_know_is_refused_before_the_run(tmp_path: Path) -> None:
    for uri, told in (
        ("nowhere://x", "MLflow cannot use nowhere://x"),
        ("http://me:secret@127.0.0.1:9", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ):
        ran = run(
            "eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, "-o", tmp_path / "out", "--track", f"mlflow:uri={uri}"
        )
        assert ran.code == 2
        assert told in ran.err
        assert "secret" not in ran.err
    assert not (tmp_path / "out").exists()


# --- what becomes what -------------------------------------------------------------------------------


def test_names_stay_apart_and_values_fit() -> None:
    long = "x" * 7000
    facts: dict[str, Any] = {"dataset": "d", "model": long, "defense": "none", "norm": "linf", "eps": "1/10",
                             "goal": "untargeted", "seed": 0}  # fmt: skip
    attacks = ("pgd:a=1", "pgd:a,1", "transfer:from=(file:../w.pt#arch=x),attack=(pgd)")
    cells = tuple(
        Cell(a, **facts, attack=a, status="ok", metrics={"robust_accuracy": rate(n, 10)}) for n, a in enumerate(attacks)
    )
    row = ThreatRow(**facts, attacks=attacks, clean_accuracy=None, worst_case_accuracy=None,
                    difference_to_baseline=None, verdict=None)  # fmt: skip
    result = RunResult(RunInfo({}, 0, "cpu", "c" * 9000), cells, (row,))
    (made,) = parts(result)
    found = {k: v for k, v in made.metrics.items() if k.endswith("/robust_accuracy")}
    assert found == {"pgd:a_1/robust_accuracy": 0.0, "pgd:a_1 2/robust_accuracy": 0.1,
                     "transfer:from__file:.._w.pt_arch_x__attack__pgd_/robust_accuracy": 0.2}  # fmt: skip
    assert len(made.params["model"]) == 6000
    assert len(whole(result).tags["advplug.command"]) == 5000


def test_listing_it_imports_no_mlflow() -> None:
    done = python("-c", "import sys; from advplug.registry import registry\n"
                  "assert registry().get('tracker', 'mlflow').params()[0].name == 'experiment'\n"
                  "assert not {'mlflow', 'torch'} & set(sys.modules)")  # fmt: skip
    assert done.returncode == 0, done.stderr
