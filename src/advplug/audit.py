"""The audit of a group: a look at the victim, and cheap probes on a few images, whatever attacks the group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch

from advplug.attacks.aims import SIMILARITY
from advplug.attacks.engine import GradientAttack
from advplug.attacks.square import Square
from advplug.build import Built
from advplug.builtin.gradient import apgd, fgsm, pgd
from advplug.builtin.noise import noise
from advplug.contracts import (
    Access,
    Ball,
    Batch,
    EvasionAttack,
    Goal,
    Gradient,
    Minimise,
    Norm,
    Strength,
    Targeted,
    Threat,
)
from advplug.craft import checked, craft, targets
from advplug.decisions import CHUNK, Batching, Clean, cosines, draws_of, succeeds
from advplug.evidence import Array
from advplug.health.attacks import QUERIES
from advplug.health.facts import ALL, CHOICE, REPORT, Audit, Finding, broken
from advplug.health.gradients import SHARE_SATURATED
from advplug.inspection import inspect
from advplug.plans import Bound
from advplug.rng import Stream
from advplug.stored.columns import packed, unpacked
from advplug.victim import span

AuditLevel = Literal["none", "quick", "full"]
QUICK = 64
"""Images of the quick audit."""
PGD_STEPS = 100
"""The quick audit takes at most as many passes an image as PGD with so many steps."""
COLD_STEPS = 10
UNBOUNDED = Fraction(1, 2)


@dataclass(frozen=True)
class Member:
    """An attack of the group and what it found."""

    attack: Bound
    finding: Finding


def run_audit(
    built: Built,
    clean: Clean,
    threat: tuple[Norm, Fraction, Goal],
    members: Sequence[Member],
    level: AuditLevel,
    batching: Batching,
) -> Audit:
    """The audit of `members`, all under the same `threat` (norm, eps, goal).

    A quick one looks at 64 images that are right without attack, and makes at most 101 forward and 100 backward
    passes of them, times the views of a defense and the draws of a randomised one. A full one looks at all, runs
    random search beside, and has no limit. Raises CellFailure where the victim does.
    """
    right = clean.right.mean(axis=1) >= 0.5
    rows = np.flatnonzero(right)
    rows, first = (rows, len(right)) if level == "full" else (rows[:QUICK], min(QUICK, len(right)))
    victim = built.victim
    before = replace(victim.passes)
    declared = Audit(
        rows,
        gradient=str(victim.gradient),
        stochastic=victim.stochastic,
        draws=victim.draws,
        rejects=victim.rejects,
        level=level,
    )
    if not len(rows):
        return declared
    seen = vars(inspect(built, rows, first, batching))
    probes = _Probes(built, clean, threat, rows, batching)
    found = probes.short(seen["saturated"], declared.rejects)
    if level == "full" and threat[0] in ("linf", "l2") and not isinstance(threat[2], Minimise):
        found["black_box"] = probes.run(Square(QUERIES), "square")
    spent = victim.passes.forward - before.forward
    allowed = None if level == "full" else PGD_STEPS * QUICK * probes.unit - spent
    found |= probes.longer(members, allowed)
    found |= {"forward": victim.passes.forward - before.forward, "backward": victim.passes.backward - before.backward}
    return replace(declared, **seen, **found)


@dataclass
class _Probes:
    """Attacks on the images at `rows` of one victim under one threat."""

    built: Built
    clean: Clean
    threat: tuple[Norm, Fraction, Goal]
    rows: Array
    batching: Batching

    @property
    def unit(self) -> int:
        """Passes that one step of a gradient attack takes an image."""
        victim = self.built.victim
        return victim.views * max(victim.draws, draws_of(victim) if victim.stochastic else 1)

    def short(self, saturated: Array, rejects: bool) -> dict[str, Any]:
        """Noise, one step, PGD of few steps at several budgets; what has no meaning here is left out."""
        norm, eps, goal = self.threat
        found = {"noise": self.run(noise(), "noise")}
        if self.built.victim.gradient is Gradient.NONE:
            return found
        found["one_step"] = self.run(fgsm(), "one_step")
        cold = pgd(steps=COLD_STEPS)
        found["cold_half"] = self.run(cold, "cold_half", Ball(norm, eps / 2))
        found["cold_full"] = self.run(cold, "cold_full")
        if isinstance(goal, Minimise):
            return found
        if not (isinstance(goal, Targeted) or rejects):
            # In another norm eps is no distance in L-inf.
            reach = max(UNBOUNDED, eps) if norm == "linf" else UNBOUNDED
            found["unbounded"] = self.run(cold, "unbounded", Ball("linf", reach))
        if saturated.mean() >= SHARE_SATURATED:
            found["margin"] = self.run(pgd(steps=COLD_STEPS, loss="margin"), "margin")
        return found

    def longer(self, members: Sequence[Member], allowed: int | None) -> dict[str, Any]:
        """Twice the steps of the strongest iterative attack, on as many survivors as `allowed` passes reach."""
        iterative = [m for m in members if m.finding.gradient and m.finding.strength >= Strength.ITERATIVE]
        iterative = [m for m in iterative if not m.attack.caps.minimum_norm]
        if self.built.victim.gradient is Gradient.NONE or not iterative:
            return {}
        best = max(iterative, key=lambda m: (m.finding.strength, _steps(m.attack)))
        attack, steps, runs = _doubled(best.attack, self.threat[0])
        findings = [m.finding for m in members]
        lowers = isinstance(self.threat[2], Minimise)
        left = np.arange(len(self.rows)) if lowers else np.flatnonzero(~broken(findings, self.rows, CHOICE))
        if allowed is not None:
            left = left[: self._reach(allowed // ((runs * (steps + 1) + 1) * self.unit), len(left))]
        probed = np.zeros(len(self.rows), dtype=bool)
        longer: Array = np.zeros(len(self.rows), dtype=np.float32 if lowers else bool)
        probed[left] = True
        if len(left):
            # As often as the attack that it is held against was looked at again, or one of them would win by the count.
            half = REPORT if draws_of(self.built.victim) > 1 else ALL
            longer[left] = replace(self, rows=self.rows[left]).run(attack, "longer", draws=half)
        return {"probed": probed, "longer": longer, "longer_steps": steps}

    def _reach(self, passes: int, most: int) -> int:
        """As many images, at most `most`, as so many passes hold, those included that only fill up a batch."""
        size = max(1, self.built.victim.batch_size)
        return max((n for n in range(1, most + 1) if span(n, size) <= passes), default=0)

    def run(self, attack: EvasionAttack, name: str, ball: Ball | None = None, draws: slice = ALL) -> Array:
        """(m,) bool: which of the images the attack breaks, by majority of these of the draws; where similarities are
        minimised, those that it leaves."""
        norm, eps, goal = self.threat
        lowers = isinstance(goal, Minimise)
        if lowers and isinstance(attack, GradientAttack):
            attack = replace(attack, loss=SIMILARITY)
        victim, stream = self.built.victim, Stream(self.built.seed, f"audit/{name}")
        threat, found = Threat(ball or Ball(norm, eps), goal, Access.GRADIENT), []
        for start in range(0, len(self.rows), CHUNK):
            part = self.rows[start : start + CHUNK]
            batch = self.built.split.batch(part, victim.device)
            mask = np.ones(len(part), dtype=bool)
            if isinstance(goal, Targeted):
                least = self.clean.least_likely[part]
                wanted = targets(goal, batch, least, victim, Stream(self.built.seed, "targets"))
                batch = Batch(batch.x, batch.y, batch.index, wanted)
                mask = (wanted != batch.y).cpu().numpy()
            success: Array = np.zeros(len(part), dtype=bool)
            if mask.any():
                todo = batch.take(torch.from_numpy(mask).to(batch.y.device))
                victim.reseed("audit", name, start)
                made = craft(attack, victim, todo, threat, stream, self.batching, f"audit probe '{name}'")
                x, _, _ = checked(made, todo, threat)
                if lowers and victim.columns is not None:
                    each = torch.from_numpy(cosines(victim, x, self.batching)).to(victim.device)
                    success = victim.columns.similarity(each, todo.y).cpu().numpy()
                else:
                    hits = succeeds(victim, x, todo, self.batching, draws_of(victim))[:, draws]
                    success[mask] = hits.mean(axis=1) > 0.5
            found.append(success)
        return np.concatenate(found)


def _steps(attack: Bound) -> int:
    steps = attack.params.get("steps")
    return steps if isinstance(steps, int) else PGD_STEPS // 2


def _doubled(attack: Bound, norm: Norm) -> tuple[EvasionAttack, int, int]:
    """(an attack of twice the steps, its steps, its runs an image).

    The engine's own are run as they were asked for; in place of one of many parts, or of another library, stands
    APGD, or PGD where there is none.
    """
    steps = 2 * _steps(attack)
    if attack.entry is not None and not attack.needs and "steps" in attack.params:
        made = attack.entry.make({**attack.params, "steps": steps})
        if isinstance(made, GradientAttack) and not made.n_targets:
            return made, steps, made.restarts
    general = apgd(steps) if norm in ("linf", "l2") else pgd(steps)
    return general, steps, 1


def to_bytes(audit: Audit) -> bytes:
    return packed(audit)


def from_bytes(data: bytes) -> Audit:
    return unpacked(Audit, data)
