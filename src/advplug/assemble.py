"""Stored cells to the result of a run: cells in order, threat groups with worst case, difference and verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from advplug.builtin.metrics import share
from advplug.certificates import CertificatePlan, Proofs, reported
from advplug.contracts import Access, AttackCaps, Strength, Targeted, Untargeted
from advplug.estimate import Estimate, paired_difference
from advplug.evidence import Array, Evidence, worst_case
from advplug.health import Audit, Finding, Group, examine, verdict
from advplug.keys import digest
from advplug.matrix import Sweep, like
from advplug.plans import Bound
from advplug.poisons.evidence import PoisonEvidence
from advplug.poisons.plans import PoisonPlan
from advplug.poisons.plans import reported as poisonings_of
from advplug.results import AuditCost, Cell, Certificate, Poisoning, RunInfo, RunResult, ThreatRow
from advplug.similarities import Similarities


@dataclass(frozen=True)
class Stored:
    """How the assembly reads the store: by the keys of cells, groups, victims, certificates and attacks on training
    data."""

    cell: Callable[[str], Cell | None]
    evidence: Callable[[str], Evidence | None]
    audit: Callable[[str], Audit | None]
    batch_dependent: Callable[[str], bool | None]
    certificate: Callable[[str], tuple[Certificate, Proofs | None] | None] = lambda _: None
    poisoning: Callable[[str], tuple[Poisoning, PoisonEvidence | None] | None] = lambda _: None


def finding(sweep: Sweep, evidence: Evidence) -> Finding:
    caps: AttackCaps = sweep.attack.caps
    if sweep.attack.params.get("transforms"):
        # Its iterates are judged as the transformations leave them, the image that it returns as it is.
        evidence = replace(evidence, any_iterate=None)
    draws = sweep.attack.params.get("draws")
    return Finding(
        sweep.attack.label,
        strength_of(sweep.attack),
        caps.access is Access.GRADIENT,
        evidence,
        draws if isinstance(draws, int) else 1,
    )


def group_key(members: Iterable[tuple[Sweep, Fraction]]) -> str:
    """Names a group with the attacks in it: what the audit saw of them holds for no others."""
    members = list(members)
    keys = sorted({sweep.cell_key(eps) for sweep, eps in members})
    return digest({"group": keys, "threat": sorted({sweep.threat_key(eps) for sweep, eps in members})})


EFFORT = ("steps", "queries", "n_targets", "targets")
"""Parameters that say how hard an attack tries."""


def strength_of(attack: Bound) -> Strength:
    """What the attack proves as it was asked for: trying less than its default it is no strong one."""
    declared: Strength = attack.caps.strength
    if attack.entry is None:
        return declared
    if attack.params.get("steps") == 1:
        return min(declared, Strength.ONE_STEP)
    usual = {p.name: p.default for p in attack.entry.params()}
    weakened = any(_less(attack.params.get(name), usual.get(name)) for name in EFFORT)
    return min(declared, Strength.ITERATIVE) if weakened else declared


def _less(given: object, usual: object) -> bool:
    return isinstance(given, int) and isinstance(usual, int) and given < usual


def identity(sweep: Sweep, eps: Fraction) -> dict[str, object]:
    """The columns that name a cell."""
    victim = sweep.victim
    return {
        "dataset": victim.dataset.label,
        "model": victim.model.label,
        "defense": victim.defense_label,
        "norm": sweep.norm,
        "eps": str(eps),
        "goal": str(sweep.goal),
        "seed": victim.seed,
        "shape": sweep.shape,
    }


def assemble(
    sweeps: Sequence[Sweep],
    stored: Stored,
    info: RunInfo,
    certificates: Sequence[CertificatePlan] = (),
    poisonings: Sequence[PoisonPlan] = (),
) -> RunResult:
    """The run's result from what is stored; what was never reached is left out."""
    # Two sweeps that begin with the same budgets share a cell.
    asked: dict[str, tuple[Sweep, Fraction]] = {}
    for sweep in sweeps:
        for eps in sweep.budgets:
            asked.setdefault(sweep.cell_key(eps), (sweep, eps))
    cells = [(sweep, eps, stored.cell(key)) for key, (sweep, eps) in asked.items()]
    groups: dict[str, list[tuple[Sweep, Fraction]]] = {}
    for sweep, eps, cell in cells:
        if cell is not None and cell.status != "refused":
            groups.setdefault(sweep.threat_key(eps), []).append((sweep, eps))
    baselines = _Baselines(groups, stored)
    proven = {p.victim.key: _Proven(p, *found) for p in certificates if (found := stored.certificate(p.key))}
    rows = []
    for members in groups.values():
        proofs = proven.get(members[0][0].victim.key)
        rows.append(_threat_row(members, stored, baselines, proofs))
        if proofs is not None:
            proofs.note(*members[0], rows[-1])
    made = tuple(p.reported() for p in proven.values())
    shown = tuple(_relabelled(s, eps, c) for s, eps, c in cells if c is not None)
    return RunResult(info, shown, tuple(rows), made, poisonings_of(poisonings, stored.poisoning))


@dataclass
class _Proven:
    """A victim's certificate, beside the worst cases that attacks found in its norm."""

    plan: CertificatePlan
    made: Certificate
    proofs: Proofs | None
    worst: dict[Fraction, Estimate | None] = field(default_factory=dict)

    def at(self, sweep: Sweep, eps: Fraction) -> Array | None:
        """(n,) bool: proven right at this budget; None where the certificate does not cover the threat."""
        covers = self.proofs is not None and sweep.norm == self.plan.norm
        return self.proofs.at(float(eps)) if covers and self.proofs is not None else None

    def note(self, sweep: Sweep, eps: Fraction, row: ThreatRow) -> None:
        if sweep.norm == self.plan.norm and isinstance(sweep.goal, Untargeted):
            self.worst[eps] = row.worst_case_accuracy

    def reported(self) -> Certificate:
        return reported(self.plan, self.made, self.proofs, self.worst)


def _relabelled(sweep: Sweep, eps: Fraction, cell: Cell) -> Cell:
    """A cell stored under another spelling of the same recipe appears as this run spelled it."""
    return replace(cell, attack=sweep.attack.label, **identity(sweep, eps))  # type: ignore[arg-type]


_Observed = tuple[Sweep, Fraction, Finding]
"""A member of a group of which something was observed."""


def _observed(members: Iterable[tuple[Sweep, Fraction]], stored: Stored) -> list[_Observed]:
    found = []
    for sweep, eps in members:
        evidence = stored.evidence(sweep.cell_key(eps))
        if evidence is not None:
            found.append((sweep, eps, finding(sweep, evidence)))
    return found


def _worst(findings: Sequence[Finding]) -> Array | None:
    bits = [robust for f in findings for robust in f.evidence.robust_by_origin()]
    return worst_case(bits) if bits else None


@dataclass(frozen=True)
class _Baselines:
    """What attacks did to the undefended victim under the same threat."""

    groups: dict[str, list[tuple[Sweep, Fraction]]]
    stored: Stored

    met: dict[str, dict[str, Finding]] = field(default_factory=dict)

    def shared(self, observed: Sequence[_Observed]) -> tuple[list[Finding], list[Finding]]:
        """The findings of attacks that met both, on the defended and on the undefended victim: a difference of
        worst cases over different attacks says nothing of the defense."""
        if not observed or not observed[0][0].victim.defense:
            return [], []
        sweep, eps, _ = observed[0]
        group = replace(sweep, victim=sweep.victim.baseline).threat_key(eps)
        if group not in self.met:
            self.met[group] = _by_attack(_observed(self.groups.get(group, []), self.stored))
        ours, theirs = _by_attack(observed), self.met[group]
        both = [key for key in ours if key in theirs]
        return [ours[key] for key in both], [theirs[key] for key in both]


def _by_attack(observed: Iterable[_Observed]) -> dict[str, Finding]:
    """By what makes it the same attack, whatever the victim."""
    return {like(sweep, sweep.victim.baseline, False): found for sweep, _, found in observed}


def _threat_row(
    members: list[tuple[Sweep, Fraction]], stored: Stored, baselines: _Baselines, proven: _Proven | None
) -> ThreatRow:
    sweep, eps = members[0]
    observed = _observed(members, stored)
    findings = [found for _, _, found in observed]
    dependent = stored.batch_dependent(sweep.victim.key)
    worst = _worst(findings)
    audit = stored.audit(group_key((member, at) for member, at, _ in observed))
    minimised = any(f.evidence.minimised for f in findings)
    ours, theirs = baselines.shared(observed)
    similar = Similarities.of(findings, ours, theirs) if minimised else None
    group = Group(
        findings,
        audit,
        dependent,
        defended=bool(sweep.victim.defense),
        complete=len(findings) == len(members),
        targeted=isinstance(sweep.goal, Targeted),
        difference=similar.difference if similar else _difference(_worst(ours), _worst(theirs)),
        certified=proven.at(sweep, eps) if proven else None,
        proof_error=proven.proofs.error if proven and proven.proofs else 0.0,
    )
    flags, unchecked = examine(group) if findings else ((), ())
    return ThreatRow(
        **identity(sweep, eps),  # type: ignore[arg-type]
        attacks=tuple(f.attack for f in findings),
        clean_accuracy=share(findings[0].evidence.clean) if findings else None,
        worst_case_accuracy=None if worst is None or minimised else share(worst),
        difference_to_baseline=group.difference,
        verdict=verdict(group, flags, unchecked),
        flags=flags,
        unchecked=unchecked,
        audit=None if audit is None else AuditCost(audit.level, len(audit.rows), audit.forward, audit.backward),
        **({} if similar is None else similar.columns()),  # type: ignore[arg-type]
    )


def _difference(ours: Array | None, theirs: Array | None) -> Estimate | None:
    if ours is None or theirs is None:
        return None
    return paired_difference(np.asarray(ours.mean(axis=1)), np.asarray(theirs.mean(axis=1)))
