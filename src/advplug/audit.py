"""The audit of a group: a few cheap probes on a few images, whatever attacks the group holds."""

from __future__ import annotations

import io
from dataclasses import fields
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from advplug.build import Built
from advplug.builtin.gradient import fgsm, pgd
from advplug.builtin.noise import noise
from advplug.contracts import Access, Ball, Batch, EvasionAttack, Goal, Gradient, Norm, Targeted, Threat
from advplug.craft import checked, craft, targets
from advplug.decisions import CHUNK, Batching, Clean, draws_of, succeeds
from advplug.evidence import Array
from advplug.health import Audit
from advplug.rng import Stream

AuditLevel = Literal["none", "quick", "full"]
QUICK = 64
"""Images of the quick audit. Its probes take 41 forward and 21 backward passes on them: less than a PGD-40."""
COLD_STEPS = 10


def run_audit(
    built: Built, clean: Clean, norm: Norm, eps: Fraction, goal: Goal, level: AuditLevel, batching: Batching
) -> Audit:
    """Sign noise (10 draws), one gradient step, and PGD run cold at half and at the full budget."""
    attackable = np.flatnonzero(clean.right.mean(axis=1) >= 0.5)
    rows = attackable if level == "full" else attackable[:QUICK]
    gradient = built.victim.gradient is not Gradient.NONE
    probes: dict[str, tuple[EvasionAttack, Fraction]] = {"noise": (noise(), eps)}
    if gradient:
        probes["one_step"] = (fgsm(), eps)
        cold = pgd(steps=COLD_STEPS)
        probes |= {"cold_half": (cold, eps / 2), "cold_full": (cold, eps)}
    found = {name: _probe(built, clean, rows, Ball(norm, e), goal, attack, batching, name)
             for name, (attack, e) in probes.items()}  # fmt: skip
    return Audit(rows, np.ones(len(rows), dtype=bool), **found)


def _probe(
    built: Built,
    clean: Clean,
    rows: Array,
    ball: Ball,
    goal: Goal,
    attack: EvasionAttack,
    batching: Batching,
    name: str,
) -> Array:
    """(m,) bool: which of the images at `rows` the attack breaks, by majority of the draws."""
    victim, stream = built.victim, Stream(built.seed, f"audit/{name}")
    threat, broken = Threat(ball, goal, Access.GRADIENT), []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        batch = built.split.batch(part, victim.device)
        mask = np.ones(len(part), dtype=bool)
        if isinstance(goal, Targeted):
            wanted = targets(goal, batch, clean.least_likely[part], victim.classes, Stream(built.seed, "targets"))
            batch = Batch(batch.x, batch.y, batch.index, wanted)
            mask = (wanted != batch.y).cpu().numpy()
        success = np.zeros(len(part), dtype=bool)
        if mask.any():
            todo = batch.take(torch.from_numpy(mask).to(batch.y.device))
            victim.reseed("audit", name, start)
            made = craft(attack, victim, todo, threat, stream, batching, f"audit probe '{name}'")
            x, _, _ = checked(made, todo, threat)
            success[mask] = succeeds(victim, x, todo, batching, draws_of(victim)).mean(axis=1) > 0.5
        broken.append(success)
    return np.concatenate(broken) if broken else np.zeros(0, dtype=bool)


def is_batch_dependent(built: Built, batching: Batching) -> bool | None:
    """Whether an image's logits change with its neighbours: f(x)[i] against f(x[i]) on 8 images, beyond float noise.

    None where only one image passes at a time, and nothing can be seen.
    """
    return batching.run(lambda size: _is_batch_dependent(built, min(8, size)))


def _is_batch_dependent(built: Built, count: int) -> bool | None:
    if min(count, len(built.split)) < 2:
        return None
    # Two draws of a randomised wrap differ by themselves: there the model inside is looked at.
    victim = built.victim.bare if built.victim.stochastic else built.victim
    x = built.split.batch(np.arange(min(count, len(built.split))), built.victim.device).x
    with victim.frozen():
        together = victim.logits(x)
        alone = torch.cat([victim.logits(x[i : i + 1]) for i in range(len(x))])
    scale = together.abs().amax().clamp_min(1e-6)
    return bool(((together - alone).abs().amax() / scale) > 1e-3)


def to_bytes(audit: Audit) -> bytes:
    buffer = io.BytesIO()
    arrays = {f.name: getattr(audit, f.name) for f in fields(audit)}
    np.savez_compressed(buffer, **{k: v for k, v in arrays.items() if v is not None})
    return buffer.getvalue()


def from_bytes(data: bytes) -> Audit:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return Audit(**{k: archive[k] for k in archive.files})
