"""Runs one sweep, stage after stage: victim, attack, check of the perturbation, decision, evidence.

The only module that knows the order. The engine decides what succeeded, never the attack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advplug.allocator import release_freed_memory
from advplug.attacks.cascade import transferable
from advplug.ball import columns
from advplug.build import Built
from advplug.contracts import (
    Ball,
    Batch,
    EvasionAttack,
    Minimise,
    MinimumNorm,
    Norm,
    Perturbation,
    Targeted,
    Threat,
    Trace,
)
from advplug.craft import checked, craft, targets
from advplug.decisions import CHUNK, Batching, Clean, cosines, draws_of, round_to_8_bits, succeeds, succeeds_in_8_bits
from advplug.errors import CellFailure
from advplug.evidence import Array, Evidence, joined
from advplug.matrix import Sweep
from advplug.perturbations import perturbation
from advplug.rng import Stream
from advplug.stored.crafted import CraftedWriter
from advplug.stored.samples import MOST, Sample, sampled
from advplug.victim import Victim


@dataclass
class Timing:
    attack: float = 0.0
    decide: float = 0.0
    forward: int = 0
    backward: int = 0
    model: int = 0


@dataclass
class SweepResult:
    """Evidence by budget, with the attack's own cost and a few images to look at."""

    evidence: dict[Fraction, Evidence]
    timing: dict[Fraction, Timing]
    notes: list[str] = field(default_factory=list)
    samples: dict[Fraction, Sample] = field(default_factory=dict)


@dataclass
class _Chunk:
    """One chunk of images with what is known of it before the attack; `todo` are those to attack: where a score is
    minimised, all."""

    batch: Batch
    attacked: Array
    rows: slice
    minimises: bool = False

    @property
    def todo(self) -> Array:
        return np.ones_like(self.attacked) if self.minimises else self.attacked


def _chunks(built: Built, clean: Clean, sweep: Sweep) -> Iterator[_Chunk]:
    """Chunks with targets set; `attacked` are the images right without attack and not the target already."""
    stream = Stream(sweep.victim.seed, "targets")
    start = 0
    for batch in built.split.batches(CHUNK, built.victim.device):
        rows = slice(start, start + len(batch))
        start += len(batch)
        # A randomised victim that is right now and then has that to lose, too.
        attacked: Array = np.any(clean.right[rows], axis=1)
        if isinstance(sweep.goal, Targeted):
            wanted = targets(sweep.goal, batch, clean.least_likely[rows], built.victim, stream)
            batch = Batch(batch.x, batch.y, batch.index, wanted, text=batch.text)
            attacked &= (wanted != batch.y).cpu().numpy()
        yield _Chunk(batch, attacked, rows, isinstance(sweep.goal, Minimise))


@dataclass
class _AtBudget:
    """What one chunk gave at one budget."""

    x: Tensor
    success: Array
    trace: Mapping[str, Any]
    violations: int
    worst_violation: float
    found: Array | None = None


def run_sweep(
    sweep: Sweep,
    built: Built,
    clean: Clean,
    attack: EvasionAttack,
    batching: Batching,
    static: Callable[[Fraction, int, int], Tensor] | None = None,
    keep: CraftedWriter | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> SweepResult:
    """All budgets of `sweep`. `static` gives images crafted on the baseline, `keep` stores the crafted ones. `progress`
    is told the number of images whenever some are attacked at one more budget.

    Raises CellFailure where the attack raises, or returns what is no image.
    """
    victim = built.victim
    parts: dict[Fraction, list[Evidence]] = {eps: [] for eps in sweep.budgets}
    timing = {eps: Timing() for eps in sweep.budgets}
    seen: list[tuple[Batch, Array, dict[Fraction, Tensor]]] = []
    for chunk in _chunks(built, clean, sweep):
        adaptive = _attack_chunk(_Offence(sweep, attack, victim, victim, batching, timing, progress=progress), chunk)
        bare = {}
        lasting = transferable(attack)
        if victim.wraps:
            bare = _attack_chunk(_Offence(sweep, lasting, victim.bare, victim, batching, timing, carries=False), chunk)
        carried_on = adaptive
        if keep is not None and lasting is not attack:
            # For defended victims to be judged on; the cost is theirs, and the same whichever of them there are.
            spent = {eps: Timing() for eps in sweep.budgets}
            carried_on = _attack_chunk(_Offence(sweep, lasting, victim, victim, batching, spent, carries=False), chunk)
        fell: Array | None = None
        for eps, found in adaptive.items():
            clock = time.perf_counter()
            if keep is not None:
                keep.put(eps, chunk.rows.start, carried_on[eps].x)
            carried = static(eps, chunk.rows.start, chunk.rows.stop).to(victim.device) if static else None
            ball = allowed(attack, sweep.norm, eps)
            made = _evidence(victim, chunk, clean, found, bare.get(eps), carried, ball, batching)
            if made.static is not None and made.draws == 1 and not chunk.minimises:
                # An image that was shown at a smaller budget may be shown at this one.
                fell = made.static if fell is None else made.static | fell
                made = replace(made, static=fell)
            parts[eps].append(made)
            timing[eps].decide += time.perf_counter() - clock
        if not seen:
            first = {eps: found.x[:MOST].clone() for eps, found in adaptive.items()}
            seen.append((chunk.batch.take(torch.arange(min(MOST, len(chunk.batch)))), chunk.todo[:MOST], first))
        release_freed_memory()
    if keep is not None:
        keep.finish()
    evidence = {eps: joined(found) for eps, found in parts.items()}
    told = {
        "minimised": int(isinstance(sweep.goal, Minimise)),
        "capped": int(isinstance(sweep.goal, Targeted) or victim.rejects),
    }
    evidence = {eps: replace(found, **told) for eps, found in evidence.items()}  # type: ignore[arg-type]
    # After all else, so that a randomised victim decides as it would have without.
    samples = sampled(victim, *seen[0], batching) if seen else {}
    return SweepResult(evidence, timing, list(batching.notes), samples)


def allowed(attack: EvasionAttack, norm: Norm, eps: Fraction) -> Perturbation:
    """The set of changes at one budget: the attack's own where it has one, otherwise the one of that name."""
    own: Callable[[Norm, Fraction], Perturbation] | None = getattr(attack, "perturbation", None)
    return own(norm, eps) if own else perturbation(norm, eps)


@dataclass
class _Offence:
    """One attack on `attacked`, in whose name `judge` decides what succeeded.

    `carries`: what is broken at one budget is not attacked at larger ones.
    """

    sweep: Sweep
    attack: EvasionAttack
    attacked: Victim
    judge: Victim
    batching: Batching
    timing: dict[Fraction, Timing]
    carries: bool = True
    progress: Callable[[int], None] = lambda _: None

    def threat(self, allowed: Perturbation) -> Threat:
        return Threat(allowed, self.sweep.goal, self.sweep.attack.caps.access)

    def strike(self, part: Batch, threat: Threat, first: int, timing: Timing) -> _Struck:
        """One call of the attack, with the randomness of both victims set; its images checked and decided."""
        before = replace(self.attacked.passes)
        for v in {id(v): v for v in (self.attacked, self.judge)}.values():
            v.reseed(self.sweep.cell_key(threat.perturbation.eps), first)
        stream = Stream(self.sweep.victim.seed, f"attack/{self.sweep.attack.recipe['name']}")
        clock = time.perf_counter()
        made = craft(self.attack, self.attacked, part, threat, stream, self.batching, self.sweep.attack.label)
        crafted = time.perf_counter()
        x, violations, worst = checked(made, part, threat)
        timing.forward += self.attacked.passes.forward - before.forward
        timing.backward += self.attacked.passes.backward - before.backward
        timing.model += self.attacked.passes.model - before.model
        success = succeeds(self.judge, x, part, self.batching, draws_of(self.judge))
        timing.attack += crafted - clock
        timing.decide += time.perf_counter() - crafted
        return _Struck(x, success, made.trace, violations, worst)


@dataclass
class _Struck:
    """Images as judged: `success` is (m, draws)."""

    x: Tensor
    success: Array
    trace: Trace | None
    violations: int
    worst: float


def _attack_chunk(offence: _Offence, chunk: _Chunk) -> dict[Fraction, _AtBudget]:
    """The chunk at each budget, ascending: crafted on the attacked victim, decided by the judge.

    Images broken at one budget are carried to the larger ones; the others start from where they were. What the judge
    fell for at one budget counts at the larger ones, too, where the attack itself does not see the judge.
    """
    sweep, batch, draws = offence.sweep, chunk.batch, draws_of(offence.judge)
    if sweep.attack.caps.minimum_norm:
        return _minimum_norm_chunk(offence, chunk)
    x_adv = batch.x.clone()
    success = np.zeros((len(batch), draws), dtype=bool)
    trace: dict[str, Array] = {}
    results, started = {}, None
    searched: Array = np.zeros(len(batch), dtype=np.int16)
    settled = draws == 1 and not chunk.minimises
    for number, eps in enumerate(sweep.budgets, 1):
        carried = success.all(axis=1) if settled and offence.carries else np.zeros(len(batch), dtype=bool)
        todo = torch.from_numpy(chunk.todo & ~carried)
        violations, worst = 0, 0.0
        if todo.any():
            part = batch.take(todo.to(batch.y.device))
            if sweep.attack.caps.warm_start and started is not None:
                part = replace(part, start=started[todo])
            threat = offence.threat(allowed(offence.attack, sweep.norm, eps))
            struck = offence.strike(part, threat, chunk.rows.start, offence.timing[eps])
            violations, worst = struck.violations, struck.worst
            _merge(trace, struck.trace, todo.numpy())
            started, judged = x_adv.clone(), success.copy()
            started[todo], judged[todo.numpy()] = struck.x, struck.success
            if settled and offence.judge is not offence.attacked:
                lost = torch.from_numpy(success[:, 0] & ~judged[:, 0]).to(x_adv.device)
                x_adv, success = torch.where(columns(lost, x_adv), x_adv, started), success | judged
            else:
                x_adv, success = started, judged
        told = dict(_copied(trace))
        if "black_box" in told:
            now = todo.numpy()
            searched[now] = np.where(told["black_box"][now], number, 0)
            told["black_box"] = searched.copy()
        results[eps] = _AtBudget(x_adv, success, told, violations, worst)
        offence.progress(len(batch))
    return results


def _minimum_norm_chunk(offence: _Offence, chunk: _Chunk) -> dict[Fraction, _AtBudget]:
    """The chunk attacked once; at each budget the changes that are small enough count, its cost is the first's."""
    sweep, batch, todo = offence.sweep, chunk.batch, torch.from_numpy(chunk.attacked)
    threat = offence.threat(MinimumNorm(sweep.norm, sweep.budgets[-1]))
    x_adv = batch.x.clone()
    success = np.zeros((len(batch), draws_of(offence.judge)), dtype=bool)
    trace: dict[str, Array] = {}
    violations, worst = 0, 0.0
    if todo.any():
        part = batch.take(todo.to(batch.y.device))
        struck = offence.strike(part, threat, chunk.rows.start, offence.timing[sweep.budgets[0]])
        success[chunk.attacked] = struck.success
        violations, worst = struck.violations, struck.worst
        x_adv[todo] = struck.x
        _merge(trace, struck.trace, chunk.attacked)
    size = threat.perturbation.measure(batch.x, x_adv).cpu().numpy().astype(np.float64)
    # What is wrong as it is needs no change; how far it, or what is the target already, is from a target says nothing.
    spared = np.nan if isinstance(sweep.goal, Targeted) else 0.0
    found = np.where(chunk.attacked, np.where(success.mean(axis=1) > 0.5, size, np.inf), spared)
    # Whether it ended in success at its own distance says nothing of a budget.
    counts = {name: trace[name] for name in _COUNTS if name in trace}
    results = {}
    for eps in sweep.budgets:
        near = allowed(offence.attack, sweep.norm, eps).check(batch.x, x_adv)
        kept = torch.where(near[:, None, None, None], x_adv, batch.x)
        hit = success & near.cpu().numpy()[:, None]
        results[eps] = _AtBudget(kept, hit, dict(_copied(counts)), violations, worst, found)
        offence.progress(len(batch))
    return results


def _evidence(
    victim: Victim,
    chunk: _Chunk,
    clean: Clean,
    found: _AtBudget,
    bare: _AtBudget | None,
    static: Tensor | None,
    ball: Perturbation,
    batching: Batching,
) -> Evidence:
    batch, draws = chunk.batch, draws_of(victim)
    todo = torch.from_numpy(chunk.attacked)
    # Below one level an 8-bit image cannot differ from the clean one.
    rounds = ball.norm != "linf" or ball.eps >= Fraction(1, 255)

    def judged(x: Tensor) -> Array:
        success = np.zeros((len(batch), draws), dtype=bool)
        if todo.any():
            picked = todo.to(x.device)
            success[chunk.attacked] = succeeds(victim, x[picked], batch.take(picked), batching, draws)
        return success

    def rounded() -> Array:
        # What float pixels do not break, 8-bit pixels within the same budget need not be tried on.
        broken = found.success.any(axis=1)
        success = np.zeros((len(batch), draws), dtype=bool)
        if broken.any():
            picked = torch.from_numpy(broken).to(found.x.device)
            part = batch.take(picked)
            success[broken] = succeeds_in_8_bits(victim, found.x[picked], part, ball, batching, draws)
        return success

    similarities = _similarities(victim, chunk, clean, found.x, bare, static, batching)
    if rounds and similarities and chunk.minimises:
        similarities["cosine_rounded"] = cosines(victim, round_to_8_bits(batch.x, found.x), batching)
    if chunk.minimises:
        _demand_finite(similarities)
    return Evidence(
        index=batch.index.cpu().numpy(),
        y=batch.y.cpu().numpy(),
        clean=clean.right[chunk.rows],
        rejected=clean.rejected[chunk.rows] if victim.rejects else None,
        attacked=chunk.attacked,
        adaptive=found.success,
        static=None if static is None else judged(static),
        bare=None if bare is None else bare.success,
        rounded=rounded() if rounds else None,
        linf=Ball("linf", Fraction(1)).measure(batch.x, found.x).cpu().numpy(),
        l2=Ball("l2", Fraction(1)).measure(batch.x, found.x).cpu().numpy(),
        found=found.found,
        violations=found.violations + (bare.violations if bare else 0),
        worst_violation=max(found.worst_violation, bare.worst_violation if bare else 0.0),
        **similarities,
        **found.trace,
    )


def _demand_finite(similarities: Mapping[str, Array]) -> None:
    """Raises CellFailure where what was to be lowered is no number: neither high nor low can be said of it."""
    for name, values in similarities.items():
        if name.startswith("cosine") and (bad := int((~np.isfinite(values)).any(axis=1).sum())):
            raise CellFailure(
                f"the model's similarities to texts are NaN or infinite on {bad} of {len(values)} images; look for an "
                "overflow in its image tower"
            )


def _similarities(
    victim: Victim,
    chunk: _Chunk,
    clean: Clean,
    x: Tensor,
    bare: _AtBudget | None,
    static: Tensor | None,
    batching: Batching,
) -> dict[str, Any]:
    """The cosines with all texts, where the victim's columns are texts; clean ones of images that were left alone."""
    if victim.columns is None or clean.cosines is None:
        return {}
    untouched: Array = clean.cosines[chunk.rows]

    def of(images: Tensor) -> Array:
        made = untouched.copy()
        if chunk.todo.any():
            picked = torch.from_numpy(chunk.todo).to(images.device)
            made[chunk.todo] = cosines(victim, images[picked], batching)
        return made

    found = {
        "own": victim.columns.own(chunk.batch.y).cpu().numpy(),
        "cosine": untouched,
        "cosine_adaptive": of(x),
    }
    if victim.columns.texts:
        found["right"] = victim.columns.right(chunk.batch.y).cpu().numpy()
    if bare is not None:
        found["cosine_bare"] = of(bare.x)
    if static is not None:
        found["cosine_static"] = of(static)
    return found


_COUNTS = ("steps", "zero_gradient", "nonfinite", "queries")
_TRACE = (*_COUNTS, "any_iterate", "final_iterate", "black_box")


def _merge(into: dict[str, Array], trace: Trace | None, todo: Array) -> None:
    """Adds an attack's trace of the images at `todo`: counts add up over budgets, bits are the latest."""
    for name in _TRACE:
        value = None if trace is None else getattr(trace, name)
        if value is None:
            continue
        new = value.cpu().numpy()
        column = into.setdefault(name, np.zeros(len(todo), dtype=new.dtype))
        if name in _COUNTS:
            column[todo] += new
        else:
            column[todo] = new


def _copied(trace: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    return ((name, values.copy()) for name, values in trace.items())
