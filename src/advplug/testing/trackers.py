"""Conformance of trackers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advplug.estimate import Estimate, rate
from advplug.registry import registry
from advplug.results import Cell, Certificate, CertifiedAccuracy, Flag, Poisoning, RunInfo, RunResult, ThreatRow
from advplug.testing.report import Report, Result, require
from advplug.testing.sources import bound

_VICTIM: dict[str, Any] = {"dataset": "digits", "model": "cnn", "defense": "jpeg:quality=50", "seed": 0}
_THREAT: dict[str, Any] = {**_VICTIM, "norm": "linf", "eps": "8/255", "goal": "untargeted"}


def tracker_results(name: str, params: Mapping[str, Any]) -> list[Result]:
    """One result a kind of run. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("tracker", name)
    checked = bound(entry, params)
    report = Report()
    made: list[Any] = []
    if report.check("factory", lambda: made.append(entry.make(checked))):
        for kind, result in results().items():
            report.check(kind, lambda r=result: _tracked(made[0], r))  # type: ignore[misc]
    return report.results


def results() -> dict[str, RunResult]:
    """Runs as they end: with everything there is, kept in a folder and not, with failures only, and empty."""
    whole = _whole()
    failed = tuple(c for c in whole.cells if c.status != "ok")
    info = RunInfo(whole.run.versions, 0, "cpu", "advplug.evaluate", None, (0,), 10, 0.5)
    return {
        "a run with everything": whole,
        "the same again": whole,
        "a run that was kept in no folder": RunResult(info, whole.cells, whole.threats),
        "a run in which nothing succeeded": RunResult(whole.run, failed, ()),
        "an empty run": RunResult(info, (), ()),
    }


def _whole() -> RunResult:
    info = RunInfo({"advplug": "0.1.0", "torch": "2.13.0"}, 0, "cpu", "advplug eval -m cnn", "advplug-results", (0, 1),
                   12_345, 61.5)  # fmt: skip
    attack = "transfer:from=(resnet18+advtrain:eps=8/255),attack=(pgd:steps=40)"
    figures = {"clean_accuracy": rate(45, 50), "robust_accuracy": rate(20, 50), "static_robust_accuracy": None,
               "l2_median": Estimate(0.25, None, None, 50)}  # fmt: skip
    cells = (
        Cell("1", **_THREAT, attack=attack, status="ok", metrics=figures),
        Cell("2", **_THREAT, attack="square", status="failed", reason="out of memory\nafter 3 batches"),
        Cell("3", **_THREAT, attack="fab-t", status="refused", reason="it needs 4 classes"),
    )
    flags = (Flag("near-chance", "error", "a detail"),)
    threats = (
        ThreatRow(**_THREAT, attacks=(attack,), clean_accuracy=rate(45, 50), worst_case_accuracy=rate(20, 50),
                  difference_to_baseline=Estimate(-0.1, -0.2, 0.0, 50), verdict="not trustworthy", flags=flags),
        ThreatRow(**{**_THREAT, "defense": "none", "goal": "minimise"}, attacks=(), clean_accuracy=None,
                  worst_case_accuracy=None, difference_to_baseline=None, verdict=None, recovery=0.5,
                  worst_case_similarity=Estimate(0.2, 0.1, 0.3, 50)),
    )  # fmt: skip
    proven = Certificate("4", **_VICTIM, norm="l2", status="ok", clean_accuracy=rate(45, 50), average_radius=0.3,
                         certified_accuracy=(CertifiedAccuracy("1/4", rate(30, 50), None),))  # fmt: skip
    poisoned = (
        Poisoning("5", **_VICTIM, attack="ba:count=7", status="ok", verdict="upper bound", poisons=7,
                  metrics={"attack_success_rate": rate(48, 50), "poison_success_rate": None}),
        Poisoning("6", **_VICTIM, attack="tdpa", status="failed", reason="no captions"),
    )  # fmt: skip
    return RunResult(info, cells, threats, (proven,), poisoned)


def _tracked(tracker: Any, result: RunResult) -> None:
    with tempfile.TemporaryDirectory(prefix="advplug-") as folder:
        files = {"result.json": Path(folder) / "result.json"}
        files["result.json"].write_text("{}")
        before = repr(result), Path.cwd(), dict(os.environ)
        where = tracker(result, files)
        require(where is None or isinstance(where, str), f"it must return a line or None, not {type(where).__name__}")
        require(where is None or len(where.splitlines()) <= 1, "what it returns is more than one line")
        require(repr(result) == before[0], "it changed the result")
        require(files["result.json"].is_file() and files["result.json"].read_text() == "{}", "it changed a file")
        require((Path.cwd(), dict(os.environ)) == before[1:], "it changed the working folder or the environment")
