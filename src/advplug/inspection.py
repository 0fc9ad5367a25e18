"""What can be seen of a victim without attacking it: chance, neighbours, probabilities, pixel scale, derivatives."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from advplug.build import Built
from advplug.decisions import Batching, out_of_memory
from advplug.evidence import Array
from advplug.rng import Stream
from advplug.victim import Victim, input_gradient

log = logging.getLogger(__name__)

REPEATS = 5
"""Passes of the same images that have to agree, as in AutoAttack's check."""
DIRECTIONS = 32
"""Images whose gradient is compared with finite differences."""
STEPS = (1e-6, 1e-8)
"""Pixels a finite difference reaches to each side, the better of which counts: the longer is less rounded, the shorter
rarely meets a kink of a rectifier or a pool."""
ROUNDED = 1e-14
"""What float64 rounding may add to a mixture of logits, as a share of it."""
PROBABLE = 1e-5


@dataclass(frozen=True)
class Seen:
    """The part of `health.Audit` that needs no attack; see there."""

    spread: float | None
    attacked_spread: float | None
    probabilities: bool
    saturated: Array
    plain: Array
    normalised: Array | None
    mismatch: Array | None


def inspect(built: Built, rows: Array, first: int, batching: Batching) -> Seen:
    """Looks at the images `rows` (m,), all right, and at the first `first` ones where it matters which are right.

    About 8 passes of `rows`, and 4 of `first`.
    """
    victim = built.victim

    def work(size: int) -> Seen:
        x, y = _images(built, rows)
        with victim.frozen():
            parts = list(zip(torch.split(x, size), torch.split(y, size), strict=True))
            spread = None if victim.stochastic else max((_spread(victim, p) for p, _ in parts), default=0.0)
            drawn = max(_attacked_spread(victim, p) for p, _ in parts) if victim.stochastic and parts else None
            views = [[_attacked(victim, p, view) for p, _ in parts] for view in range(victim.views)]
            saturated = torch.cat([_certain(z, label) for z, (_, label) in zip(views[0], parts, strict=True)])
            plain, normalised = _scales(victim, *_images(built, np.arange(first)), size)
        certain = all(_are_probabilities(z) for view in views for z in view)
        mismatch = derivative_errors(victim, x[:DIRECTIONS], Stream(built.seed, "audit/derivative"), size)
        return Seen(spread, drawn, certain, saturated.cpu().numpy(), plain, normalised, mismatch)

    victim.reseed("audit", "inspection")
    return batching.run(work)


def _images(built: Built, rows: Array) -> tuple[Tensor, Tensor]:
    batch = built.split.batch(rows, built.victim.device)
    return batch.x, batch.y


def _attacked(victim: Victim, x: Tensor, view: int) -> Tensor:
    with torch.no_grad():
        return victim.attacked(x, view)


def _spread(victim: Victim, x: Tensor) -> float:
    """The largest distance between the unit-normalised logits of repeated passes."""
    return _apart(torch.stack([victim.logits(x) for _ in range(REPEATS)]))


def _attacked_spread(victim: Victim, x: Tensor) -> float:
    """The same of what attackers differentiate, in any view; two passes tell whether it is drawn."""
    return max(_apart(torch.stack([_attacked(victim, x, view) for _ in range(2)])) for view in range(victim.views))


def _apart(passes: Tensor) -> float:
    passes = passes.nan_to_num()
    unit = passes / passes.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return float((unit[:, None] - unit[None]).norm(dim=3).max())


def _certain(logits: Tensor, y: Tensor) -> Tensor:
    """(B,): the label's probability is 1 in the logits' own precision, so that cross-entropy hardly has a gradient."""
    return logits.softmax(1).gather(1, y[:, None]).squeeze(1) == 1


def _are_probabilities(logits: Tensor) -> bool:
    low, high = float(logits.min()), float(logits.max())
    sums = bool(((logits.sum(1) - 1).abs() < PROBABLE).all())
    return low > -PROBABLE and high < 1 + PROBABLE and sums


def _scales(victim: Victim, x: Tensor, y: Tensor, size: int) -> tuple[Array, Array | None]:
    """(k,), (k,): right on the images as they are, and as the best of three customary scalings makes them.

    None if it takes no other pixels. A defense around the model may clip them: then its baseline shows the fault.
    """

    def right(scaled: Tensor) -> Array:
        labels = torch.cat([victim.logits(part).argmax(1) for part in torch.split(scaled, size)])
        return (labels == y).cpu().numpy()

    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    best: Array | None = None
    for scaled in ((x - mean) / std, (x - 0.5) / 0.5, 255 * x):
        try:
            found = right(scaled)
        except Exception as error:  # a model may refuse what is no pixel, in its own way
            if out_of_memory(error):
                raise
            log.debug("no pixels for this model: %s", error)
            continue
        best = found if best is None or found.sum() > best.sum() else best
    return right(x), best


def derivative_errors(victim: Victim, x: Tensor, stream: Stream, size: int) -> Array | None:
    """(B,): relative errors of autograd's directional derivatives of the attacked logits at points near `x`.

    Each image has a random sign direction, the logits a random mixture; a derivative of exactly 0 on both sides is an
    error of 1. Points are interior and dithered, since pools are tied on flat background and pixels at 0 may be
    clipped. Everything runs in float64, randomised parts with the same draws. None where the model cannot run so,
    or where an image's logits depend on its neighbours.
    """
    if victim.batch_dependent or not len(x):
        return None
    device = torch.device("cpu") if victim.device.type == "mps" else victim.device  # it knows no float64
    try:
        module: nn.Module = copy.deepcopy(victim.module).to(device).double()
        probe = replace(victim, module=module, device=device, run_attack_pass=None)
        with probe.frozen(), torch.enable_grad():
            found = [_errors(probe, part.to(device).double(), stream) for part in torch.split(x, size)]
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        log.info("no finite differences: %s", " ".join(str(error).split()))
        return None
    return torch.cat(found).cpu().numpy()


def _errors(probe: Victim, x: Tensor, stream: Stream) -> Tensor:
    draws = stream.generator("points")
    noise = torch.rand(x.shape, generator=draws, dtype=torch.float64).to(x.device)
    direction = (torch.randint(0, 2, x.shape, generator=draws) * 2 - 1).to(x)
    mixture = torch.randn(probe.classes, generator=draws, dtype=torch.float64).to(x.device)
    point = 0.02 + 0.96 * x + 0.02 * (noise - 0.5)

    def mixed(at: Tensor) -> Tensor:
        probe.reseed("derivative")
        with stream.as_global("derivative"):
            return probe.attacked(at) @ mixture

    point.requires_grad_()
    slope = (input_gradient(mixed(point), point) * direction).flatten(1).sum(1)
    probe.passes.backward += len(x)

    def error(step: float) -> Tensor:
        with torch.no_grad():
            above, below = mixed(point + step * direction), mixed(point - step * direction)
        quotient, level = (above - below) / (2 * step), torch.maximum(above.abs(), below.abs())
        scale = torch.maximum(slope.abs(), quotient.abs())
        # The quotient is off by the rounding of the logits, which is all that is left of it where they saturate.
        beyond = ((slope - quotient).abs() - ROUNDED / step * level).clamp_min(0)
        relative = beyond / scale.clamp_min(1e-300)
        return torch.where(scale > 0, relative, torch.ones_like(relative)).nan_to_num(1.0, 1.0, 1.0)

    return torch.stack([error(step) for step in STEPS]).amin(0)


def is_batch_dependent(built: Built, batching: Batching) -> bool | None:
    """Whether an image's logits change with its neighbours: f(x)[i] against f(x[i]) on 8 images, beyond float noise.

    None where only one image passes at a time, or answers differ by themselves, and nothing can be seen.
    """
    return batching.run(lambda size: _is_batch_dependent(built, min(8, size)))


def _is_batch_dependent(built: Built, count: int) -> bool | None:
    count = min(count, len(built.split))
    if count < 2:
        return None
    # Two draws of a randomised wrap differ by themselves: there the model inside is looked at.
    victim = built.victim.bare if built.victim.stochastic else built.victim
    x = built.split.batch(np.arange(count), built.victim.device).x

    def differ(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs().amax() / a.abs().amax().clamp_min(1e-6)) > 1e-3)

    answer: Callable[[Tensor], Tensor] = victim.logits
    with victim.frozen():
        together = answer(x)
        if any(differ(together, answer(x)) for _ in range(3)):
            return None
        return differ(together, torch.cat([answer(x[i : i + 1]) for i in range(count)]))
