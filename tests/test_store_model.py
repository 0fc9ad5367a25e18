"""The store against a model of it in memory: random writes, reopening, failures in the middle, a second run."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from advplug import store as stored
from advplug.errors import UsageError
from advplug.estimate import Estimate
from advplug.evidence import Evidence
from advplug.results import Cell, Certificate, CertifiedAccuracy, Flag, Passes, Poisoning, RunInfo, RunResult, Seconds
from advplug.store import Store, finished, reading
from advplug.stored.samples import PoisonSample, Sample

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.sampled_from("aé☂'\"\\;\n 0"), max_size=5)
STATUS = st.sampled_from(["ok", "ok", "failed", "refused"])
ESTIMATES = st.none() | st.builds(
    Estimate, NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS, st.integers(0, 2**40), st.none() | NUMBERS
)
COMMON: dict[str, Any] = {
    "dataset": TEXTS, "model": TEXTS, "defense": TEXTS, "seed": st.integers(0, 2**63 - 1), "status": STATUS,
    "reason": st.none() | TEXTS, "notes": st.lists(TEXTS, max_size=2).map(tuple),
    "provenance": st.dictionaries(TEXTS, TEXTS | NUMBERS | st.lists(st.booleans() | st.none(), max_size=2), max_size=2),
}  # fmt: skip
FLAGS = st.lists(st.builds(Flag, TEXTS, st.sampled_from(["error", "info"]), TEXTS), max_size=2).map(tuple)
SECONDS = st.none() | st.builds(Seconds, NUMBERS, NUMBERS)
METRICS = st.dictionaries(TEXTS, ESTIMATES, max_size=2)
KEYS = {kind: st.sampled_from([f"{kind}{i}" for i in range(3)]) for kind in ("cell", "certificate", "poisoning")}
CELLS = st.builds(
    Cell, KEYS["cell"], **COMMON, attack=TEXTS, norm=TEXTS, eps=TEXTS, goal=TEXTS, flags=FLAGS, metrics=METRICS,
    draws=st.none() | st.integers(1, 9), seconds=SECONDS, passes=st.none() | st.builds(Passes, st.integers(0, 9)),
)  # fmt: skip
CERTIFICATES = st.builds(
    Certificate, KEYS["certificate"], **COMMON, norm=TEXTS, clean_accuracy=ESTIMATES,
    average_radius=st.none() | NUMBERS,
    certified_accuracy=st.lists(st.builds(CertifiedAccuracy, TEXTS, ESTIMATES, ESTIMATES), max_size=2).map(tuple),
)  # fmt: skip
POISONINGS = st.builds(
    Poisoning, KEYS["poisoning"], **COMMON, attack=TEXTS, metrics=METRICS, differences=METRICS, flags=FLAGS,
    poisons=st.none() | st.integers(0, 9), verdict=st.sampled_from([None, "trusted", "upper bound"]),
)  # fmt: skip
BYTES = st.none() | st.binary(min_size=1, max_size=4)


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    n, d = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    chance = np.random.default_rng(draw(st.integers(0, 99)))
    extra: dict[str, Any] = {"linf": chance.random(n), "steps": np.arange(n), "worst_violation": 0.5, "violations": n}
    kept = draw(st.sets(st.sampled_from(sorted(extra))))
    clean, attacked, adaptive = (chance.random(shape) < 0.5 for shape in ((n, d), (n,), (n, d)))
    facts = {name: extra[name] for name in kept}
    return Evidence(np.arange(n), chance.integers(0, 9, n), clean, attacked, adaptive, **facts)


def sample(kind: type[Any], number: int) -> Any:
    """Any one, told apart by its number; the store does not look into it."""
    required = [f.name for f in fields(kind) if f.default is not None]
    return kind(**dict.fromkeys(required, np.full(1, number, dtype=np.uint8)))


@dataclass
class Row:
    value: Any
    evidence: bytes | None


@dataclass
class Folder:
    """What ought to be in it."""

    rows: dict[str, Row] = field(default_factory=dict)
    samples: dict[str, bytes] = field(default_factory=dict)
    audits: dict[str, bytes] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shown: dict[str, list[Any]] = field(default_factory=dict)

    def put(self, value: Any, evidence: bytes | None, renew: bool = False) -> None:
        row = self.rows.get(value.key)
        if row is None or row.value.status != "ok" or renew:
            self.rows[value.key] = Row(value, evidence)

    def of(self, kind: str) -> dict[str, Row]:
        return {key: row for key, row in self.rows.items() if key.startswith(kind)}


class Runs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="advplug-store-")) / "out"
        self.store, self.model = Store(self.folder), Folder()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder.parent)

    @rule(made=st.lists(st.tuples(CELLS, st.none() | evidences()), max_size=3), renew=st.booleans(),
          numbers=st.dictionaries(KEYS["cell"], st.integers(0, 9), max_size=2))  # fmt: skip
    def put(self, made: list[tuple[Cell, Evidence | None]], renew: bool, numbers: dict[str, int]) -> None:
        seen: dict[str, Sample] = {key: sample(Sample, number) for key, number in numbers.items()}
        self.store.put("sweep", made, renew, seen)
        for cell, evidence in made:
            self.model.put(cell, evidence.to_bytes() if evidence else None, renew)
        self.model.samples |= {key: s.to_bytes() for key, s in seen.items()}

    @rule(made=CERTIFICATES, proofs=BYTES)
    def put_certificate(self, made: Certificate, proofs: bytes | None) -> None:
        self.store.put_certificate(made, proofs)
        self.model.put(made, proofs)

    @rule(made=POISONINGS, evidence=BYTES, number=st.none() | st.integers(0, 9))
    def put_poisoning(self, made: Poisoning, evidence: bytes | None, number: int | None) -> None:
        seen: PoisonSample | None = None if number is None else sample(PoisonSample, number)
        self.store.put_poisoning(made, evidence, seen)
        self.model.put(made, evidence)
        if seen is not None:
            self.model.samples[made.key] = seen.to_bytes()

    @rule(audits=st.dictionaries(TEXTS, st.binary(max_size=4), max_size=3))
    def put_audits(self, audits: dict[str, bytes]) -> None:
        self.store.put_audits(audits)
        self.model.audits |= audits

    @rule(dataset=TEXTS, names=st.lists(TEXTS, max_size=3))
    def put_classes(self, dataset: str, names: list[str]) -> None:
        self.store.put_classes(dataset, names)
        self.model.classes[dataset] = tuple(names)

    @rule(certificates=st.lists(CERTIFICATES, max_size=2, unique_by=lambda c: c.key), command=TEXTS)
    def put_shown(self, certificates: list[Certificate], command: str) -> None:
        run = RunInfo({"advplug": "1"}, 0, "cpu", command)
        self.store.put_shown(RunResult(run, (), (), tuple(certificates)))
        for kind, key, value in [("run", command, run), *(("certificate", c.key, c) for c in certificates)]:
            kept = [(k, v) for k, v in self.model.shown.get(kind, []) if k != key]
            self.model.shown[kind] = [*kept, (key, value)]

    @rule(made=CELLS, audits=st.dictionaries(TEXTS, st.binary(max_size=4), min_size=1, max_size=2))
    def fail(self, made: Cell, audits: dict[str, bytes]) -> None:
        """What goes wrong in the middle of writing leaves nothing behind."""
        broken: Any = object()
        with pytest.raises(AttributeError):
            self.store.put("sweep", [(made, None)], True, {made.key: sample(Sample, 3), "other": broken})
        with pytest.raises(UsageError, match="type"):
            self.store.put_audits({**audits, "other": broken})
        with pytest.raises(UsageError, match="type"):
            self.store._put_row("certificate", made, broken)  # type: ignore[arg-type]

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = Store(self.folder)

    @rule()
    def begin_anew(self) -> None:
        self.store.close()
        self.store, self.model = Store(self.folder, fresh=True), Folder()

    @rule(fresh=st.booleans())
    def second_run(self, fresh: bool) -> None:
        """It is turned away and changes nothing, whatever it wanted."""
        with pytest.raises(UsageError, match="in use by another run"):
            Store(self.folder, fresh)

    @invariant()
    def what_was_put_is_found(self) -> None:
        if not hasattr(self, "store"):
            return
        for i in range(3):
            row = self.model.rows.get(f"cell{i}", Row(None, None))
            assert self.store.cell(f"cell{i}") == row.value
            found = self.store.evidence(f"cell{i}")
            assert (None if found is None else found.to_bytes()) == row.evidence
            has = None if row.evidence is None else Evidence.from_bytes(row.evidence).linf is not None
            assert self.store.observed(f"cell{i}", "linf") is has
            for kind, read in (("certificate", self.store.certificate), ("poisoning", self.store.poisoning)):
                expected = self.model.rows.get(f"{kind}{i}")
                assert read(f"{kind}{i}") == (expected and (expected.value, expected.evidence))
        for key in (*self.model.audits, "none"):
            assert self.store.audit(key) == self.model.audits.get(key)

    @invariant()
    def readers_see_the_same(self) -> None:
        """In the order of the first writing; while the run is there, too."""
        if not hasattr(self, "store"):
            return
        keys = [*self.model.rows, "none"]
        assert finished(self.folder, keys) == {key: row.value.status for key, row in self.model.rows.items()}
        with reading(self.folder) as db:
            for kind in KEYS:
                rows = self.model.of(kind)
                seen = stored.evidences(db, kind)
                found = [(c["key"], seen.get(c["key"])) for c in stored.cells(db, kind)]
                assert found == [(key, row.evidence) for key, row in rows.items()]
                expected = {k: v for k, v in self.model.samples.items() if k in rows}
                assert dict(stored.samples(db, kind)) == expected
            assert stored.classes(db) == self.model.classes
            for kind in ("run", "certificate", "threat", "poisoning"):
                values = [asdict(value) for _, value in self.model.shown.get(kind, [])]
                assert [_listed(v) for v in stored.shown(db, kind).values()] == [_listed(v) for v in values]


def _listed(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=12, stateful_step_count=15)
