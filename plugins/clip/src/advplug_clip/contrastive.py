"""Contrastive training from nothing: images and captions that belong together are told from those that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from advplug.contracts import Tuned
from advplug.errors import CellFailure, UsageError
from advplug.train import demand_finite
from advplug_clip import prompts
from advplug_clip.tiny import learn_words

if TYPE_CHECKING:
    from advplug.rng import Stream
    from advplug.train import Training
    from advplug_clip.scorer import ClipScorer

WARM_UP = 50
"""Steps over which the learning rate rises, a tenth of all steps at most."""
BETAS = (0.9, 0.98)
GREATEST = math.log(100)
"""Bound of the logarithm of the scale (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class Captions:
    """The captions of a training split as tokens (N, length); image i's are the rows `first[i]` to `first[i + 1]`.

    With `labels` (images,) they are those of classes: an image's are the rows of its class.
    """

    tokens: Tensor
    first: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any] | None = None

    def draw(self, images: np.ndarray[Any, Any], draws: torch.Generator) -> Tensor:
        """One caption of each image, at random."""
        owner = images if self.labels is None else self.labels[images]
        start, amount = self.first[owner], self.first[owner + 1] - self.first[owner]
        offset = (torch.rand(len(images), generator=draws).double().numpy() * amount).astype(int)
        return self.tokens[start + offset]

    def same(self, images: np.ndarray[Any, Any]) -> Tensor | None:
        """Which of these images (B,) share their captions, (B, B); None where each image has its own."""
        if self.labels is None:
            return None
        own = torch.from_numpy(self.labels[images])
        return own[:, None] == own


def fit(scorer: ClipScorer, training: Training) -> Tuned:
    """Trains both towers in place on all captions; the word table becomes that of the captions.

    Without captions the classes' names make some, the same for all images of a class. Each step moves its images by the
    same few pixels. The loss is the mean of both directions' cross-entropy (Radford et al. 2021, figure 3). Raises
    UsageError where images have no caption, CellFailure where the loss stops being finite.
    """
    if len(training.data) < 2:
        raise CellFailure(f"training needs at least 2 images, got {len(training.data)}")
    named = training.data.captions is None and not training.info.captions
    texts = prompts.class_captions(training.info.classes) if named else _texts(training)
    flat = [text for own in texts for text in own]
    warnings = read_texts(scorer, flat)
    first = np.concatenate([[0], np.cumsum([len(own) for own in texts])])
    captions = Captions(scorer.tokens(flat), first, training.data.labels if named else None)
    stream = training.stream.child("contrastive", training.schedule.seed)
    with both_towers(scorer, training.device, stream):
        loss = _run(scorer, training, captions, stream)
    parameters = sum(p.numel() for p in scorer.parameters())
    return Tuned(scorer, facts={"parameters": parameters, "training_loss": loss, "warnings": warnings})


@contextmanager
def both_towers(scorer: ClipScorer, device: torch.device, stream: Stream) -> Iterator[None]:
    """Both towers on the device, in training mode, with gradients; flags and modes are as they were afterwards.

    The global generators are seeded by `stream` meanwhile.
    """
    flags = [(p, p.requires_grad) for p in scorer.parameters()]
    scorer.to(device).train()
    scorer.clip.visual.to(memory_format=torch.channels_last)  # a sixth faster
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        with stream.as_global():
            yield
    finally:
        scorer.clip.visual.to(memory_format=torch.contiguous_format)
        scorer.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        scorer.refresh()


def read_texts(scorer: ClipScorer, texts: Sequence[str], learn: bool = True) -> list[str]:
    """Makes the word table that of these texts, if it is to `learn`; what a reader should know: texts that are cut,
    words that are not told apart."""
    cut = scorer.tokens.cut_note(texts)
    warnings = [f"training captions: {cut}"] if cut else []
    lost = learn_words(scorer.clip, scorer.tokens, texts) if learn else 0
    if lost:
        warnings.append(f"{lost} rare word pieces of the training captions are not told apart; raise words=")
    return warnings


def _texts(training: Training) -> tuple[tuple[str, ...], ...]:
    found = training.data.captions
    if found is None or not all(found):
        raise UsageError("contrastive training needs a caption for every image; use a dataset with captions")
    return found


def _run(scorer: ClipScorer, training: Training, captions: Captions, stream: Stream) -> float:
    """The mean loss of the last epoch."""
    plan, clip = training.schedule, scorer.clip
    size = min(plan.batch_size, len(training.data))
    steps = len(training.data) // size
    optimizer, rate = adamw(scorer, plan.lr, plan.weight_decay, WARM_UP, plan.epochs * steps)
    losses: list[float] = []
    for epoch in range(plan.epochs):
        losses = []
        for step, (rows, draws) in enumerate(_batches(len(training.data), size, stream, epoch)):
            x = _moved(training.data.batch(rows).x, plan.shift, draws)
            x = (_mirrored(x, draws) if plan.flip else x).to(training.device)
            tokens = captions.draw(rows, draws).to(training.device)
            loss = pair_loss(scorer.encode_image(x), clip.encode_text(tokens), clip.logit_scale, captions.same(rows))
            value = loss.item()
            demand_finite(value, (epoch + 1, plan.epochs, step + 1, steps), plan.lr)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rate.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, GREATEST)
            losses.append(value)
            if training.progress is not None:
                training.progress(epoch + 1, plan.epochs, step + 1, steps, value)
    return float(np.mean(losses))


def _batches(
    images: int, size: int, stream: Stream, epoch: int
) -> Iterator[tuple[np.ndarray[Any, Any], torch.Generator]]:
    """Rows of whole batches in random order, and the epoch's generator; what is left over waits for another epoch."""
    draws = stream.generator("epoch", epoch)
    order = torch.randperm(images, generator=draws).numpy()
    for start in range(0, images - size + 1, size):
        yield order[start : start + size], draws


def _moved(x: Tensor, reach: int, draws: torch.Generator) -> Tensor:
    """All images (B, C, H, W) moved by the same up to `reach` pixels; edges are repeated."""
    if not reach:
        return x
    height, width = x.shape[2:]
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=draws).tolist()
    wide = functional.pad(x, (reach,) * 4, mode="replicate")
    return wide[:, :, down : down + height, right : right + width]


def _mirrored(x: Tensor, draws: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each mirrored with probability 1/2."""
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=draws) < 0.5, x.flip(3), x)


def pair_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Cross-entropy of telling which of the batch's texts (B, D) belongs to an image (B, D), and the reverse.

    Features need not have unit length; `logit_scale` is the logarithm of the scale. Where `same` (B, B) says that pairs
    are of one class, all of its texts are equally right (Yang et al. 2022, arXiv 2204.03610). A scalar.
    """
    logits = logit_scale.exp() * functional.normalize(images, dim=-1) @ functional.normalize(texts, dim=-1).T
    if same is None:
        own = torch.arange(len(images), device=images.device)
    else:
        own = (same / same.sum(1, keepdim=True)).to(logits)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def adamw(
    scorer: ClipScorer,
    lr: float,
    decay: float,
    rise: int,
    steps: int,
    falls: bool = True,
    betas: tuple[float, float] = BETAS,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW for all parameters, and its rate by step: it rises for `rise` of the `steps`, a tenth of them at most, to
    `lr`, and falls by half a cosine, or stays."""
    parameters = list(scorer.parameters())
    # Decay is for weight matrices and filters: on biases, norms and the scale it only distorts.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    made = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    risen = max(1, min(rise, steps // 10))

    def factor(step: int) -> float:
        if step < risen:
            return (step + 1) / risen
        past = min(step, steps) - risen if falls else 0
        return 0.5 * (1 + math.cos(math.pi * past / max(1, steps - risen)))

    return made, torch.optim.lr_scheduler.LambdaLR(made, factor)
