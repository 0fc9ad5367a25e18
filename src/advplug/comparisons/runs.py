"""Two stored runs side by side: the difference of each threat over the images that both judged. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from advplug.builtin.metrics import share
from advplug.comparisons.poisons import PoisonComparison, compare_poisonings
from advplug.errors import UsageError
from advplug.estimate import Estimate, mean, paired_difference
from advplug.evidence import Array, Evidence, worst_case
from advplug.keys import SCHEMA
from advplug.results import RunResult, ThreatRow
from advplug.store import THREAT
from advplug.stored.runs import apart, observed, read, victim_of
from advplug.studies.shown_names import called, in_row, renamed_row, shared

COLUMNS = THREAT
UNTRUSTED = "not trustworthy"
LIKE = ("dataset", "norm", "eps", "goal", "shape")
"""Columns in which two threats have to agree for a comparison to mean anything."""


@dataclass(frozen=True)
class Side:
    """One run's part of a comparison; verdict and flags are what the run itself said, None where it never finished.

    Where similarities of images and texts are lowered, these stand in the place of accuracies.
    """

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
    clean_similarity: Estimate | None = None
    worst_case_similarity: Estimate | None = None
    shape: str = ""


@dataclass(frozen=True)
class Comparison:
    """B less A in the worst case, and without attack, over `images` that both judged; `quantity` says of what."""

    a: Side
    b: Side
    images: int
    worst_case_difference: Estimate
    clean_difference: Estimate
    conclusion: str
    quantity: Literal["accuracy", "similarity"] = "accuracy"


@dataclass(frozen=True)
class Compared:
    """All threats and attacks on training data that the runs share; what only one of them holds is named, and what
    failed in B."""

    a: str
    b: str
    rows: tuple[Comparison, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    poisonings: tuple[PoisonComparison, ...] = ()
    failed_b: tuple[str, ...] = ()
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
    victim: str = ""
    data: str | None = None

    @property
    def name(self) -> str:
        c = self.columns
        budget = f"{c['norm']} {c['eps']}" + (f", {c['shape']}" if c["shape"] else "")
        return f"{c['model']} ({c['defense']}) on {c['dataset']}, {budget}, {c['goal']}, seed {c['seed']}"

    def call(self, names: Mapping[str, str]) -> None:
        """Puts names in the place of references."""
        self.columns = in_row(self.columns, names)
        self.attacks = [called(label, names) for label in self.attacks]

    def like(self) -> tuple[Any, ...]:
        return tuple(self.columns[c] for c in LIKE)

    @property
    def minimised(self) -> bool:
        return bool(self.evidence[0].minimised)

    def robust(self, rows: Array) -> Array:
        """(n, d) bits of the worst case."""
        return worst_case([bits for e in self.evidence for bits in e.rows(rows).robust_by_origin()])

    def lowest(self, rows: Array) -> Array:
        """(n,): the lowest similarity of each image."""
        return np.asarray(np.min([s[rows] for e in self.evidence for s in e.similarity_by_origin()], axis=0))

    def similarity(self, rows: Array) -> Array:
        """(n,): without attack."""
        found = self.evidence[0].similarity(self.evidence[0].cosine)
        assert found is not None
        return np.asarray(found[rows])

    def side(self, rows: Array) -> Side:
        clean = share(self.evidence[0].rows(rows).clean)
        columns: dict[str, Any] = {**self.columns, "attacks": tuple(dict.fromkeys(self.attacks)),
                                   "clean_accuracy": clean,
                                   "verdict": self.verdict, "flags": self.flags}  # fmt: skip
        if not self.minimised:
            return Side(worst_case_accuracy=share(self.robust(rows)), **columns)
        columns |= {"clean_similarity": mean(self.similarity(rows)), "worst_case_similarity": mean(self.lowest(rows))}
        return Side(worst_case_accuracy=None, **columns)


def compare(a: Path, b: Path, named: bool = False) -> Compared:
    """The folders `a` and `b` of two runs, threat by threat; a folder is read, never written.

    `named` puts the names of the runs' matrix files in the place of references, for people.

    Threats are matched by everything that names them; where each run has a single one left on the same data, norm,
    eps and goal, these two are compared, whatever model and defense they have. Attacks on training data likewise, by
    data and attack. Raises UsageError where a folder holds no results, or the two share nothing.
    """
    results = read(a), read(b)
    ours, theirs = (_threats(folder, result) for folder, result in zip((a, b), results, strict=True))
    names = shared(*(result.run.names for result in results)) if named else {}
    poisons = compare_poisonings(a, b, names)
    for folder, found, held in ((a, ours, poisons.a), (b, theirs, poisons.b)):
        if not found and not held:
            raise UsageError(f"{folder} holds no finished cell; advplug eval -o {folder} makes some")
    of_a, of_b = ({(*t.like(), t.minimised) for t in side.values()} for side in (ours, theirs))
    pairs = _paired(ours, theirs)
    if not pairs and not poisons.pairs:
        several = "share no model and defense, and hold several on the same data; compare runs that hold one each"
        none = "share no dataset, norm, eps and goal: there is nothing to compare"
        raise UsageError(f"{a} and {b} {several if of_a & of_b else none}")
    for threat in (*(t for pair in pairs for t in pair), *ours.values(), *theirs.values()):
        threat.call(names)
    rows, notes = [], list(poisons.notes)
    for left, right in pairs:
        common = np.intersect1d(left.evidence[0].index, right.evidence[0].index)
        if not len(common):
            notes.append(f"{left.name}: the runs judged no image in common")
            continue
        trouble = _other_data(left, right, common)
        if trouble is not None:
            notes.append(f"{left.name}: {trouble}")
            continue
        if None not in (left.data, right.data) and left.data != right.data:
            notes.append(f"{left.name}: the data changed between the runs; this holds if their images are the same")
        rows.append(_compared(left, right, common))
        if set(left.attacks) != set(right.attacks):
            met = " against ".join(", ".join(dict.fromkeys(t.attacks)) for t in (left, right))
            notes.append(f"{left.name}: other attacks may explain the difference: {met}")
    only_a, only_b = (tuple(t.name for t in side.values()) for side in (ours, theirs))
    failed = tuple(f"{_failed(renamed_row(made, names))}: {made.reason}" for made in results[1].failed)
    return Compared(str(a), str(b), tuple(rows), (*only_a, *poisons.only_a), (*only_b, *poisons.only_b), tuple(notes),
                    poisons.rows, failed)  # fmt: skip


def _other_data(left: _Threat, right: _Threat, common: Array) -> str | None:
    """Why images of one position are not the same image."""
    if any(t.evidence[0].right is not None for t in (left, right)):
        return None  # The classes of a gallery are numbered anew for each set of images.
    labels = [t.evidence[0].y[_at(t, common)] for t in (left, right)]
    changed = int((labels[0] != labels[1]).sum())
    if not changed:
        return None
    return f"the runs judged other data under this name: {changed} of {len(common)} labels differ"


def _at(threat: _Threat, common: Array) -> Array:
    """The rows of images, in their order."""
    return np.asarray(np.intersect1d(threat.evidence[0].index, common, return_indices=True)[1])


def _failed(made: Any) -> str:
    """What a failed cell, certificate or poisoning was of."""
    attack = getattr(made, "attack", "certificate")
    threat = " ".join(filter(None, (getattr(made, "norm", ""), getattr(made, "eps", ""))))
    return f"{attack} on {made.model} ({made.defense}) on {made.dataset}" + (f", {threat}" if threat else "")


def _paired(
    ours: dict[tuple[Any, ...], _Threat], theirs: dict[tuple[Any, ...], _Threat]
) -> list[tuple[_Threat, _Threat]]:
    """Takes what goes together out of both, in the order of ours."""
    order = {id(threat): place for place, threat in enumerate(ours.values())}
    pairs = [(ours.pop(key), theirs.pop(key)) for key in list(ours) if key in theirs]
    for threat in list(ours.values()):
        mine = [k for k, t in ours.items() if t.like() == threat.like()]
        other = [k for k, t in theirs.items() if t.like() == threat.like()]
        if len(mine) == len(other) == 1:
            pairs.append((ours.pop(mine[0]), theirs.pop(other[0])))
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return [(left, right) for left, right in pairs if left.minimised == right.minimised]


def _threats(folder: Path, result: RunResult) -> dict[tuple[Any, ...], _Threat]:
    """By name; where several victims had that name in turn, the one that the last run told of, else the one written
    last, and of several sets of its images the largest."""
    found: dict[tuple[Any, ...], dict[tuple[str, bytes], _Threat]] = {}
    for cell, evidence in observed(folder):
        columns = {c: getattr(cell, c) for c in COLUMNS}
        sets = found.setdefault(tuple(columns.values()), {})
        victim = victim_of(cell)
        data = cell.provenance.get("dataset", {}).get("fingerprint")
        threat = sets.setdefault((victim, evidence.index.tobytes()), _Threat(columns, victim=victim, data=data))
        threat.attacks.append(cell.attack)
        threat.evidence.append(evidence)
    told = {tuple(getattr(row, c) for c in COLUMNS): row for row in result.threats}
    return {key: _chosen(list(sets.values()), told.get(key)) for key, sets in found.items()}


def _chosen(sets: list[_Threat], told: ThreatRow | None) -> _Threat:
    """The set that stands for a threat, with the verdict and the flags above level info if these are of its images."""
    clean = None if told is None else told.clean_accuracy
    meant = [t for t in sets if clean is None or t.evidence[0].n == clean.n][::-1] if told is not None else []
    # Of those told of, the one that answers as that did without attack.
    nearest = min(meant, key=lambda t: apart(t.evidence[0], told)) if told is not None and meant else sets[-1]
    victim = nearest.victim
    largest = max((t for t in sets if t.victim == victim), key=lambda t: t.evidence[0].n)
    if told is not None and any(t is largest for t in meant):
        largest.verdict, largest.flags = told.verdict, tuple(f.name for f in told.flags if f.level != "info")
    return largest


def _compared(left: _Threat, right: _Threat, common: Array) -> Comparison:
    # Row by row the same image on both sides.
    rows = [_at(t, common) for t in (left, right)]
    a, b = left.side(rows[0]), right.side(rows[1])
    if left.minimised:
        worst = mean(right.lowest(rows[1]) - left.lowest(rows[0]))
        clean = mean(right.similarity(rows[1]) - left.similarity(rows[0]))
    else:
        worst, clean = (
            paired_difference(*(np.asarray(bits.mean(axis=1)) for bits in pair))
            for pair in (
                (right.robust(rows[1]), left.robust(rows[0])),
                (right.evidence[0].rows(rows[1]).clean, left.evidence[0].rows(rows[0]).clean),
            )
        )
    assert worst is not None
    assert clean is not None
    said = conclusion(worst, a.verdict, b.verdict)
    return Comparison(a, b, len(common), worst, clean, said, "similarity" if left.minimised else "accuracy")


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


def render(compared: Compared) -> str:
    """The comparison as text."""
    from advplug.comparisons.poisons import render_poisonings
    from advplug.tables.text import cosine, percent, points

    tables = [
        _table(compared, "accuracy", percent, points, "worst_case_accuracy"),
        _table(compared, "similarity", cosine, _cosines, "worst_case_similarity"),
        render_poisonings(compared.poisonings, compared.a, compared.b),
    ]
    remarks = [f"note: {n}" for n in compared.notes]
    remarks += [f"only in A: {n}" for n in compared.only_a] + [f"only in B: {n}" for n in compared.only_b]
    remarks += [f"failed in B: {n}" for n in compared.failed_b]
    return "\n\n".join(part for part in (*tables, "\n".join(remarks)) if part)


def _table(
    compared: Compared,
    quantity: str,
    shown: Callable[[Estimate | None], str],
    difference: Callable[[Estimate], str],
    name: str,
) -> str:
    """The rows of one quantity."""
    from advplug.tables.text import titled

    unit = " %" if quantity == "accuracy" else ""
    columns: dict[str, Callable[[Comparison], str]] = {
        "dataset": lambda r: r.a.dataset,
        "model (defense)": _victims,
        "norm": lambda r: f"{r.a.norm}, {r.a.shape}" if r.a.shape else r.a.norm,
        "eps": lambda r: r.a.eps,
        "goal": lambda r: r.a.goal,
        "seed": lambda r: ", ".join(dict.fromkeys(str(s.seed) for s in (r.a, r.b))),
        "images": lambda r: str(r.images),
        f"A{unit}": lambda r: shown(getattr(r.a, name)),
        f"B{unit}": lambda r: shown(getattr(r.b, name)),
        "B - A [95 %]": lambda r: difference(r.worst_case_difference),
        "clean B - A [95 %]": lambda r: difference(r.clean_difference),
        "verdicts": lambda r: " | ".join(dict.fromkeys(s.verdict or "unknown" for s in (r.a, r.b))),
        "conclusion": lambda r: r.conclusion,
    }
    rows = [r for r in compared.rows if r.quantity == quantity]
    title = f"Worst-case {quantity}: A {compared.a}, B {compared.b}"
    return titled(title, columns, rows, constant=("dataset", "norm", "eps", "goal", "seed", "images"))


def _victims(row: Comparison) -> str:
    return " | ".join(dict.fromkeys(f"{s.model} ({s.defense})" for s in (row.a, row.b)))


def _cosines(e: Estimate) -> str:
    text = f"{e.value:+.3f}"
    return text if e.low is None or e.high is None else f"{text} [{e.low:+.3f}, {e.high:+.3f}]"
