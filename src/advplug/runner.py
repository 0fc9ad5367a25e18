"""Runs a matrix: victim by victim, what is missing only; stores each sweep as it finishes."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from advplug import audit as audits
from advplug.allowance import UNLIMITED, Allowance, informative
from advplug.artifacts import Artifacts
from advplug.assemble import finding, group_key, identity
from advplug.build import Builder, Built
from advplug.certificates import CertificatePlan, Proofs, measured
from advplug.certify import prove
from advplug.crafted import CraftedWriter, has_crafted, read_crafted
from advplug.decisions import Batching, Clean, clean_decisions
from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.evidence import Evidence
from advplug.forecast import certificate_cost, cost_of
from advplug.health import Group, examine
from advplug.inspection import is_batch_dependent
from advplug.matrix import Sweep
from advplug.params import plain
from advplug.perturbations import LP
from advplug.pipeline import SweepResult, run_sweep
from advplug.plans import VictimPlan
from advplug.poison_evidence import PoisonEvidence
from advplug.poison_evidence import measured as poison_metrics
from advplug.poisoned import judge
from advplug.poisonings import PoisonPlan
from advplug.progress import Progress, Share, Silent, Tally
from advplug.recorded import checked_values, finite, provenance
from advplug.registry import Registry
from advplug.results import Cell, Certificate, Passes, Poisoning, Seconds, Status
from advplug.store import Store, finished

VICTIMS_KEPT = 3
"""Built victims held in memory: the baseline, the one at work, and one that an attack needs."""


@dataclass
class Options:
    """How to run, none of which changes a result."""

    device: str = "auto"
    batch_size: int = 128
    audit: audits.AuditLevel = "quick"
    offline: bool = False
    cache: Path | None = None


@dataclass
class Runner:
    """One run over `sweeps` into `store`."""

    sweeps: Sequence[Sweep]
    store: Store
    registry: Registry
    options: Options = field(default_factory=Options)
    progress: Progress = field(default_factory=Silent)
    usage_errors: list[str] = field(default_factory=list)
    certificates: Sequence[CertificatePlan] = ()
    poisonings: Sequence[PoisonPlan] = ()
    allowance: Allowance = UNLIMITED

    def __post_init__(self) -> None:
        self.batching = Batching(self.options.batch_size)
        artifacts = Artifacts(self.options.cache) if self.options.cache else Artifacts()
        self._builder = Builder(artifacts, self.options.device, self.options.offline, self.progress)
        self._victims: OrderedDict[str, tuple[Built, Clean]] = OrderedDict()
        self._seen: dict[str, tuple[Clean, bool | None]] = {}
        self._counts: list[Any] = []
        self._began = time.perf_counter()
        self._unusable: dict[str, AdvplugError] = {}
        by_key = {s.key: s for s in self.sweeps if s.refused is None}
        self._baselines: dict[str, Sweep] = {}
        self._dependents: dict[str, list[Sweep]] = {}
        for sweep in by_key.values():
            base = by_key.get(sweep.baseline.key) if sweep.baseline else None
            if base is not None:
                self._baselines[sweep.key] = base
                self._dependents.setdefault(base.key, []).append(sweep)

    @property
    def device(self) -> str:
        return str(self._builder.device)

    @property
    def passes(self) -> int:
        """Images sent through models forward and backward so far, trainings aside."""
        return sum(count.model + count.backward for count in self._counts)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._began

    @property
    def out(self) -> bool:
        """Whether the allowance is used up."""
        return self.allowance.used_up(self.seconds, self.passes)

    def run(self) -> None:
        """Runs what is missing. Failures of a cell are stored with their reason; the others go on.

        Where the allowance is limited, the most informative sweeps come first, and none is begun once it is used up.
        """
        order = informative(self.sweeps) if self.allowance.limited else self.sweeps
        of_victim: dict[str, list[Sweep]] = {}
        for sweep in order:
            of_victim.setdefault(sweep.victim.key, []).append(sweep)
        left = Counter(sweep.victim.key for sweep in order)
        self.tally = self._counted()
        for sweep in order:
            if self.out:
                break
            self._run(sweep)
            self.tally.settled(sweep.key)
            left[sweep.victim.key] -= 1
            if not left[sweep.victim.key]:
                self._conclude(of_victim[sweep.victim.key])
        self._drop_crafted()
        for poisoning in self.poisonings:
            if not self.out:
                self._poison(poisoning)
                self.tally.settled(poisoning.key)

    def _counted(self) -> Tally:
        """What is to be done, of all that is not refused."""
        due: dict[str, tuple[list[str], Share]] = {}
        for sweep in self.sweeps:
            if sweep.refused is None:
                cells = [sweep.cell_key(eps) for eps in sweep.budgets]
                due[sweep.key] = cells, Share(len(cells), cost_of(sweep).passes)
        for proof in self.certificates:
            if proof.refused is None:
                due[proof.key] = [proof.key], Share(1, certificate_cost(proof).passes)
        due |= {p.key: ([p.key], Share()) for p in self.poisonings if p.refused is None}
        status = finished(self.store.folder, [key for cells, _ in due.values() for key in cells])
        todo = {name: share for name, (cells, share) in due.items() if any(status.get(c) != "ok" for c in cells)}
        done = sum(share.cells for name, (_, share) in due.items() if name not in todo)
        return Tally(self.progress, todo, done, self.allowance.seconds)

    def _conclude(self, sweeps: list[Sweep]) -> None:
        """What is said of a victim once all its attacks are run: the audit of its threats, and its certificate."""
        if self.options.audit != "none":
            self._audit(sweeps)
        for plan in self.certificates:
            if plan.victim.key == sweeps[0].victim.key and not self.out:
                self._certify(plan)
                self.tally.settled(plan.key)

    # --- one sweep ---

    def _run(self, sweep: Sweep) -> None:
        if sweep.refused is not None:
            reason = str(sweep.refused)
            self.store.put(sweep.key, [(self._cell(sweep, e, "refused", reason), None) for e in sweep.budgets])
            return
        keep = self._wanted_as_static(sweep)
        if self._done(sweep) and (not keep or has_crafted(self.store.crafted, sweep.key, sweep.budgets)):
            return
        try:
            result, built = self._compute(sweep, keep)
            cells = [self._ok(sweep, eps, built, result) for eps in sweep.budgets]
        except CellFailure as error:
            self.progress.note(f"failed: {sweep.attack.label} on {sweep.victim.model.label}: {error}")
            self._fail(sweep, error)
        except UsageError as error:
            # Bad for this victim or attack only: the other cells may well run.
            self.usage_errors.append(str(error))
            self._fail(sweep, error)
        else:
            samples = {sweep.cell_key(eps): sample for eps, sample in result.samples.items()}
            self.store.put(sweep.key, cells, renew=self._lacks_static(sweep), samples=samples)

    def _fail(self, sweep: Sweep, error: AdvplugError) -> None:
        if os.environ.get("ADVPLUG_DEBUG"):
            traceback.print_exception(error)
        self.store.put(sweep.key, [(self._cell(sweep, e, "failed", str(error)), None) for e in sweep.budgets])

    def _compute(self, sweep: Sweep, keep: bool) -> tuple[SweepResult, Built]:
        built, clean = self.victim(sweep.victim)
        needs = {name: self.victim(plan)[0].victim for name, plan in sweep.needs.items()}
        attack = sweep.attack.make(**needs)
        # Every image counts once a budget.
        self.progress.stage(_titled(sweep), len(built.split) * len(sweep.budgets))
        writer = CraftedWriter(self.store.crafted, sweep.key, sweep.budgets, len(built.split)) if keep else None
        result = run_sweep(
            sweep, built, clean, attack, self.batching, self._static(sweep), writer, self.progress.advance
        )
        return result, built

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
            built = self._builder.build(plan, self._limit(plan))
            self._counts.append(built.victim.passes)
            built.victim.batch_size = self.batching.size
            clean, built.batch_dependent = self._looked_at(built)
            built.victim.batch_dependent = bool(built.batch_dependent)
            self._victims[plan.key] = (built, clean)
            self.store.put_classes(plan.dataset.label, plan.dataset.value.info().classes)
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

    def _limit(self, plan: VictimPlan) -> int | None:
        asked: list[Sweep | PoisonPlan] = [*self.sweeps, *self.poisonings]
        return next(s.limit for s in asked if s.victim.dataset.label == plan.dataset.label)

    # --- static attacks: images crafted on the undefended baseline ---

    def _wanted_as_static(self, sweep: Sweep) -> bool:
        """Whether an unfinished cell of a defended victim will be judged on this sweep's images."""
        return any(not self._done(s) or self._lacks_static(s) for s in self._dependents.get(sweep.key, ()))

    def _static(self, sweep: Sweep) -> Callable[[Fraction, int, int], Tensor] | None:
        base = self._baselines.get(sweep.key)
        if base is None or not has_crafted(self.store.crafted, base.key, base.budgets):
            return None
        return lambda eps, start, stop: read_crafted(self.store.crafted, base.key, eps, start, stop)

    def _drop_crafted(self) -> None:
        for sweep in self.sweeps:
            if sweep.key in self._dependents and not self._wanted_as_static(sweep):
                for file in self.store.crafted.glob(f"{sweep.key}-*"):
                    file.unlink(missing_ok=True)

    # --- cells ---

    def _done(self, sweep: Sweep) -> bool:
        cells = [self.store.cell(sweep.cell_key(eps)) for eps in sweep.budgets]
        if not all(c is not None and c.status == "ok" for c in cells):
            return False
        return not self._lacks_static(sweep) or self._static(sweep) is None

    def _lacks_static(self, sweep: Sweep) -> bool:
        """Whether the baseline had failed when these cells were computed."""
        if sweep.key not in self._baselines:
            return False
        found = (self.store.evidence(sweep.cell_key(eps)) for eps in sweep.budgets)
        return any(e is not None and e.static is None for e in found)

    def _cell(self, sweep: Sweep, eps: Fraction, status: Status, reason: str | None = None, **rest: Any) -> Cell:
        columns: dict[str, Any] = identity(sweep, eps)
        return Cell(sweep.cell_key(eps), attack=sweep.attack.label, status=status, reason=reason, **columns, **rest)

    def _ok(self, sweep: Sweep, eps: Fraction, built: Built, result: SweepResult) -> tuple[Cell, Evidence]:
        evidence, timing = result.evidence[eps], result.timing[eps]
        flags, _ = examine(Group([finding(sweep, evidence)], defended=bool(sweep.victim.defense)), cell=True)
        values, notes = self._metrics(evidence)
        cell = self._cell(
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
        for entry in self.registry.entries("metric"):
            try:
                values |= checked_values(entry.make({p.name: p.default for p in entry.params()})(evidence))
            except Exception as error:  # a plugin's metric must not cost the cell
                values |= dict.fromkeys(entry.spec.caps.values)  # type: ignore[union-attr]
                notes.append(f"metric '{entry.name}' failed: {type(error).__name__}: {error}")
        return values, notes

    def _note_failure(self, what: str, error: AdvplugError) -> None:
        if isinstance(error, UsageError):
            self.usage_errors.append(str(error))
        self.progress.note(f"failed: {what}: {error}")

    # --- certificates ---

    def _certify(self, plan: CertificatePlan) -> None:
        """Proves what is not proven yet; a failure is stored with its reason."""
        found = self.store.certificate(plan.key)
        if found is not None and found[0].status == "ok":
            return
        named = plan.identity()
        try:
            if plan.refused is not None:
                made, proofs = Certificate(plan.key, status="refused", reason=str(plan.refused), **named), None
            else:
                made, proofs = self._proven(plan)
        except AdvplugError as error:
            self._note_failure(f"certificate of {plan.victim.model.label}", error)
            made, proofs = Certificate(plan.key, status="failed", reason=str(error), **named), None
        self.store.put_certificate(made, proofs.to_bytes() if proofs else None)

    def _proven(self, plan: CertificatePlan) -> tuple[Certificate, Proofs]:
        built, _ = self.victim(plan.victim)
        title = f"certificate of {plan.victim.model.label} | {plan.victim.defense_label}"
        self.progress.stage(title, len(built.split))
        clock, before = time.perf_counter(), len(self.batching.notes)
        proven = prove(built, self.batching, self.progress.advance)
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

    # --- attacks on training data ---

    def _poison(self, plan: PoisonPlan) -> None:
        """Judges what is not judged yet; a failure is stored with its reason."""
        found = self.store.poisoning(plan.key)
        if found is not None and found[0].status == "ok":
            return
        named, evidence = plan.identity(), None
        try:
            if plan.refused is not None:
                made = Poisoning(plan.key, status="refused", reason=str(plan.refused), **named)
            else:
                made, evidence = self._poisoned(plan)
        except AdvplugError as error:
            self._note_failure(f"{plan.attack.label} on {plan.victim.model.label}", error)
            made = Poisoning(plan.key, status="failed", reason=str(error), **named)
        self.store.put_poisoning(made, evidence.to_bytes() if evidence else None)

    def _poisoned(self, plan: PoisonPlan) -> tuple[Poisoning, PoisonEvidence]:
        clean = self.victim(plan.victim.clean)[0].victim
        built, _ = self.victim(plan.victim)
        self.progress.stage(f"{plan.attack.label}: judging {plan.victim.model.label} | {plan.victim.defense_label}", 0)
        clock, before = time.perf_counter(), len(self.batching.notes)
        evidence = judge(built, clean, self._builder.dataset(plan.victim.dataset).test, self.batching)
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
        return made, evidence

    # --- audits ---

    def _audit(self, sweeps: list[Sweep]) -> None:
        level = self.options.audit
        groups: dict[str, list[tuple[Sweep, Fraction]]] = {}
        for sweep in sweeps:
            # The probes are gradient steps and noise, which other sets than these norms' balls do not take.
            for eps in sweep.budgets if sweep.norm in LP and sweep.refused is None else ():
                groups.setdefault(sweep.threat_key(eps), []).append((sweep, eps))
        for members in groups.values():
            key = group_key(members)
            if self.store.audit(f"full:{key}") is not None or self.store.audit(f"{level}:{key}") is not None:
                continue
            if self.out:
                return
            try:
                self._audit_group(f"{level}:{key}", members)
            except AdvplugError as error:
                self.progress.note(f"the audit failed, its checks stay unchecked: {error}")

    def _audit_group(self, key: str, members: list[tuple[Sweep, Fraction]]) -> None:
        found = []
        for sweep, eps in members:
            evidence = self.store.evidence(sweep.cell_key(eps))
            if evidence is not None:
                found.append(audits.Member(sweep.attack, finding(sweep, evidence)))
        if not found:
            return
        sweep, eps = members[0]
        built, clean = self.victim(sweep.victim)
        self.progress.stage(f"audit of {sweep.victim.model.label} | {sweep.victim.defense_label}", 1)
        threat = sweep.norm, eps, sweep.goal
        probes = audits.run_audit(built, clean, threat, found, self.options.audit, self.batching)
        self.store.put_audit(key, audits.to_bytes(probes))
        if built.batch_dependent is not None:
            self.store.put_audit(f"batch:{sweep.victim.key}", b"1" if built.batch_dependent else b"0")


def _titled(sweep: Sweep) -> str:
    budgets = sweep.budgets[0] if len(sweep.budgets) == 1 else f"at {len(sweep.budgets)} budgets"
    return f"{sweep.victim.model.label} | {sweep.victim.defense_label} | {sweep.attack.label} {sweep.norm} {budgets}"
