"""SafeCLIP: contrastive training on pairs that look safe, and of each modality by itself on the others.

Yang et al. 2024, arXiv 2310.05862, section 4. A pair is safe if image and caption, which have not been trained together
for long, are close already; poisoned pairs become so only by being trained on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from advplug.contracts import Tuned
from advplug_safeclip.choice import Round, choose, scores
from advplug_safeclip.learner import Learner, learning
from advplug_safeclip.losses import Pool, contrast
from advplug_safeclip.pairs import Array, read
from advplug_safeclip.settings import LONGER

if TYPE_CHECKING:
    from advplug.rng import Stream
    from advplug.train import Training
    from advplug_clip.scorer import ClipScorer
    from advplug_safeclip.settings import Settings


def fit(scorer: ClipScorer, training: Training, settings: Settings, why: str) -> Tuned:
    """Trains both towers in place. Raises UsageError for images without captions, CellFailure for too few pairs and
    where the loss stops being finite."""
    plan = training.schedule
    pairs = read("safeclip", training.data, scorer, settings.drawn, training.device)
    size = min(settings.batch_size or plan.batch_size, len(pairs))
    filtered = settings.epochs or round(LONGER * plan.epochs)
    lr = settings.lr or plan.lr
    resolved = replace(settings, epochs=filtered, batch_size=size, lr=lr, slow_lr=settings.slow_lr or lr)
    epochs = settings.unimodal + settings.multimodal + filtered
    stream = training.stream.child("safeclip", plan.seed)
    learner = Learner(scorer, pairs, training, stream, size, epochs * (len(pairs) // size))
    with learning(learner) as warnings:
        losses = _warm_up(learner, resolved)
        rounds = _filtered(learner, resolved)
    facts = {
        "settings": resolved.told(),
        "why": why,
        "losses": losses,
        "rounds": [r.facts for r in rounds],
        "cost": pairs.ledger.facts(len(pairs), epochs),
        "warnings": [
            *warnings,
            *(f"filtered epoch {i}: {text}" for i, r in enumerate(rounds, 1) for text in r.warnings),
        ],
    }
    return Tuned(scorer, facts=facts, trusted=torch.from_numpy(np.stack([r.safe for r in rounds])))


# --- the phases ------------------------------------------------------------------------------------


def _warm_up(learner: Learner, settings: Settings) -> dict[str, float | None]:
    """The unimodal epochs, then the slow contrastive ones, on everything; the mean losses of their last epochs."""
    everything = np.arange(len(learner.pairs))
    pools = Pool(settings.bank), Pool(settings.bank)
    told: dict[str, float | None] = {}
    phases = (("unimodal", settings.unimodal, settings.lr), ("slow", settings.multimodal, settings.slow_lr))
    for name, epochs, rate in phases:
        updates = epochs * learner.steps(len(everything))
        learner.start(rate, settings.decay, updates, settings.rise, falls=False, beta2=settings.beta2)
        with learner.pairs.ledger.phase(name):
            for epoch in range(epochs):
                stream = learner.stream.child(name, epoch)
                if name == "unimodal":
                    _unimodal_epoch(learner, everything, pools, stream)
                else:
                    contrastive_epoch(learner, everything, settings.views, stream)
                told[name] = learner.mean_loss()
    return told


def _filtered(learner: Learner, settings: Settings) -> list[Round]:
    everything = np.arange(len(learner.pairs))
    ledger = learner.pairs.ledger
    pools = Pool(settings.bank), Pool(settings.bank)
    epochs = settings.epochs or 1
    rounds: list[Round] = []
    updates = epochs * learner.steps(len(everything))
    learner.start(settings.lr, settings.decay, updates, settings.rise, falls=True, beta2=settings.beta2)
    for epoch in range(epochs):
        stream = learner.stream.child("filtered", epoch)
        with ledger.phase("scoring"):
            made = choose(scores(learner, settings, stream.child("score")), settings, rounds)
        rounds.append(made)
        with ledger.phase("filtered"):
            _unimodal_epoch(learner, everything[~made.safe], pools, stream.child("risky"))
            made.facts["risky_loss"] = learner.mean_loss()
            contrastive_epoch(learner, everything[made.safe], settings.views, stream.child("safe"))
            made.facts["safe_loss"] = learner.mean_loss()
    return rounds


def _unimodal_epoch(learner: Learner, rows: Array, pools: tuple[Pool, Pool], stream: Stream) -> None:
    """Two views of each image and of each caption find each other; the neighbour of the first view stands for it."""
    pairs, scorer = learner.pairs, learner.scorer
    for batch, draws in learner.batches(rows, stream):
        captions = pairs.captions(batch, draws)
        x = torch.cat([pairs.images(batch, draws), pairs.images(batch, draws)])
        tokens = torch.cat([pairs.texts(captions, draws), pairs.texts(captions, draws)])
        images = pairs.encode_images(scorer, x).chunk(2)
        texts = pairs.encode_texts(scorer, tokens).chunk(2)
        scale = scorer.clip.logit_scale
        loss = torch.stack([
            contrast(images[1], pools[0].nearest(images[0]), scale),
            contrast(texts[1], pools[1].nearest(texts[0]), scale, pairs.same(captions)),
        ]).mean()  # fmt: skip
        pools[0].put(images[0])
        pools[1].put(texts[0])
        learner.update(loss)


def contrastive_epoch(learner: Learner, rows: Array, views: int, stream: Stream) -> None:
    """Images and captions find each other; of two views each, the first the other's second."""
    pairs, scorer = learner.pairs, learner.scorer
    for batch, draws in learner.batches(rows, stream):
        captions = pairs.captions(batch, draws)
        x = torch.cat([pairs.images(batch, draws) for _ in range(views)])
        tokens = torch.cat([pairs.texts(captions, draws) for _ in range(views)])
        images = pairs.encode_images(scorer, x).chunk(views)
        texts = pairs.encode_texts(scorer, tokens).chunk(views)
        scale, same = scorer.clip.logit_scale, pairs.same(captions)
        learner.update((contrast(images[0], texts[-1], scale, same) + contrast(texts[0], images[-1], scale, same)) / 2)
