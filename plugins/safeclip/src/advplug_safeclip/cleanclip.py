"""CleanCLIP: fine-tuning of a poisoned model on clean pairs, each modality also by itself, so that the association of
trigger and caption is forgotten (Bansal et al. 2023, arXiv 2303.03323, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from advplug.contracts import Tuned
from advplug.errors import UsageError
from advplug.leakage import refuse_leaks
from advplug_safeclip.learner import Learner, learning
from advplug_safeclip.losses import contrast
from advplug_safeclip.pairs import read

if TYPE_CHECKING:
    from advplug.data import Split
    from advplug.rng import Stream
    from advplug.train import Training
    from advplug_clip.scorer import ClipScorer
    from advplug_safeclip.settings import Views

RISE = 50
"""Updates over which the rate rises, a tenth of all at most."""


@dataclass(frozen=True)
class Cleaning:
    """Fine-tuning on a `share` of the clean pairs; `weight` is that of the losses within a modality."""

    share: float
    weight: float
    epochs: int
    batch_size: int
    lr: float
    decay: float
    drawn: Views


def fit(scorer: ClipScorer, training: Training, how: Cleaning) -> Tuned:
    """Trains both towers of a trained model in place, on clean pairs that its owner has.

    Raises UsageError where there are none, for images without captions, and where an image that the model is judged on
    is among them; CellFailure for too few pairs and where the loss stops being finite.
    """
    if training.clean is None:
        raise UsageError("cleanclip needs clean pairs, and this training holds none; use safeclip, which needs none")
    stream = training.stream.child("cleanclip")
    clean = _owned(training.clean, how.share, stream)
    if training.test is not None:
        refuse_leaks(clean, training.test)
    pairs = read("cleanclip", clean, scorer, how.drawn, training.device)
    size = min(how.batch_size, len(pairs))
    learner = Learner(scorer, pairs, training, stream, size, how.epochs * (len(pairs) // size))
    with learning(learner, fresh=False) as warnings, pairs.ledger.phase("cleaning"):
        learner.start(how.lr, how.decay, how.epochs * learner.steps(len(pairs)), RISE, falls=True)
        for epoch in range(how.epochs):
            _epoch(learner, how.weight, stream.child("epoch", epoch))
            loss = learner.mean_loss()
    facts = {
        "clean_pairs": len(pairs),
        "share_of_training": how.share,
        "epochs": how.epochs,
        "lr": how.lr,
        "updates": learner.done,
        "final_loss": loss,
        "cost": pairs.ledger.facts(len(pairs), how.epochs),
        "warnings": warnings,
    }
    return Tuned(scorer, facts=facts)


def _owned(clean: Split, share: float, stream: Stream) -> Split:
    """A random part of the clean training set."""
    order = torch.randperm(len(clean), generator=stream.generator("owned")).numpy()
    return clean.subset(np.sort(order[: round(share * len(clean))]))


def _epoch(learner: Learner, weight: float, stream: Stream) -> None:
    """Images and captions as they are find each other, and their own changed views."""
    pairs, scorer = learner.pairs, learner.scorer
    for rows, draws in learner.batches(np.arange(len(pairs)), stream):
        captions = pairs.captions(rows, draws)
        plain = pairs.images(rows, draws, plain=True)
        x = torch.cat([plain, pairs.images(rows, draws)])
        tokens = torch.cat([pairs.texts(captions, draws, plain=True), pairs.texts(captions, draws)])
        images, seen = pairs.encode_images(scorer, x).chunk(2)
        texts, read_as = pairs.encode_texts(scorer, tokens).chunk(2)
        scale, same = scorer.clip.logit_scale, pairs.same(captions)
        across = (contrast(images, texts, scale, same) + contrast(texts, images, scale, same)) / 2
        within = (contrast(images, seen, scale) + contrast(texts, read_as, scale, same)) / 2
        learner.update(across + weight * within)
