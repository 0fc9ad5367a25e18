"""Calls an attack on one chunk of images and checks what it returns before anything is clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from advplug.ball import project
from advplug.contracts import Batch, EvasionAttack, Targeted, Threat, Trace
from advplug.decisions import Batching
from advplug.errors import AdvplugError, CellFailure
from advplug.evidence import Array
from advplug.isolation import isolated
from advplug.rng import Stream
from advplug.victim import Victim


def targets(goal: Targeted, batch: Batch, least_likely: Array, classes: int, stream: Stream) -> Tensor:
    """The target class (B,) of each image; `least_likely` (B,) are the clean images' smallest scores."""
    y = batch.y
    if goal.to == "next":
        return (y + 1) % classes
    if goal.to == "least-likely":
        return torch.from_numpy(least_likely).to(y.device)
    if goal.to == "random":
        shift = stream.per_image(lambda g: torch.randint(1, classes, (), generator=g), batch.index, "target")
        return (y + shift.to(y.device)) % classes
    return torch.full_like(y, int(goal.to))


def craft(
    attack: EvasionAttack,
    victim: Victim,
    batch: Batch,
    threat: Threat,
    stream: Stream,
    batching: Batching,
    label: str,
) -> tuple[Tensor, Trace | None]:
    """Calls the attack with everything it might disturb put back afterwards. Raises CellFailure."""

    def work(size: int) -> tuple[Tensor, Trace | None]:
        victim.batch_size = size
        crafted = attack(victim, batch, threat, stream)
        return crafted.x, crafted.trace

    try:
        with isolated(victim.module, stream):
            x, trace = batching.run(work)
    except (AdvplugError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever an attack raises is the failure of its cell only
        raise CellFailure(f"{label} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(x, Tensor) or x.shape != batch.x.shape:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise CellFailure(f"{label} returned {shape}, expected images of shape {tuple(batch.x.shape)}")
    bad = int((~x.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise CellFailure(f"{label} returned NaN or infinite pixels in {bad} of {len(x)} images")
    return x.detach().to(batch.x), trace


def checked(x_adv: Tensor, batch: Batch, threat: Threat) -> tuple[Tensor, int, float]:
    """The images projected into the perturbation set, how many lay outside, and by how much at most."""
    ball = threat.perturbation
    outside = ~ball.check(batch.x, x_adv)
    worst = 0.0
    if outside.any():
        excess = ball.measure(batch.x, x_adv) - threat.eps
        beyond = torch.stack([-x_adv.flatten(1).amin(1), x_adv.flatten(1).amax(1) - 1, excess]).amax(0)
        worst = float(beyond[outside].max())
        x_adv = torch.where(outside[:, None, None, None], project(batch.x, x_adv, ball.norm, threat.eps), x_adv)
    return x_adv.clamp(0, 1), int(outside.sum()), worst
