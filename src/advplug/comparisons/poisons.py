"""What attacks on training data do in two stored runs: success and clean accuracy, paired image by image. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from advplug.estimate import Estimate
from advplug.poisons.evidence import PoisonEvidence, differences, measured
from advplug.results import Poisoning, poisoning_from_json
from advplug.store import evidences, latest, reading
from advplug.stored.runs import read, victim_of
from advplug.studies.shown_names import renamed_row

SUCCESS = ("attack_success_rate", "poison_success_rate")
"""What the attacker wants; higher is worse."""
UNTRUSTED = "not trustworthy"


@dataclass(frozen=True)
class PoisonSide:
    """One run's part; verdict and flags are what the run itself said, None where it never finished."""

    dataset: str
    model: str
    defense: str
    attack: str
    seed: int
    metrics: dict[str, Estimate | None]
    verdict: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model} ({self.defense}) on {self.dataset}, {self.attack}, seed {self.seed}"


@dataclass(frozen=True)
class PoisonComparison:
    """B less A in clean accuracy and in the attacks' success, where both judged the same images."""

    a: PoisonSide
    b: PoisonSide
    differences: dict[str, Estimate | None]
    conclusion: str


@dataclass(frozen=True)
class PoisonComparisons:
    """What the runs share, what they do not, and how many of either there are."""

    rows: tuple[PoisonComparison, ...]
    pairs: int
    a: int
    b: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]


Found = dict[tuple[object, ...], tuple[PoisonSide, PoisonEvidence]]


def compare_poisonings(a: Path, b: Path, names: Mapping[str, str] | None = None) -> PoisonComparisons:
    """Those of the same name; where each run has a single one left of an attack on the same data, these two.

    `names` are shown in the place of references.
    """
    ours, theirs = _found(a), _found(b)
    counts = len(ours), len(theirs)
    pairs = [(ours.pop(key), theirs.pop(key)) for key in list(ours) if key in theirs]
    for side, _ in list(ours.values()):
        mine, other = ([k for k, (s, _) in found.items() if _like(s) == _like(side)] for found in (ours, theirs))
        if len(mine) == len(other) == 1:
            pairs.append((ours.pop(mine[0]), theirs.pop(other[0])))
    rows, notes = [], []
    told = names or {}
    for (left, before), (right, after) in pairs:
        left, right = renamed_row(left, told), renamed_row(right, told)
        paired: dict[str, Estimate | None] = differences(after, before)
        if any(paired.values()):
            rows.append(PoisonComparison(left, right, paired, conclusion(left, right, paired)))
        else:
            notes.append(f"{left.name}: the runs judged other images")
    only_a, only_b = (tuple(renamed_row(s, told).name for s, _ in found.values()) for found in (ours, theirs))
    return PoisonComparisons(tuple(rows), len(pairs), *counts, only_a, only_b, tuple(notes))


def _like(side: PoisonSide) -> tuple[str, str]:
    return side.dataset, side.attack


def _found(folder: Path) -> Found:
    """By name; where several victims had that name in turn the one told of last, and of several sets of its images the
    largest."""
    said: dict[str, Poisoning] = {p.key: p for p in read(folder).poisonings}
    found: Found = {}
    victims: dict[tuple[object, ...], str] = {}
    for made, evidence in _observed(folder):
        told = said.get(made.key, made)
        flags = tuple(f.name for f in told.flags if f.level != "info")
        side = PoisonSide(made.dataset, made.model, made.defense, made.attack, made.seed, measured(evidence),
                          told.verdict, flags)  # fmt: skip
        name = (side.dataset, side.model, side.defense, side.attack, side.seed)
        victim, other = victim_of(made), victims.get(name)
        if victim != other or len(found[name][1].index) <= len(evidence.index):
            found[name], victims[name] = (side, evidence), victim
    return found


def _observed(folder: Path) -> list[tuple[Poisoning, PoisonEvidence]]:
    """The finished ones with their evidence, those last that were told of last."""
    with reading(folder) as db:
        seen = evidences(db, "poisoning")
        rows = [poisoning_from_json(made) for _, made in latest(db, "poisoning") if made["key"] in seen]
    return [(made, PoisonEvidence.from_bytes(seen[made.key])) for made in rows]


def conclusion(a: PoisonSide, b: PoisonSide, found: dict[str, Estimate | None]) -> str:
    """What the intervals of B less A allow to say of the attack's success, and the verdicts on both."""
    doubted = " and ".join(name for name, side in (("A", a), ("B", b)) if side.verdict == UNTRUSTED)
    if doubted:
        return f"{doubted} not trustworthy"
    wins = [e for e in (found.get(name) for name in SUCCESS) if e is not None]
    if any(e.low is not None and e.low > 0 for e in wins):
        return "B is less robust"
    if any(e.high is not None and e.high < 0 for e in wins):
        return "B is more robust"
    return "no difference shown"


def render_poisonings(rows: tuple[PoisonComparison, ...], a: str, b: str) -> str:
    """The comparison as a table, a line for each success; empty where there is none."""
    from advplug.tables.text import grid, percent, points

    if not rows:
        return ""
    titles = {"attack_success_rate": "triggered images", "poison_success_rate": "targets"}
    header = ["dataset", "model (defense)", "attack", "seed", "as wanted of", "A %", "B %", "B - A [95 %]",
              "clean B - A [95 %]", "verdicts", "conclusion"]  # fmt: skip
    lines = []
    for r in rows:
        victims = dict.fromkeys(f"{s.model} ({s.defense})" for s in (r.a, r.b))
        seeds = dict.fromkeys(str(s.seed) for s in (r.a, r.b))
        verdicts = " | ".join(dict.fromkeys(s.verdict or "unknown" for s in (r.a, r.b)))
        for name in (n for n in SUCCESS if r.differences.get(n)):
            lines.append(
                [r.a.dataset, " | ".join(victims), r.a.attack, ", ".join(seeds), titles[name],
                 percent(r.a.metrics.get(name)), percent(r.b.metrics.get(name)), points(r.differences[name]),
                 points(r.differences.get("clean_accuracy")), verdicts, r.conclusion]
            )  # fmt: skip
    return grid(f"Success of attacks on training data: A {a}, B {b}", header, lines)
