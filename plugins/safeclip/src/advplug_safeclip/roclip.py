"""RoCLIP: contrastive training that now and then matches images with the nearest of a pool of captions instead of
their own, so that a poisoned pair is not trained on often enough (Yang et al. 2023, arXiv 2303.06854, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from advplug.contracts import Tuned
from advplug_safeclip.learner import Learner, learning
from advplug_safeclip.losses import Pool, contrast
from advplug_safeclip.pairs import read
from advplug_safeclip.safe import contrastive_epoch

if TYPE_CHECKING:
    from advplug.rng import Stream
    from advplug.train import Training
    from advplug_clip.scorer import ClipScorer
    from advplug_safeclip.settings import Views

RISE = 50
"""Updates over which the rate rises, a tenth of all at most, as in the models' own training."""


@dataclass(frozen=True)
class Matching:
    """In each `every`-th epoch images are matched with a pool of a share `pool` of the pairs; in those before it they
    learn from their own captions, without which no caption would be near to any image.

    `epochs`, `batch_size` and `lr` are None for the model's own.
    """

    pool: float
    every: int
    epochs: int | None
    batch_size: int | None
    lr: float | None
    drawn: Views


def fit(scorer: ClipScorer, training: Training, how: Matching) -> Tuned:
    """Trains both towers in place. Raises UsageError for images without captions, CellFailure for too few pairs and
    where the loss stops being finite."""
    plan = training.schedule
    pairs = read("roclip", training.data, scorer, how.drawn, training.device)
    size = min(how.batch_size or plan.batch_size, len(pairs))
    epochs, lr = how.epochs or plan.epochs, how.lr or plan.lr
    stream = training.stream.child("roclip", plan.seed)
    learner = Learner(scorer, pairs, training, stream, size, epochs * (len(pairs) // size))
    pool = Pool(max(size, round(how.pool * len(pairs))))
    matched = [(epoch + 1) % how.every == 0 for epoch in range(epochs)]
    losses: list[float | None] = []
    with learning(learner) as warnings:
        learner.start(lr, plan.weight_decay, epochs * learner.steps(len(pairs)), RISE, falls=True)
        for epoch, from_pool in enumerate(matched):
            with pairs.ledger.phase("matched" if from_pool else "contrastive"):
                if from_pool:
                    _matched_epoch(learner, pool, stream.child("epoch", epoch))
                else:
                    contrastive_epoch(learner, np.arange(len(pairs)), 1, stream.child("epoch", epoch))
            losses.append(learner.mean_loss())
    facts = {
        "settings": {"pool": pool.size, "every": how.every, "epochs": epochs, "batch_size": size, "lr": lr},
        "matched_epochs": sum(matched),
        "losses": losses,
        "cost": pairs.ledger.facts(len(pairs), epochs),
        "warnings": warnings,
    }
    return Tuned(scorer, facts=facts)


def _matched_epoch(learner: Learner, pool: Pool, stream: Stream) -> None:
    """Each image is to find the caption of the pool that is nearest to it, and the reverse.

    Captions in the pool have no gradient, so the image tower learns alone; the batch's own captions enter the pool
    afterwards and leave it in turn.
    """
    pairs, scorer = learner.pairs, learner.scorer
    for rows, draws in learner.batches(np.arange(len(pairs)), stream):
        images = pairs.encode_images(scorer, pairs.images(rows, draws))
        with torch.no_grad():
            own = pairs.encode_texts(scorer, pairs.texts(pairs.captions(rows, draws), draws))
        if pool.features is None:
            pool.put(own)
        nearest, scale = pool.nearest(images), scorer.clip.logit_scale
        same = (nearest @ nearest.T) > 1 - 1e-6
        learner.update((contrast(images, nearest, scale, same) + contrast(nearest, images, scale, same)) / 2)
        pool.put(own)
