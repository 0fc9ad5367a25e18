"""Fine-tuning of a CLIP model's image tower against attacks; the text tower stays as it is, bit by bit.

Adversarial images are made in evaluation mode for the batch at hand. Updates are made in training mode, but batch
norm keeps its statistics.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from advplug.contracts import Tuned
from advplug.defenses.adversarial import Ascent
from advplug.errors import CellFailure, UsageError
from advplug.leakage import refuse_leaks
from advplug.train import demand_finite
from advplug.victim import Victim
from advplug_clip import finetune_losses as losses
from advplug_clip import orthogonal, prompts
from advplug_clip.scorer import ClipScorer

if TYPE_CHECKING:
    from advplug.data import Split
    from advplug.rng import Stream
    from advplug.train import Training

Array: TypeAlias = np.ndarray[Any, Any]
Terms: TypeAlias = Callable[[ClipScorer, "Rows", "Stream"], Mapping[str, Tensor]]
"""(model, batch, stream) to the named scalars whose mean is lowered."""


@dataclass(frozen=True)
class Rows:
    """A batch: positions (B,) in the training split, images (B, C, H, W) and labels (B,) on the device."""

    rows: Array
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Plan:
    """How long and how fast: `epochs` passes in batches of `batch_size`, AdamW with `lr` at its peak.

    The rate rises over a share `warm_up` of the updates and then falls by half a cosine. Training ends early once the
    mean loss of as many updates as an epoch has is below `stop`.
    """

    epochs: int
    batch_size: int
    lr: float
    decay: float
    warm_up: float
    stop: float | None = None

    def rate(self, update: int, updates: int) -> float:
        """The factor of `lr` at `update`, counted from 0."""
        rise = max(1.0, self.warm_up * updates)
        if update < rise:
            return (update + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (update - rise) / max(1.0, updates - rise)))


def fine_tune(
    what: str, model: nn.Module, training: Training, terms: Terms, plan: Plan, oft: orthogonal.Oft | None
) -> Tuned:
    """Lowers the mean of `terms` on the training images by the image tower's weights, or by their rotations.

    Works in place. Raises CellFailure where the loss stops being finite or there are fewer than two images.
    """
    scorer = clip_of(what, model)
    if len(training.data) < 2:
        raise CellFailure(f"training needs at least 2 images, got {len(training.data)}")
    clock = time.perf_counter()
    tower: nn.Module = scorer.clip.visual
    size = sum(p.numel() for p in tower.parameters())
    flags = [(p, p.requires_grad) for p in scorer.parameters()]
    scorer.requires_grad_(False)
    chosen = orthogonal.attach(tower, oft) if oft else list(tower.requires_grad_(True).parameters())
    try:
        told = _run(scorer, training, training.stream.child(what), terms, plan, chosen)
    finally:
        if oft is not None:
            orthogonal.merge(tower)
        scorer.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    amount = sum(p.numel() for p in chosen)
    kind = "parameters" if oft is None else "adapter_parameters"
    facts = {kind: amount, "share": round(amount / size, 4), "training_seconds": round(time.perf_counter() - clock, 1)}
    return Tuned(model, facts=facts | told)


def _run(
    scorer: ClipScorer, training: Training, stream: Stream, terms: Terms, plan: Plan, chosen: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """Updates `chosen`; the number of updates, the mean losses of the last epoch's worth of them, why it ended."""
    size = min(plan.batch_size, len(training.data))
    window = len(training.data) // size
    updates = plan.epochs * window
    optimizer = torch.optim.AdamW(_groups(chosen, plan.decay), lr=plan.lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: plan.rate(i, updates))
    history: list[dict[str, float]] = []
    reason = "all epochs were done"
    for batch in batches(training, size, plan.epochs, stream):
        done = len(history)
        _mode(scorer.clip.visual)
        named = terms(scorer, batch, stream.child("update", done))
        loss = torch.stack(list(named.values())).mean()
        value = loss.item()
        place = done // window + 1, plan.epochs, done % window + 1, window
        demand_finite(value, place, plan.lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        history.append({"loss": value, **{name: term.item() for name, term in named.items()}})
        if training.progress is not None:
            training.progress(*place, value)
        mean = float(np.mean([told["loss"] for told in history[-window:]]))
        if plan.stop is not None and len(history) >= window and mean < plan.stop and len(history) < updates:
            reason = f"the mean loss of the last {window} updates, {mean:.4g}, fell below {plan.stop:g}"
            break
    last = {f"final_{name}": float(np.mean([told[name] for told in history[-window:]])) for name in history[-1]}
    return {"updates": len(history), **last, "ended": reason}


def batches(training: Training, size: int, epochs: int, stream: Stream) -> Iterator[Rows]:
    """Whole batches in random order; what is left over of an epoch waits for another."""
    for epoch in range(epochs):
        order = torch.randperm(len(training.data), generator=stream.generator("epoch", epoch)).numpy()
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            batch = training.data.batch(rows, training.device)
            yield Rows(rows, batch.x, batch.y)


def _groups(chosen: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    # Decay is for weight matrices, filters and rotations: on biases and norms it only distorts.
    wide, narrow = [p for p in chosen if p.ndim > 1], [p for p in chosen if p.ndim <= 1]
    return [{"params": wide, "weight_decay": decay}, {"params": narrow, "weight_decay": 0.0}]


def _mode(tower: nn.Module) -> None:
    """Training mode, without batch statistics: those of attacked images are no clean image's."""
    tower.train()
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


# --- what is asked before --------------------------------------------------------------------------


def clip_of(what: str, model: nn.Module) -> ClipScorer:
    """Raises UsageError for a model without texts."""
    if not isinstance(model, ClipScorer):
        raise UsageError(f"{what} trains models of images and texts; use a CLIP model, such as clip-tiny")
    return model


def check_leaks(training: Training) -> None:
    """Raises UsageError where images that the model is judged on are among those to train on."""
    if training.test is not None:
        refuse_leaks(training.data, training.test)


def captions_of(what: str, data: Split) -> tuple[tuple[str, ...], ...]:
    """Raises UsageError where there is an image without a caption."""
    if data.captions is None:
        raise UsageError(f"{what} learns from captions and the dataset has none; use digit-scenes, or fare")
    bare = next((i for i, own in enumerate(data.captions) if not own), None)
    if bare is not None:
        name = data.names[bare] if data.names else f"training image {bare}"
        raise UsageError(f"{what} learns from captions and {name} has none; give it one or leave it out")
    return data.captions


# --- adversarial images ----------------------------------------------------------------------------


class Features(nn.Module):
    """The image tower alone, as a module of its own."""

    def __init__(self, scorer: ClipScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D), not normalised."""
        return self.scorer.encode_image(x)


@dataclass(frozen=True)
class Inner:
    """PGD in L-inf from a uniform point of the ball; the last iterate counts.

    The start is random in any case: where the tower is still the original, a distance to its own features has no
    gradient at the clean image.
    """

    eps: float
    steps: int
    length: float

    def __call__(self, scorer: ClipScorer, x: Tensor, loss: Callable[[Tensor], Tensor], stream: Stream) -> Tensor:
        """Images of the shape of `x`; `loss` maps features (B, D) to values (B,) to be raised."""
        victim = Victim(Features(scorer), 1, device=x.device, stream=stream)
        ascent = Ascent("linf", self.eps, self.steps, self.length)
        with parametrize.cached():  # rotations stay while an attack runs
            return ascent(victim, x, loss, stream)


# --- the four losses -------------------------------------------------------------------------------


def fare(scorer: ClipScorer, inner: Inner) -> Terms:
    """How far the attack takes an image's features from those that the original tower gives the clean image.

    Raises the worst squared distance, then lowers it (Schlarmann et al. 2024, arXiv 2402.12336, section 3.2).
    """
    original = _frozen(scorer)

    def terms(model: ClipScorer, batch: Rows, stream: Stream) -> Mapping[str, Tensor]:
        with torch.no_grad():
            clean = original.encode_image(batch.x)
        x = inner(model, batch.x, lambda features: losses.distance(features, clean), stream)
        return {"distance": losses.distance(model.encode_image(x), clean).mean()}

    return terms


def _frozen(scorer: ClipScorer) -> ClipScorer:
    """The model as it is now, with an image tower of its own; the text tower is shared."""
    shared = {id(p): p for name, p in scorer.named_parameters() if not name.startswith("clip.visual.")}
    return copy.deepcopy(scorer, dict(shared)).eval().requires_grad_(False)


def tecoa(scorer: ClipScorer, inner: Inner, classes: Sequence[str], templates: str | None) -> Terms:
    """Cross-entropy of class prompts on adversarial images (Mao et al. 2023, arXiv 2212.07016, section 3.3).

    Raises UsageError without classes. The prompts are its own, since trained weights do not depend on the model's.
    """
    if len(classes) < 2:
        raise UsageError("tecoa learns classes and the dataset has none; use fare or caption-advtrain")
    groups = prompts.prompts(templates, classes)
    columns = ClipScorer(scorer.clip, scorer.tokens, groups, scorer.pixels).columns
    scale = scorer.scale

    def each(features: Tensor, y: Tensor) -> Tensor:
        logits = scale * functional.normalize(features, dim=-1) @ columns.T
        return functional.cross_entropy(logits, y, reduction="none")

    def terms(model: ClipScorer, batch: Rows, stream: Stream) -> Mapping[str, Tensor]:
        x = inner(model, batch.x, lambda features: each(features, batch.y), stream)
        return {"cross_entropy": each(model.encode_image(x), batch.y).mean()}

    return terms


@dataclass(frozen=True)
class Texts:
    """The captions of a training split and the text tower that reads them."""

    scorer: ClipScorer
    captions: tuple[tuple[str, ...], ...]

    def drawn(self, rows: Array, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """A caption of each image at random: unit features (B, D), and which of them read the same (B, B)."""
        chosen = []
        for i in rows:
            own = self.captions[int(i)]
            chosen.append(own[int(torch.randint(len(own), (), generator=draws))])
        numbers: dict[str, int] = {}
        features = self.scorer.encode_text(chosen)
        which = torch.tensor([numbers.setdefault(text, len(numbers)) for text in chosen], device=features.device)
        return features, which[:, None] == which[None]

    def means(self, rows: Array) -> Tensor:
        """The mean of the unit features of all of an image's captions (B, D)."""
        flat = [text for i in rows for text in self.captions[int(i)]]
        sizes = [len(self.captions[int(i)]) for i in rows]
        parts = torch.split(self.scorer.encode_text(flat), sizes)
        return torch.stack([part.mean(0) for part in parts])


def mat(texts: Texts, augmentation: losses.Augmentation) -> Terms:
    """Contrastive losses of clean images and of randomly augmented ones."""

    def terms(model: ClipScorer, batch: Rows, stream: Stream) -> Mapping[str, Tensor]:
        draws = stream.generator("augmentation")
        return _pair(model, batch.x, augmentation(batch.x, draws), "augmented", texts.drawn(batch.rows, draws))

    return terms


def caption_advtrain(texts: Texts, inner: Inner, offline: Callable[[Array], Tensor] | None) -> Terms:
    """Contrastive losses of clean images and of those that caption-PGD makes, against the model as it is then.

    `offline` gives images (B, C, H, W) that were made before instead, by their positions.
    """

    def terms(model: ClipScorer, batch: Rows, stream: Stream) -> Mapping[str, Tensor]:
        made = away(model, texts, inner, batch, stream) if offline is None else offline(batch.rows).to(batch.x)
        drawn = texts.drawn(batch.rows, stream.generator("captions"))
        return _pair(model, batch.x, made, "adversarial", drawn)

    return terms


def away(model: ClipScorer, texts: Texts, inner: Inner, batch: Rows, stream: Stream) -> Tensor:
    """Images that are moved away from their own captions, all of an image's counting alike."""
    means = texts.means(batch.rows)
    return inner(model, batch.x, lambda features: losses.dissimilarity(features, means), stream)


def made_once(texts: Texts, inner: Inner, training: Training, stream: Stream, size: int) -> Callable[[Array], Tensor]:
    """Adversarial images of all training images against the model as it is now, kept in 8 bits as files are."""
    parts: list[Tensor] = []
    for start in range(0, len(training.data), size):
        rows = np.arange(start, min(start + size, len(training.data)))
        held = training.data.batch(rows, training.device)
        made = away(texts.scorer, texts, inner, Rows(rows, held.x, held.y), stream.child("offline", start))
        parts.append(made.mul(255).round().byte().cpu())
    kept = torch.cat(parts)
    return lambda rows: kept[torch.from_numpy(rows)].float() / 255


def _pair(
    model: ClipScorer, clean: Tensor, other: Tensor, name: str, drawn: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    features, same = drawn
    scale = model.scale
    # One pass: what an image's features are does not depend on the others, since batch norm is frozen.
    both = model.encode_image(torch.cat([clean, other])).chunk(2)
    return {
        "clean_loss": losses.contrastive(both[0], features, scale, same),
        f"{name}_loss": losses.contrastive(both[1], features, scale, same),
    }
