"""What is computed of a matrix, piece by piece, in this process or in any other; nothing is stored here."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from advplug import audit as audits
from advplug.artifacts import Artifacts
from advplug.assemble import finding, group_key, identity
from advplug.build import Builder, Built
from advplug.certificates import CertificatePlan, Proofs, measured
from advplug.certify import prove
from advplug.decisions import Batching, Clean, clean_decisions
from advplug.errors import AdvplugError, CellFailure
from advplug.evidence import Evidence
from advplug.health import Group, examine
from advplug.inspection import is_batch_dependent
from advplug.matrix import Sweep
from advplug.params import plain
from advplug.pipeline import SweepResult, run_sweep
from advplug.plans import VictimPlan
from advplug.poisons.evidence import PoisonEvidence
from advplug.poisons.evidence import measured as poison_metrics
from advplug.poisons.judge import judge
from advplug.poisons.plans import PoisonPlan
from advplug.progress import Progress
from advplug.registry import Registry
from advplug.results import Cell, Certificate, Passes, Poisoning, Seconds, Status
from advplug.stored.crafted import CraftedWriter
from advplug.stored.recorded import checked_values, finite, provenance
from advplug.stored.samples import PoisonSample, Sample, poisons_sampled

VICTIMS_KEPT = 3
"""Built victims held in memory: the baseline, the one at work, and one that an attack needs."""


@dataclass
class Options:
    """How to run, none of which changes a result. `failed` are victims that are known to be no use, by key."""

    device: str = "auto"
    batch_size: int = 128
    audit: audits.AuditLevel = "quick"
    offline: bool = False
    cache: Path | None = None
    failed: Mapping[str, AdvplugError] = field(default_factory=dict)

    def artifacts(self) -> Artifacts:
        return Artifacts(self.cache) if self.cache else Artifacts()


@dataclass(frozen=True)
class AuditPlan:
    """The audit of one victim under one threat, with the attacks that it looks at."""

    level: audits.AuditLevel
    members: tuple[tuple[Sweep, Fraction], ...]

    @property
    def victim(self) -> VictimPlan:
        return self.members[0][0].victim

    @cached_property
    def group(self) -> str:
        return group_key(self.members)

    def seen(self, observed: Sequence[bool]) -> AuditPlan:
        """The plan with the members alone of which something was observed: what an audit finds holds for these."""
        return replace(self, members=tuple(itertools.compress(self.members, observed)))

    @property
    def key(self) -> str:
        return f"{self.level}:{self.group}"


Piece = Sweep | AuditPlan | CertificatePlan | PoisonPlan
"""What is computed as one: a sweep, an audit, a certificate, or an attack on training data."""


def victims_of(piece: Piece) -> list[VictimPlan]:
    """The victims that have to be built for a piece of work, its own one first."""
    more = list(piece.needs.values()) if isinstance(piece, Sweep) else []
    if isinstance(piece, PoisonPlan):
        more = [piece.victim.clean]
    return list({plan.key: plan for plan in (piece.victim, *more)}.values())


@dataclass(frozen=True)
class Job:
    """A piece of work that is due, with what is known of other pieces.

    `keep`: the images that a sweep crafts are wanted by others; `base`: the key of the sweep whose images are at hand
    for a static attack; `found`: what was observed of an audit's members, None where one failed.
    """

    piece: Piece
    keep: bool = False
    base: str | None = None
    found: tuple[Evidence | None, ...] = ()


@dataclass(frozen=True)
class Swept:
    """The cells of a sweep, with images to look at by the cell's key."""

    cells: Sequence[tuple[Cell, Evidence]]
    samples: Mapping[str, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class Audited:
    """An audit as it is stored, and whether the victim's answers depend on the rest of the batch."""

    audit: bytes
    batch_dependent: bool | None


Poisoned = tuple[Poisoning, PoisonEvidence, PoisonSample | None]
Outcome = Swept | Audited | tuple[Certificate, Proofs] | Poisoned | AdvplugError
"""What came of a piece of work; an error where it failed."""
Static = Callable[[Fraction, int, int], Tensor]
"""Images crafted on the baseline: at a budget, from one row to another."""


def cell_of(sweep: Sweep, eps: Fraction, status: Status, reason: str | None = None, **rest: Any) -> Cell:
    """A row of the result, as the sweep names it."""
    columns: dict[str, Any] = identity(sweep, eps)
    return Cell(sweep.cell_key(eps), attack=sweep.attack.label, status=status, reason=reason, **columns, **rest)


class Bench:
    """Builds victims, a few of which it keeps, and computes on them. `limits` are numbers of test images by dataset."""

    def __init__(
        self,
        options: Options,
        registry: Registry,
        limits: Mapping[str, int | None],
        progress: Progress,
        artifacts: Artifacts | None = None,
    ) -> None:
        """Raises UsageError for a device that is not there."""
        self.batching = Batching(options.batch_size)
        self.builder = Builder(artifacts or options.artifacts(), options.device, options.offline, progress)
        self._registry, self._limits, self._progress = registry, limits, progress
        self._victims: OrderedDict[str, tuple[Built, Clean]] = OrderedDict()
        self._seen: dict[str, tuple[Clean, bool | None]] = {}
        self._counts: list[Any] = []
        self._unusable = dict(options.failed)

    @property
    def device(self) -> str:
        return str(self.builder.device)

    @property
    def passes(self) -> int:
        """Images sent through models forward and backward so far, trainings aside."""
        return sum(count.model + count.backward for count in self._counts)

    def compute(self, job: Job, crafted: Path, static: Static | None = None) -> Outcome:
        """What comes of a job. Images that are to be kept go to the folder `crafted`; failures are outcomes."""
        piece = job.piece
        try:
            if isinstance(piece, Sweep):
                return self._swept(piece, crafted if job.keep else None, static)
            if isinstance(piece, AuditPlan):
                return self._audited(piece, job.found)
            if isinstance(piece, CertificatePlan):
                return self._proven(piece)
            return self._poisoned(piece)
        except AdvplugError as error:
            return error
        except OSError:  # a full disk is no fault of this piece
            raise
        except Exception as error:  # the user's model, or a plugin's code, may raise anything
            failure = CellFailure(f"{type(error).__name__}: {' '.join(str(error).split())}")
            failure.__cause__ = error
            return failure

    # --- victims ---

    def victim(self, plan: VictimPlan) -> tuple[Built, Clean]:
        """The victim, trained and judged without attack once, and kept while it is used.

        Raises UsageError or CellFailure, at once for a victim that failed before.
        """
        if plan.key in self._unusable:
            raise self._unusable[plan.key]
        try:
            return self._victim(plan)
        except AdvplugError as error:
            self._unusable[plan.key] = error
            raise
        except Exception as error:  # the user's model, or a plugin's, may raise anything
            told = f"{plan.model.label} raised {type(error).__name__}: {' '.join(str(error).split())}"
            self._unusable[plan.key] = CellFailure(told)
            raise self._unusable[plan.key] from error

    def _victim(self, plan: VictimPlan) -> tuple[Built, Clean]:
        if plan.key not in self._victims:
            while len(self._victims) >= VICTIMS_KEPT:
                self._victims.popitem(last=False)
            built = self.builder.build(plan, self._limits[plan.dataset.label])
            self._counts.append(built.victim.passes)
            built.victim.batch_size = self.batching.size
            clean, built.batch_dependent = self._looked_at(built)
            built.victim.batch_dependent = bool(built.batch_dependent)
            self._victims[plan.key] = (built, clean)
        self._victims.move_to_end(plan.key)
        return self._victims[plan.key]

    def _looked_at(self, built: Built) -> tuple[Clean, bool | None]:
        """The answers without attack, which a victim gives once even where it is built again."""
        key = built.victim.key
        if key in self._seen:
            return self._seen[key]
        found = clean_decisions(built.victim, built.split, self.batching), is_batch_dependent(built, self.batching)
        if found[0].cosines is None:  # those of a gallery are large
            self._seen[key] = found
        return found

    def seen(self, plan: VictimPlan) -> dict[str, tuple[Clean, bool | None]]:
        """What a victim answers without attack, by its key; empty where that is not kept."""
        return {plan.key: self._seen[plan.key]} if plan.key in self._seen else {}

    def know(self, seen: Mapping[str, tuple[Clean, bool | None]]) -> None:
        """Takes another process's word for it."""
        self._seen |= {key: found for key, found in seen.items() if key not in self._seen}

    # --- sweeps ---

    def _swept(self, sweep: Sweep, crafted: Path | None, static: Static | None) -> Swept:
        built, clean = self.victim(sweep.victim)
        needs = {name: self.victim(plan)[0].victim for name, plan in sweep.needs.items()}
        attack = sweep.attack.make(**needs)
        # Every image counts once a budget.
        self._progress.stage(_titled(sweep), len(built.split) * len(sweep.budgets))
        keep = None if crafted is None else CraftedWriter(crafted, sweep.key, sweep.budgets, len(built.split))
        result = run_sweep(sweep, built, clean, attack, self.batching, static, keep, self._progress.advance)
        cells = [self._cell(sweep, eps, built, result) for eps in sweep.budgets]
        return Swept(cells, {sweep.cell_key(eps): sample for eps, sample in result.samples.items()})

    def _cell(self, sweep: Sweep, eps: Fraction, built: Built, result: SweepResult) -> tuple[Cell, Evidence]:
        evidence, timing = result.evidence[eps], result.timing[eps]
        flags, _ = examine(Group([finding(sweep, evidence)], defended=bool(sweep.victim.defense)), cell=True)
        values, notes = self._metrics(evidence)
        cell = cell_of(
            sweep,
            eps,
            "ok",
            flags=flags,
            metrics=values,
            draws=evidence.draws,
            passes=Passes(timing.forward, timing.backward, timing.model),
            seconds=Seconds(built.seconds_train, built.seconds_defend, timing.attack, timing.decide),
            notes=(*sweep.notes, *built.notes, *result.notes, *notes),
            provenance={**provenance(sweep.victim, built, evidence.index), "attack": plain(sweep.attack.recipe)},
        )
        return cell, evidence

    def _metrics(self, evidence: Evidence) -> tuple[dict[str, Any], list[str]]:
        values: dict[str, Any] = {}
        notes = []
        for entry in self._registry.entries("metric"):
            try:
                values |= checked_values(entry.make({p.name: p.default for p in entry.params()})(evidence))
            except Exception as error:  # a plugin's metric must not cost the cell
                values |= dict.fromkeys(entry.spec.caps.values)  # type: ignore[union-attr]
                notes.append(f"metric '{entry.name}' failed: {type(error).__name__}: {error}")
        return values, notes

    # --- audits, certificates, attacks on training data ---

    def _audited(self, plan: AuditPlan, observed: Sequence[Evidence | None]) -> Audited:
        pairs = zip(plan.members, observed, strict=True)
        found = [audits.Member(s.attack, finding(s, evidence)) for (s, _), evidence in pairs if evidence is not None]
        sweep, eps = plan.members[0]
        built, clean = self.victim(sweep.victim)
        self._progress.stage(f"audit of {sweep.victim.model.label} | {sweep.victim.defense_label}", 1)
        threat = sweep.norm, eps, sweep.goal
        probes = audits.run_audit(built, clean, threat, found, plan.level, self.batching)
        return Audited(audits.to_bytes(probes), built.batch_dependent)

    def _proven(self, plan: CertificatePlan) -> tuple[Certificate, Proofs]:
        built, _ = self.victim(plan.victim)
        title = f"certificate of {plan.victim.model.label} | {plan.victim.defense_label}"
        self._progress.stage(title, len(built.split))
        clock, before = time.perf_counter(), len(self.batching.notes)
        proven = prove(built, self.batching, self._progress.advance)
        made = Certificate(
            plan.key,
            status="ok",
            passes=Passes(proven.passes, 0, proven.passes),
            seconds=time.perf_counter() - clock,
            notes=(*built.notes, *self.batching.notes[before:]),
            provenance=provenance(plan.victim, built, proven.proofs.index),
            **plan.identity(),
            **measured(proven.proofs),
        )
        return made, proven.proofs

    def _poisoned(self, plan: PoisonPlan) -> Poisoned:
        clean = self.victim(plan.victim.clean)[0].victim
        built, _ = self.victim(plan.victim)
        self._progress.stage(f"{plan.attack.label}: judging {plan.victim.model.label} | {plan.victim.defense_label}", 0)
        clock, before = time.perf_counter(), len(self.batching.notes)
        evidence = judge(built, clean, self.builder.dataset(plan.victim.dataset).test, self.batching)
        assert built.poisoned is not None
        spent = Seconds(built.seconds_train, built.seconds_defend, 0.0, time.perf_counter() - clock)
        told = {"poison": plain(built.poisoned.facts), "reaches": finite(evidence.reaches)}
        made = Poisoning(
            plan.key,
            status="ok",
            metrics=poison_metrics(evidence),
            poisons=evidence.poisons,
            training_images=evidence.rows,
            draws=evidence.clean.shape[1],
            seconds=spent,
            notes=(*built.notes, *self.batching.notes[before:]),
            provenance=provenance(plan.victim, built, evidence.index) | told,
            **plan.identity(),
        )
        return made, evidence, poisons_sampled(built.poisoned, built.split, evidence)


def _titled(sweep: Sweep) -> str:
    budgets = sweep.budgets[0] if len(sweep.budgets) == 1 else f"at {len(sweep.budgets)} budgets"
    return f"{sweep.victim.model.label} | {sweep.victim.defense_label} | {sweep.attack.label} {sweep.norm} {budgets}"
