"""Which pairs are safe to train on together, epoch by epoch: scores, a mixture, and bounds on what it may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from advplug_safeclip import mixture
from advplug_safeclip.pairs import Array, spread

if TYPE_CHECKING:
    from advplug.rng import Stream
    from advplug_safeclip.learner import Learner
    from advplug_safeclip.settings import Settings

CHUNK = 256
"""Pairs that are encoded at once."""
OTHERS = 1000
"""Images that a caption is compared with to learn what it has in common with those that it does not describe."""


@dataclass(frozen=True)
class Round:
    """The choice for one filtered epoch: `safe` (N,) bool, figures that JSON can hold, sentences for the reader."""

    safe: Array
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()


def scores(learner: Learner, settings: Settings, stream: Stream) -> Array:
    """How well image and caption of each pair go together, (N,) float64: cosines, or what `settings.mixture` takes.

    The mean over `settings.looks` random views of each pair; of the pairs as they are where that is 0.
    """
    found = torch.zeros(len(learner.pairs), dtype=torch.float64)
    looks = settings.looks or 1
    learner.scorer.eval()
    try:
        for look in range(looks):
            draws = stream.generator("look", look)
            images, texts = _encoded(learner, not settings.looks, draws)
            made = cosines(images, texts) if settings.mixture == "free" else deviations(images, texts, draws)
            found += made.double().cpu()
    finally:
        learner.scorer.train()
    return (found / looks).numpy()


@torch.no_grad()
def _encoded(learner: Learner, plain: bool, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit features (N, D) of all images, and of a caption of each."""
    pairs, scorer = learner.pairs, learner.scorer
    images, texts = [], []
    for rows in spread(np.arange(len(pairs)), CHUNK):
        captions = pairs.captions(rows, draws)
        images.append(pairs.encode_images(scorer, pairs.images(rows, draws, plain)))
        texts.append(pairs.encode_texts(scorer, pairs.texts(captions, draws, plain)))
    return torch.cat(images), torch.cat(texts)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """(N,) of unit features (N, D)."""
    return (images * texts).sum(1)


def deviations(images: Tensor, texts: Tensor, draws: torch.Generator) -> Tensor:
    """How far each cosine (N,) is from those of the caption with other images, drawn at random, in their standard
    deviations; unit features (N, D). A vague caption is near to all images, a detailed one to few."""
    others = torch.randperm(len(images), generator=draws)[:OTHERS].to(images.device)
    wrong = images[others] @ texts.T
    return (cosines(images, texts) - wrong.mean(0)) / wrong.std(0).clamp_min(1e-6)


def choose(found: Array, settings: Settings, before: list[Round]) -> Round:
    """The safe pairs by their scores (N,), after the rounds `before`.

    Where the mixture finds fewer than the least share, and from the second round on unless `settings.refit`, the pairs
    with the highest scores make up that share.
    """
    fitted = mixture.free(found) if settings.mixture == "free" else mixture.anchored(found)
    posterior = fitted.posterior(found)
    least = min(_least(settings, before), settings.cap)
    asked = settings.refit or not before
    by_mixture = int((posterior >= settings.threshold).sum()) if asked else None
    enough, most = (round(share * len(found)) for share in (least, settings.cap))
    count, decided = enough, "floor" if asked else "growth"
    if by_mixture is not None and by_mixture >= enough:
        count, decided = (by_mixture, "mixture") if by_mixture <= most else (most, "cap")
    count = max(2, count)
    safe = np.zeros(len(found), dtype=bool)
    # The posterior never falls as scores rise, so the highest scores are those that the mixture is surest of.
    safe[np.argsort(-found, kind="stable")[:count]] = True
    facts = {
        "decided": decided,
        "chosen": count,
        "share": round(count / len(found), 4),
        "by_mixture": by_mixture,
        "least": round(least, 4),
        "means": [_figure(m) for m in fitted.means],
        "spreads": [_figure(s) for s in fitted.spreads],
        "upper_weight": _figure(fitted.weights[1]),
    }
    return Round(safe, facts, _warnings(fitted, facts, settings) if asked else ())


def _least(settings: Settings, before: list[Round]) -> float:
    if not before:
        return settings.floor
    if settings.refit:
        return settings.floor + len(before) * settings.growth
    return float(before[-1].safe.mean()) + settings.growth


def _figure(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _warnings(fitted: mixture.Mixture, facts: dict[str, Any], settings: Settings) -> tuple[str, ...]:
    top = f"the {facts['chosen']} pairs with the highest scores were taken for safe"
    if fitted.problem:
        return (f"the mixture cannot be used, since {fitted.problem}; {top}",)
    if facts["decided"] == "floor":
        told = f"the mixture found {facts['by_mixture']} safe pairs at threshold={settings.threshold:g}"
        return (f"{told}, fewer than the floor; {top}",)
    return ()
