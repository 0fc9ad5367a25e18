"""Two stored runs side by side: the difference of each threat over the images that both judged. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from advplug.builtin.metrics import share
from advplug.errors import GateError, UsageError
from advplug.estimate import Estimate, paired_difference
from advplug.evidence import Array, Evidence, worst_case
from advplug.keys import SCHEMA
from advplug.runs import observed, read
from advplug.store import THREAT

COLUMNS = THREAT
UNTRUSTED = "not trustworthy"
LIKE = ("dataset", "norm", "eps", "goal")
"""Columns in which two threats have to agree for a comparison to mean anything."""


@dataclass(frozen=True)
class Side:
    """One run's part of a comparison; verdict and flags are what the run itself said, None where it never finished."""

    dataset: str
    model: str
    defense: str
    norm: str
    eps: str
    goal: str
    seed: int
    attacks: tuple[str, ...]
    clean_accuracy: Estimate | None
    worst_case_accuracy: Estimate | None
    verdict: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """B less A in worst-case accuracy, and in clean accuracy, over `images` that both judged."""

    a: Side
    b: Side
    images: int
    worst_case_difference: Estimate
    clean_difference: Estimate
    conclusion: str


@dataclass(frozen=True)
class Compared:
    """All threats that the runs share; what only one of them holds is named."""

    a: str
    b: str
    rows: tuple[Comparison, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """What `advplug compare --json` prints."""
        data = asdict(self)
        return json.dumps({"schema": data.pop("schema"), **data}, indent=2, allow_nan=False)


@dataclass
class _Threat:
    """The finished cells of one (victim, threat) group on one set of images."""

    columns: dict[str, Any]
    attacks: list[str] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    verdict: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        c = self.columns
        return f"{c['model']} ({c['defense']}) on {c['dataset']}, {c['norm']} {c['eps']}, {c['goal']}, seed {c['seed']}"

    def like(self) -> tuple[Any, ...]:
        return tuple(self.columns[c] for c in LIKE)

    def robust(self, rows: Array) -> Array:
        return worst_case([bits for e in self.evidence for bits in e.rows(rows).robust_by_origin()])

    def side(self, rows: Array) -> Side:
        clean = share(self.evidence[0].rows(rows).clean)
        return Side(**self.columns, attacks=tuple(self.attacks), clean_accuracy=clean,
                    worst_case_accuracy=share(self.robust(rows)), verdict=self.verdict, flags=self.flags)  # fmt: skip


def compare(a: Path, b: Path) -> Compared:
    """The folders `a` and `b` of two runs, threat by threat; a folder is read, never written.

    Threats are matched by everything that names them; where each run has a single one left on the same data, norm,
    eps and goal, these two are compared, whatever model and defense they have. Raises UsageError where a folder
    holds no results, or the two share no threat.
    """
    ours, theirs = _threats(a), _threats(b)
    pairs = [(ours.pop(key), theirs.pop(key)) for key in list(ours) if key in theirs]
    for threat in list(ours.values()):
        mine = [k for k, t in ours.items() if t.like() == threat.like()]
        other = [k for k, t in theirs.items() if t.like() == threat.like()]
        if len(mine) == len(other) == 1:
            pairs.append((ours.pop(mine[0]), theirs.pop(other[0])))
    if not pairs:
        raise UsageError(f"{a} and {b} share no dataset, norm, eps and goal: there is nothing to compare")
    rows, notes = [], []
    for left, right in pairs:
        common = np.intersect1d(left.evidence[0].index, right.evidence[0].index)
        if not len(common):
            notes.append(f"{left.name}: the runs judged no image in common")
            continue
        rows.append(_compared(left, right, common))
        if left.attacks != right.attacks:
            met = f"{', '.join(left.attacks)} against {', '.join(right.attacks)}"
            notes.append(f"{left.name}: other attacks may explain the difference: {met}")
    only_a, only_b = (tuple(t.name for t in side.values()) for side in (ours, theirs))
    return Compared(str(a), str(b), tuple(rows), only_a, only_b, tuple(notes))


def _threats(folder: Path) -> dict[tuple[Any, ...], _Threat]:
    """By name; of several sets of images under one name the largest. Similarities are no accuracy and left out."""
    found: dict[tuple[Any, ...], dict[bytes, _Threat]] = {}
    said = _verdicts(folder)
    for cell, evidence in observed(folder):
        if evidence.minimised:
            continue
        columns = {c: getattr(cell, c) for c in COLUMNS}
        sets = found.setdefault(tuple(columns.values()), {})
        verdict, flags = said.get(tuple(columns.values()), (None, ()))
        threat = sets.setdefault(evidence.index.tobytes(), _Threat(columns, verdict=verdict, flags=flags))
        threat.attacks.append(cell.attack)
        threat.evidence.append(evidence)
    if not found:
        raise UsageError(f"{folder} holds no finished cell; advplug eval -o {folder} makes some")
    return {key: max(sets.values(), key=lambda t: t.evidence[0].n) for key, sets in found.items()}


def _verdicts(folder: Path) -> dict[tuple[Any, ...], tuple[str | None, tuple[str, ...]]]:
    """Verdict and names of the flags above level info of each threat that a finished run told of."""
    return {
        tuple(getattr(row, c) for c in COLUMNS): (row.verdict, tuple(f.name for f in row.flags if f.level != "info"))
        for row in read(folder).threats
    }


def _compared(left: _Threat, right: _Threat, common: Array) -> Comparison:
    # Row by row the same image on both sides.
    rows = [np.intersect1d(t.evidence[0].index, common, return_indices=True)[1] for t in (left, right)]
    robust, clean = (
        paired_difference(*(np.asarray(bits.mean(axis=1)) for bits in pair))
        for pair in (
            (right.robust(rows[1]), left.robust(rows[0])),
            (right.evidence[0].rows(rows[1]).clean, left.evidence[0].rows(rows[0]).clean),
        )
    )
    assert robust is not None
    assert clean is not None
    a, b = left.side(rows[0]), right.side(rows[1])
    return Comparison(a, b, len(common), robust, clean, conclusion(robust, a.verdict, b.verdict))


def conclusion(difference: Estimate, a: str | None = None, b: str | None = None) -> str:
    """What an interval of B less A allows to say, and the verdicts on both."""
    doubted = " and ".join(name for name, said in (("A", a), ("B", b)) if said == UNTRUSTED)
    if doubted:
        return f"{doubted} not trustworthy"
    if difference.low is not None and difference.low > 0:
        return "B is more robust"
    if difference.high is not None and difference.high < 0:
        return "B is less robust"
    return "no difference shown"


def gate(compared: Compared, points: float) -> None:
    """Raises GateError where B's worst-case accuracy lies more than `points` below A's, or should not be believed."""
    for row in compared.rows:
        if row.b.verdict == UNTRUSTED:
            what = f"{row.b.model} ({row.b.defense}), {row.b.norm} {row.b.eps}"
            raise GateError(f"{what}: its accuracy is not trustworthy: {', '.join(row.b.flags)}")
    below = [r for r in compared.rows if 100 * r.worst_case_difference.value < -points - 1e-9]
    if below:
        worst = min(below, key=lambda r: r.worst_case_difference.value)
        lost = -100 * worst.worst_case_difference.value
        what = f"{worst.b.model} ({worst.b.defense}), {worst.b.norm} {worst.b.eps}"
        raise GateError(f"{what}: worst-case accuracy is {lost:.1f} points lower than before, {points:g} are allowed")


def render(compared: Compared) -> str:
    """The comparison as text."""
    from advplug.table import grid, percent, points

    def named(row: Comparison) -> list[str]:
        same = (row.a.model, row.a.defense) == (row.b.model, row.b.defense)
        victims = [f"{s.model} ({s.defense})" for s in (row.a, row.b)]
        seeds = f"{row.a.seed}" if row.a.seed == row.b.seed else f"{row.a.seed}, {row.b.seed}"
        return [row.a.dataset, victims[0] if same else " | ".join(victims), row.a.norm, row.a.eps, row.a.goal, seeds]

    header = ["dataset", "model (defense)", "norm", "eps", "goal", "seed", "images", "A %", "B %", "B - A [95 %]",
              "clean B - A [95 %]", "verdicts", "conclusion"]  # fmt: skip
    lines = [
        [*named(r), str(r.images), percent(r.a.worst_case_accuracy), percent(r.b.worst_case_accuracy),
         points(r.worst_case_difference), points(r.clean_difference),
         " | ".join(dict.fromkeys(s.verdict or "unknown" for s in (r.a, r.b))), r.conclusion]
        for r in compared.rows
    ]  # fmt: skip
    remarks = [f"note: {n}" for n in compared.notes]
    remarks += [f"only in A: {n}" for n in compared.only_a] + [f"only in B: {n}" for n in compared.only_b]
    table = grid(f"Worst-case accuracy: A {compared.a}, B {compared.b}", header, lines) if lines else ""
    return "\n\n".join(part for part in (table, "\n".join(remarks)) if part)
