"""Calls an attack on one chunk of images and checks what it returns before anything is clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from advplug.ball import project
from advplug.contracts import Ball, Batch, Crafted, EvasionAttack, MinimumNorm, Targeted, Threat
from advplug.decisions import Batching
from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.evidence import Array
from advplug.isolation import isolated
from advplug.perturbations import beyond
from advplug.rng import Stream
from advplug.victim import Victim


def targets(goal: Targeted, batch: Batch, least_likely: Array, victim: Victim, stream: Stream) -> Tensor:
    """The target class (B,) of each image; `least_likely` (B,) are the clean images' smallest scores.

    Raises UsageError for a text that is none of the victim's.
    """
    y, classes = batch.y, victim.classes
    if goal.to == "next":
        return (y + 1) % classes
    if goal.to == "least-likely":
        return torch.from_numpy(least_likely).to(y.device)
    if goal.to == "random":
        shift = stream.per_image(lambda g: torch.randint(1, classes, (), generator=g), batch.index, "target")
        return (y + shift.to(y.device)) % classes
    return torch.full_like(y, goal.to if isinstance(goal.to, int) else _class_of(goal.to, victim))


def _class_of(text: str, victim: Victim) -> int:
    texts = () if victim.columns is None else victim.columns.texts
    if victim.columns is None or text not in texts:
        raise UsageError(f"target '{text}' is none of the {len(texts)} captions that are evaluated")
    return int(victim.columns.group[texts.index(text)])


def craft(
    attack: EvasionAttack,
    victim: Victim,
    batch: Batch,
    threat: Threat,
    stream: Stream,
    batching: Batching,
    label: str,
) -> Crafted:
    """Calls the attack with everything it might disturb put back afterwards. Raises CellFailure."""

    def work(size: int) -> Crafted:
        victim.batch_size = size
        return attack(victim, batch, threat, stream)

    try:
        with isolated(victim.module, stream):
            crafted = batching.run(work)
    except (AdvplugError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever an attack raises is the failure of its cell only
        raise CellFailure(f"{label} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    x = crafted.x
    if not isinstance(x, Tensor) or x.shape != batch.x.shape:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise CellFailure(f"{label} returned {shape}, expected images of shape {tuple(batch.x.shape)}")
    bad = int((~x.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise CellFailure(f"{label} returned NaN or infinite pixels in {bad} of {len(x)} images")
    return Crafted(x.detach().to(batch.x), crafted.trace, crafted.applied)


def checked(crafted: Crafted, batch: Batch, threat: Threat) -> tuple[Tensor, int, float]:
    """The images inside the perturbation set, how many lay outside, and by how much at most.

    Those outside a norm ball are projected into it; other sets have no nearest point, and the clean image stands
    in for what left them.
    """
    allowed, x_adv = threat.perturbation, crafted.x
    outside = ~allowed.check(batch.x, x_adv, crafted.applied)
    worst = 0.0
    if outside.any():
        worst = float(beyond(allowed, batch.x, x_adv, crafted.applied)[outside].max())
        ball = isinstance(allowed, Ball) and not isinstance(allowed, MinimumNorm)
        instead = project(batch.x, x_adv, allowed.norm, threat.eps) if ball else batch.x
        x_adv = torch.where(outside[:, None, None, None], instead, x_adv)
    return x_adv.clamp(0, 1), int(outside.sum()), worst
