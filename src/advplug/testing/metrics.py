"""Conformance of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from advplug.contracts import MetricCaps
from advplug.estimate import Estimate
from advplug.evidence import Evidence
from advplug.registry import registry
from advplug.testing.report import Report, Result, require
from advplug.testing.sources import bound


def metric_results(name: str, params: Mapping[str, Any]) -> list[Result]:
    """One result a kind of evidence. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("metric", name)
    checked = bound(entry, params)
    caps: MetricCaps = entry.spec.caps  # type: ignore[assignment]
    report = Report()
    made: list[Any] = []
    if report.check("factory", lambda: made.append(entry.make(checked))):
        for kind, evidence in evidences().items():
            report.check(kind, lambda e=evidence: _values(made[0], e, caps))  # type: ignore[misc]
    return report.results


def evidences() -> dict[str, Evidence]:
    """Evidence as cells bring it: full and bare, deterministic and randomised, with nothing to count."""
    draws = np.random.default_rng(0)

    def bits(*shape: int) -> np.ndarray[Any, Any]:
        return draws.random(shape) < 0.5

    def evidence(n: int, d: int, full: bool, attacked: np.ndarray[Any, Any] | None = None) -> Evidence:
        more: dict[str, Any] = {k: bits(n, d) for k in ("static", "bare", "rounded")} | {
            k: draws.random(n) for k in ("linf", "l2")
        }
        more |= {k: draws.integers(0, 9, n) for k in ("steps", "zero_gradient", "nonfinite")}
        more |= {k: bits(n) for k in ("any_iterate", "final_iterate")}
        clean = bits(n, d)
        where = clean[:, 0] if attacked is None else attacked
        return Evidence(np.arange(n), draws.integers(0, 3, n), clean, where, bits(n, d), **(more if full else {}))

    return {
        "a deterministic victim": evidence(40, 1, full=True),
        "a randomised victim": evidence(40, 10, full=True),
        "an attack that tells nothing of itself": evidence(40, 1, full=False),
        "one image": evidence(1, 1, full=True),
        "nothing to attack": evidence(20, 1, full=True, attacked=np.zeros(20, dtype=bool)),
    }


def _values(metric: Any, evidence: Evidence, caps: MetricCaps) -> None:
    before = evidence.to_bytes()
    values = metric(evidence)
    require(isinstance(values, Mapping), f"it must return named values, it returned {type(values).__name__}")
    require(set(values) == set(caps.values), f"it returned {sorted(values)}, its caps say {sorted(caps.values)}")
    require(evidence.to_bytes() == before, "it changed the evidence")
    for name, value in values.items():
        require(value is None or isinstance(value, Estimate), f"{name} must be an Estimate or None")
        require(value is None or math.isfinite(value.value), f"{name} is {value and value.value}; None means unknown")
        require(value is None or 0 <= value.n <= evidence.n, f"{name} counts more images than there are")
    order = np.random.default_rng(1).permutation(evidence.n)
    for name, value in metric(evidence.rows(order)).items():
        first = values[name]
        same = first is None if value is None else first is not None and math.isclose(first.value, value.value)
        require(same, f"{name} changes with the order of the images")
