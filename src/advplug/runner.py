"""Decides what of a matrix is to be computed, in which order, and stores what came of it; executors compute it."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from advplug.certificates import CertificatePlan, Proofs
from advplug.costs.allowance import UNLIMITED, Allowance, informative
from advplug.costs.forecast import audit_cost, certificate_cost, cost_of, images_of
from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.matrix import Sweep
from advplug.perturbations import LP
from advplug.poisons.evidence import PoisonEvidence
from advplug.poisons.plans import PoisonPlan
from advplug.progress import Progress, Share, Silent, Tally
from advplug.results import Certificate, Poisoning
from advplug.store import Store, finished
from advplug.stored.crafted import has_crafted, read_crafted
from advplug.stored.samples import PoisonSample
from advplug.work import Audited, AuditPlan, Job, Options, Outcome, Piece, Static, Swept, cell_of


@dataclass
class Runner:
    """One run over `sweeps` into `store`."""

    sweeps: Sequence[Sweep]
    store: Store
    options: Options = field(default_factory=Options)
    progress: Progress = field(default_factory=Silent)
    usage_errors: list[str] = field(default_factory=list)
    certificates: Sequence[CertificatePlan] = ()
    poisonings: Sequence[PoisonPlan] = ()
    allowance: Allowance = UNLIMITED
    passes: int = 0
    """Images sent through models forward and backward so far, trainings aside."""

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._named: set[str] = set()
        by_key = {s.key: s for s in self.sweeps if s.refused is None}
        self._baselines: dict[str, Sweep] = {}
        self._dependents: dict[str, list[Sweep]] = {}
        for sweep in by_key.values():
            base = by_key.get(sweep.baseline.key) if sweep.baseline else None
            if base is not None:
                self._baselines[sweep.key] = base
                self._dependents.setdefault(base.key, []).append(sweep)
        self.tally = self._counted()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._began

    @property
    def out(self) -> bool:
        """Whether the allowance is used up, so that nothing more is to be begun."""
        return self.allowance.used_up(self.seconds, self.passes)

    def pieces(self) -> list[Piece]:
        """All that there is, in order: a victim's sweeps, its audits and its certificate, at last poisonings.

        Where the allowance is limited, the most informative sweeps come first.
        """
        order = informative(self.sweeps) if self.allowance.limited else self.sweeps
        of_victim: dict[str, list[Sweep]] = {}
        for sweep in order:
            of_victim.setdefault(sweep.victim.key, []).append(sweep)
        proofs: dict[str, list[CertificatePlan]] = {}
        for plan in self.certificates:
            proofs.setdefault(plan.victim.key, []).append(plan)
        left = Counter(sweep.victim.key for sweep in order)
        found: list[Piece] = []
        for sweep in order:
            key = sweep.victim.key
            found.append(sweep)
            left[key] -= 1
            if not left[key]:
                found += [*self._audits(of_victim[key]), *proofs.get(key, ())]
        return [*found, *self.poisonings]

    def after(self, piece: Piece) -> list[str]:
        """The keys of the pieces that come before this one."""
        if isinstance(piece, AuditPlan):
            return [sweep.key for sweep, _ in piece.members]
        base = self._baselines.get(piece.key)
        return [base.key] if base is not None else []

    def due(self, piece: Piece) -> Job | None:
        """What is to be computed of a piece; None where it is done, or refused, which is then stored."""
        if isinstance(piece, Sweep):
            job = self._due_sweep(piece)
        elif isinstance(piece, AuditPlan):
            job = self._due_audit(piece)
        elif isinstance(piece, CertificatePlan):
            job = self._due_certificate(piece)
        else:
            job = self._due_poisoning(piece)
        if job is None:
            self.tally.settled(piece.key)
        elif piece.victim.dataset.label not in self._named:
            dataset = piece.victim.dataset
            self.store.put_classes(dataset.label, dataset.value.info().classes)
            self._named.add(dataset.label)
        return job

    def images(self, job: Job) -> Static | None:
        """The images of a job's baseline, read from the store."""
        folder, base = self.store.crafted, job.base
        return None if base is None else lambda eps, start, stop: read_crafted(folder, base, eps, start, stop)

    def settle(self, job: Job, outcome: Outcome) -> None:
        """Stores what came of a job. Failures are stored with their reason."""
        if isinstance(outcome, AdvplugError):
            self._fail(job.piece, outcome)
        elif isinstance(outcome, Swept):
            self.store.put(
                job.piece.key, outcome.cells, renew=self._lacks_static(job.piece), samples=outcome.samples
            )  # fmt: skip
        elif isinstance(outcome, Audited):
            assert isinstance(job.piece, AuditPlan)
            found = {job.piece.seen([evidence is not None for evidence in job.found]).key: outcome.audit}
            if outcome.batch_dependent is not None:
                found[f"batch:{job.piece.victim.key}"] = b"1" if outcome.batch_dependent else b"0"
            self.store.put_audits(found)
        else:
            self._put(*outcome)
        self.tally.settled(job.piece.key)

    def drop_crafted(self) -> None:
        """Deletes the images that no unfinished cell needs."""
        for key, base in {base.key: base for base in self._baselines.values()}.items():
            if not self._wanted_as_static(base):
                for file in self.store.crafted.glob(f"{key}-*"):
                    file.unlink(missing_ok=True)

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
        for piece in self.pieces():
            if isinstance(piece, AuditPlan) and any(sweep.key in todo for sweep, _ in piece.members):
                images = images_of(piece.members[0][0])
                todo[piece.key] = Share(0, audit_cost(piece.victim, piece.level, images, 1).passes)
        done = sum(share.cells for name, (_, share) in due.items() if name not in todo)
        return Tally(self.progress, todo, done, self.allowance.seconds)

    # --- what is due ---

    def _due_sweep(self, sweep: Sweep) -> Job | None:
        if sweep.refused is not None:
            reason = str(sweep.refused)
            self.store.put(sweep.key, [(cell_of(sweep, e, "refused", reason), None) for e in sweep.budgets])
            return None
        keep = self._wanted_as_static(sweep)
        if self._done(sweep) and (not keep or has_crafted(self.store.crafted, sweep.key, sweep.budgets)):
            return None
        return Job(sweep, keep, self._carried(sweep))

    def _audits(self, sweeps: Sequence[Sweep]) -> list[AuditPlan]:
        """The audits of a victim, one a threat."""
        groups: dict[str, list[tuple[Sweep, Fraction]]] = {}
        if self.options.audit == "none":
            return []
        for sweep in sweeps:
            # The probes are gradient steps and noise, which other sets than these norms' balls do not take.
            for eps in sweep.budgets if sweep.norm in LP and sweep.refused is None else ():
                groups.setdefault(sweep.threat_key(eps), []).append((sweep, eps))
        return [AuditPlan(self.options.audit, tuple(members)) for members in groups.values()]

    def _due_audit(self, plan: AuditPlan) -> Job | None:
        keys = [sweep.cell_key(eps) for sweep, eps in plan.members]
        seen = plan.seen([self.store.observed(key, "index") is not None for key in keys])
        if not seen.members or self.store.audit(f"full:{seen.group}") is not None:
            return None
        if self.store.audit(seen.key) is not None:
            return None
        return Job(plan, found=tuple(map(self.store.evidence, keys)))

    def _due_certificate(self, plan: CertificatePlan) -> Job | None:
        found = self.store.certificate(plan.key)
        if found is not None and found[0].status == "ok":
            return None
        if plan.refused is not None:
            self._put(Certificate(plan.key, status="refused", reason=str(plan.refused), **plan.identity()))
            return None
        return Job(plan)

    def _due_poisoning(self, plan: PoisonPlan) -> Job | None:
        found = self.store.poisoning(plan.key)
        if found is not None and found[0].status == "ok":
            return None
        if plan.refused is not None:
            self._put(Poisoning(plan.key, status="refused", reason=str(plan.refused), **plan.identity()))
            return None
        return Job(plan)

    # --- static attacks: images crafted on the undefended baseline ---

    def _wanted_as_static(self, sweep: Sweep) -> bool:
        """Whether an unfinished cell of a defended victim will be judged on this sweep's images."""
        return any(not self._done(s) or self._lacks_static(s) for s in self._dependents.get(sweep.key, ()))

    def _carried(self, sweep: Sweep) -> str | None:
        """The key of the baseline's sweep, where its images are at hand."""
        base = self._baselines.get(sweep.key)
        if base is None or not has_crafted(self.store.crafted, base.key, base.budgets):
            return None
        return base.key

    def _done(self, sweep: Sweep) -> bool:
        cells = [self.store.cell(sweep.cell_key(eps)) for eps in sweep.budgets]
        if not all(c is not None and c.status == "ok" for c in cells):
            return False
        return not self._lacks_static(sweep) or self._carried(sweep) is None

    def _lacks_static(self, sweep: Piece) -> bool:
        """Whether the baseline had failed when these cells were computed."""
        if not isinstance(sweep, Sweep) or sweep.key not in self._baselines:
            return False
        return any(self.store.observed(sweep.cell_key(eps), "static") is False for eps in sweep.budgets)

    # --- what is stored ---

    def _put(
        self,
        made: Certificate | Poisoning,
        proven: Proofs | PoisonEvidence | None = None,
        sample: PoisonSample | None = None,
    ) -> None:
        evidence = proven.to_bytes() if proven is not None else None
        if isinstance(made, Certificate):
            self.store.put_certificate(made, evidence)
        else:
            self.store.put_poisoning(made, evidence, sample)

    def _fail(self, piece: Piece, error: AdvplugError) -> None:
        if os.environ.get("ADVPLUG_DEBUG"):
            traceback.print_exception(error)
        if isinstance(piece, AuditPlan):
            self.progress.note(f"the audit failed, its checks stay unchecked: {error}")
            return
        if isinstance(error, UsageError):
            # Bad for this victim or attack only: the other cells may well run.
            self.usage_errors.append(str(error))
        if isinstance(piece, Sweep):
            if isinstance(error, CellFailure):
                self.progress.note(f"failed: {piece.attack.label} on {piece.victim.model.label}: {error}")
            self.store.put(piece.key, [(cell_of(piece, e, "failed", str(error)), None) for e in piece.budgets])
            return
        model, named = piece.victim.model.label, piece.identity()
        if isinstance(piece, CertificatePlan):
            self.progress.note(f"failed: certificate of {model}: {error}")
            self._put(Certificate(piece.key, status="failed", reason=str(error), **named))
        else:
            self.progress.note(f"failed: {piece.attack.label} on {model}: {error}")
            self._put(Poisoning(piece.key, status="failed", reason=str(error), **named))


def limits(asked: Sequence[Sweep | PoisonPlan]) -> Mapping[str, int | None]:
    """How many test images are evaluated, by dataset."""
    return {s.victim.dataset.label: s.limit for s in reversed(asked)}
