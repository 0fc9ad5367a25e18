"""Gates of `advplug compare` for continuous integration: what a run must not fall below, or fall behind. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from advplug.comparisons.poisons import SUCCESS, PoisonComparison, PoisonSide
from advplug.comparisons.runs import UNTRUSTED, Compared, Comparison, Side
from advplug.errors import GateError, UsageError, did_you_mean
from advplug.estimate import Estimate

ROBUST = "robust_accuracy"
"""Another name of the worst case over the attacks of a threat."""
FLOORS = (ROBUST, "worst_case_accuracy", "clean_accuracy", "worst_case_similarity", "clean_similarity",
          "triggered_accuracy")  # fmt: skip
"""Figures of which more is better."""
Row = Comparison | PoisonComparison


@dataclass(frozen=True)
class Gate:
    """`floors`: least shares by name. `regression`: B may not be shown worse than A, by over `tolerance` points."""

    floors: Mapping[str, float] = field(default_factory=dict)
    regression: bool = False
    tolerance: float = 0.0


def gate_of(floors: Sequence[str], regression: bool, tolerance: float | None) -> Gate:
    """The gate as the command line says it. Raises UsageError."""
    if tolerance is not None and not regression:
        raise UsageError("--tolerance goes with --fail-on-regression")
    return Gate(dict(map(_floor, floors)), regression, tolerance or 0.0)


def _floor(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in FLOORS:
        raise UsageError(
            f"--fail-under takes NAME=SHARE, not '{text}'{did_you_mean(name, FLOORS)}; names: {', '.join(FLOORS)}"
        )
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not 0 <= least <= 1:
        raise UsageError(f"--fail-under {name} takes a share from 0 to 1, like {name}=0.4, not '{value}'")
    return name, least


def gate(compared: Compared, rules: Gate) -> None:
    """Raises GateError where B does not pass: something failed, is not trustworthy, too low, or shown worse than A.

    Raises UsageError where a floor is of something that was not measured.
    """
    if not rules.floors and not rules.regression:
        return
    rows: tuple[Row, ...] = (*compared.rows, *compared.poisonings)
    if not rows:
        raise GateError("the runs judged no image in common, or other data, so nothing was compared")
    if compared.failed_b:
        raise GateError(f"{compared.failed_b[0]} (of {len(compared.failed_b)} that failed in B)")
    for row in rows:
        if row.b.verdict == UNTRUSTED:
            raise GateError(f"{_what(row)}: its figure is not trustworthy: {', '.join(row.b.flags)}")
    for name, least in rules.floors.items():
        _demand(rows, name, least)
    if rules.regression:
        _demand_no_loss(rows, rules.tolerance)


def _demand(rows: Iterable[Row], name: str, least: float) -> None:
    found = [(_figure(row.b, name), row) for row in rows]
    known = [(e, row) for e, row in found if e is not None]
    if not known:
        raise UsageError(f"nothing that was compared has a {name}; leave that --fail-under out")
    lowest, row = min(known, key=lambda item: item[0].value)
    if lowest.value < least - 1e-9:
        raise GateError(f"{_what(row)}: {name} is {lowest.value:.3f}, at least {least:g} is asked for")


def _figure(side: Side | PoisonSide, name: str) -> Estimate | None:
    if isinstance(side, PoisonSide):
        return side.metrics.get(name)
    found: Estimate | None = getattr(side, "worst_case_accuracy" if name == ROBUST else name, None)
    return found


def _demand_no_loss(rows: Iterable[Row], tolerance: float) -> None:
    lost = [(points, what, row) for row in rows for points, what in _losses(row) if points[0] > tolerance + 1e-9]
    if lost:
        (least, value), what, row = max(lost, key=lambda item: item[0][1])
        allowed = f", {tolerance:g} are allowed" if tolerance else ""
        raise GateError(f"{_what(row)}: {what} by {value:.1f} points (95 % interval: {least:.1f} or more){allowed}")


def _losses(row: Row) -> Iterator[tuple[tuple[float, float], str]]:
    """((least, points), what): what the whole interval says is lost, and what was seen to be; a point is 0.01."""
    if isinstance(row, PoisonComparison):
        for name in SUCCESS:
            e = row.differences.get(name)
            if e is not None and e.low is not None:
                yield (100 * e.low, 100 * e.value), f"{name} rose"
    else:
        e = row.worst_case_difference
        if e.high is not None:
            yield (-100 * e.high, -100 * e.value), f"worst-case {row.quantity} fell"


def _what(row: Row) -> str:
    b = row.b
    what = b.attack if isinstance(b, PoisonSide) else f"{b.norm} {b.eps}"
    return f"{b.model} ({b.defense}) on {b.dataset}, {what}"
