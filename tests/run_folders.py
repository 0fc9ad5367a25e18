"""Folders of runs made by hand, for what reads them: cells with evidence, threats with verdicts, and the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advplug.builtin.metrics import share
from advplug.estimate import rate
from advplug.evidence import Evidence, worst_case
from advplug.poisons.evidence import PoisonEvidence, measured
from advplug.results import Cell, Certificate, CertifiedAccuracy, Flag, Poisoning, RunInfo, RunResult, ThreatRow
from advplug.store import Store

KEYS = map(str, itertools.count())
INFO = RunInfo({}, 0, "cpu", "advplug eval")


def evidence(broken: Sequence[int], n: int = 50, **more: Any) -> Evidence:
    """`n` images, all right without attack, of which those at `broken` are not under it."""
    index = np.arange(n)
    clean = np.ones((n, 1), dtype=bool)
    return Evidence(index, index % 10, clean, clean[:, 0], np.isin(index, broken)[:, None], **more)


def cell(seen: Evidence | None = None, **change: Any) -> Cell:
    facts: dict[str, Any] = {"dataset": "digits", "model": "cnn", "defense": "none", "attack": "pgd", "norm": "linf",
                             "eps": "1/10", "goal": "untargeted", "seed": 0, "status": "ok"}  # fmt: skip
    if seen is not None:
        facts["metrics"] = {
            "clean_accuracy": share(seen.clean),
            "robust_accuracy": share(worst_case(seen.robust_by_origin())),
            "adaptive_robust_accuracy": share(seen.robust(seen.adaptive)),
            "static_robust_accuracy": None if seen.static is None else share(seen.robust(seen.static)),
        }
    return Cell(next(KEYS), **(facts | change))


def threat(clean: float = 0.9, worst: float | None = 0.4, n: int = 50, **change: Any) -> ThreatRow:
    facts: dict[str, Any] = {"dataset": "digits", "model": "cnn", "defense": "none", "norm": "linf", "eps": "1/10",
                             "goal": "untargeted", "seed": 0, "attacks": ("pgd",), "verdict": "trusted",
                             "difference_to_baseline": None}  # fmt: skip
    robust = None if worst is None else rate(worst * n, n)
    return ThreatRow(clean_accuracy=rate(clean * n, n), worst_case_accuracy=robust, **(facts | change))


def poisoned(hits: int, n: int = 40) -> PoisonEvidence:
    """Of `n` images with the trigger, which asks for class 9, the first `hits` are taken for it."""
    index = np.arange(n)
    y = index % 9
    triggered = np.where(index < hits, 9, y)[:, None]
    none = np.zeros((0,), dtype=np.int64)
    return PoisonEvidence(index, y, np.full(n, 9), y[:, None], triggered, y, y, none, none, none, none[:, None], none,
                          1.0, 7, 100)  # fmt: skip


def poisoning(seen: PoisonEvidence | None = None, **change: Any) -> Poisoning:
    facts: dict[str, Any] = {"dataset": "digits", "model": "cnn", "defense": "none", "attack": "ba:count=7", "seed": 0,
                             "status": "ok", "poisons": 7, "training_images": 100}  # fmt: skip
    facts["metrics"] = {} if seen is None else measured(seen)
    return Poisoning(next(KEYS), **(facts | change))


def certificate(**change: Any) -> Certificate:
    at = tuple(CertifiedAccuracy(r, rate(k, 50), None) for r, k in (("1/4", 30), ("1/2", 10)))
    facts: dict[str, Any] = {"dataset": "digits", "model": "cnn", "defense": "smoothing", "norm": "l2", "seed": 0,
                             "status": "ok", "clean_accuracy": rate(45, 50), "abstention_rate": rate(2, 50),
                             "failure_probability": 0.001, "certified_accuracy": at}  # fmt: skip
    return Certificate(next(KEYS), **(facts | change))


def stored(
    folder: Path,
    *cells: tuple[Cell, Evidence | None],
    threats: Sequence[ThreatRow] = (),
    poisonings: Sequence[tuple[Poisoning, PoisonEvidence | None]] = (),
    certificates: Sequence[Certificate] = (),
) -> Path:
    """Writes them to `folder` as a run does."""
    with Store(folder) as kept:
        kept.put("sweep", cells)
        for made, seen in poisonings:
            kept.put_poisoning(made, seen.to_bytes() if seen else None)
        for proven in certificates:
            kept.put_certificate(proven, None)
        shown = RunResult(INFO, tuple(c for c, _ in cells), tuple(threats), tuple(certificates),
                          tuple(p for p, _ in poisonings))  # fmt: skip
        kept.put_shown(shown)
    return folder


UNTRUSTED = {"verdict": "not trustworthy", "flags": (Flag("zero-gradients", "error", "x"),)}
