"""Neural Cleanse: the smallest trigger for each class, found again by gradients, and what is done about an outlier.

ART has it for Keras only. The search is written here for PyTorch, after the paper; ART's mitigation follows it, with
its examples put right: they have to be images of other classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.contracts import Tuned
from advplug.data import ArrayImages, Split
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.train import Training
from advplug_art.attacks import load
from advplug_art.estimators import Array
from advplug_art.features import Features, of_images
from advplug_art.poisons import silent

WHO = "art.neural-cleanse"
PATIENCE, GIVE_UP = 5, 10
"""Passes before the weight of the mask's size is changed, and without a smaller mask before the search ends."""
FASTER = 1.5
"""The factor by which that weight grows; it shrinks by FASTER ** 1.5."""
CONSISTENT = 1.4826
"""Of a normal distribution: standard deviation over median absolute deviation."""
EFFECTIVE = 0.05
"""Share of images with the found trigger that may be taken for its class before pruning ends."""
SHOWN = 0.2
"""Images with the trigger for each clean one, while it is unlearned."""
SLOWER = 0.1
"""Unlearning's learning rate as a share of the training's."""


@dataclass(frozen=True)
class Search:
    """`steps` passes of Adam with rate `lr` for each class, in batches of `batch`.

    A trigger counts where a share `success` of the images is taken for the class; `weight` is that of its size.
    """

    steps: int
    lr: float
    success: float
    weight: float
    batch: int = 32


@dataclass(frozen=True)
class Found:
    """The trigger of a class: x (1 - mask) + pattern mask; mask (1, H, W), pattern (C, H, W), its success on others."""

    mask: Tensor
    pattern: Tensor
    success: float

    @property
    def size(self) -> float:
        """The mask's sum."""
        return float(self.mask.sum())

    def put(self, x: Tensor) -> Tensor:
        return x * (1 - self.mask.to(x)) + self.pattern.to(x) * self.mask.to(x)


def reverse(model: nn.Module, x: Tensor, goal: int, search: Search, stream: Stream) -> Found:
    """The smallest trigger found that takes images `x` (N, C, H, W) to class `goal` (Wang et al. 2019, section IV).

    The weight of its size grows while it succeeds and shrinks while it does not. Where it never succeeds, the last.
    """
    draws = stream.generator("start", goal)
    mask, pattern = (
        torch.atanh((torch.rand(shape, generator=draws) - 0.5) * 1.99).to(x).requires_grad_()
        for shape in ((1, *x.shape[2:]), tuple(x.shape[1:]))
    )
    descent = torch.optim.Adam([mask, pattern], lr=search.lr, betas=(0.5, 0.9))
    best: Found | None = None
    weight, above, below, idle = 0.0, 0, 0, 0
    for epoch in range(search.steps):
        order = torch.randperm(len(x), generator=stream.generator("order", goal, epoch)).to(x.device)
        hits = 0
        for rows in torch.split(order, search.batch):
            found = Found(torch.tanh(mask) / 2 + 0.5, torch.tanh(pattern) / 2 + 0.5, 0.0)
            logits = model(found.put(x[rows]))
            wanted = torch.full((len(rows),), goal, device=x.device)
            loss = functional.cross_entropy(logits, wanted) + weight * found.mask.sum()
            mask.grad, pattern.grad = torch.autograd.grad(loss, (mask, pattern))
            descent.step()
            hits += int((logits.argmax(1) == goal).sum())
        found = Found((torch.tanh(mask) / 2 + 0.5).detach(), (torch.tanh(pattern) / 2 + 0.5).detach(), hits / len(x))
        succeeds = found.success >= search.success
        smaller = succeeds and (best is None or found.size < 0.99 * best.size)
        best = found if succeeds and (best is None or found.size < best.size) else best
        idle = 0 if smaller or best is None else idle + 1
        if idle >= GIVE_UP and weight > 0:
            break
        above, below = (above + 1, 0) if succeeds else (0, below + 1)
        if above >= PATIENCE:
            above, weight = 0, weight * FASTER if weight else search.weight
        elif below >= PATIENCE:
            below, weight = 0, weight / FASTER**1.5
    return best or found


def anomaly(sizes: Array) -> Array:
    """How many deviations (K,) each mask is smaller than the median; negative for larger ones.

    Zeros where half of them are equal: nothing can stand out then.
    """
    below = np.median(sizes) - sizes
    spread = CONSISTENT * np.median(np.abs(below))
    scores: Array = below / spread if spread > 0 else np.zeros_like(below)
    return scores


def cleansed(
    model: nn.Module, training: Training, mitigation: str, search: Search, threshold: float, share: float, epochs: int
) -> Tuned:
    """The model without the backdoors that are found; untouched where none is.

    The defender owns `share` of the clean training images. Raises UsageError where those are too few to search with.
    """
    clean = _owned(training, share)
    names, classes = training.info.classes, len(training.info.classes)
    batch = clean.batch(np.arange(len(clean)), training.device)
    model = model.to(training.device).eval()
    found = []
    for goal in range(classes):
        others = batch.x[batch.y != goal]
        found.append(reverse(model, others, goal, search, training.stream.child("reverse")))
    scores = anomaly(np.array([one.size for one in found]))
    suspects = [c for c in range(classes) if scores[c] > threshold and found[c].success >= search.success]
    facts: dict[str, Any] = {
        "clean_images": len(clean),
        "anomaly_index": {names[c]: round(float(scores[c]), 2) for c in range(classes)},
        "mask_size": {names[c]: round(found[c].size, 2) for c in range(classes)},
        "found": [names[c] for c in suspects],
    }
    if not suspects:
        return Tuned(model, facts=facts)
    mended = _mitigated(model, training, clean, {c: found[c] for c in suspects}, mitigation, epochs)
    return Tuned(mended[0], facts=facts | {"mitigation": mitigation} | mended[1])


def _owned(training: Training, share: float) -> Split:
    source = training.data if training.clean is None else training.clean
    count = int(share * len(source))
    order = torch.randperm(len(source), generator=training.stream.generator("owned")).numpy()
    owned = source.subset(np.sort(order[:count]))
    if count < 2 or len(np.unique(owned.labels)) < 2:
        raise UsageError(f"{WHO}: clean={share:g} of {len(source)} training images is {count}; use a larger share")
    return owned


def _mitigated(
    model: nn.Module, training: Training, clean: Split, found: dict[int, Found], mitigation: str, epochs: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model after ART's mitigation, and facts."""
    batch = clean.batch(np.arange(len(clean)))
    shown = {goal: batch.y != goal for goal in found}
    before = torch.cat([batch.x[rows] for rows in shown.values()])
    after = torch.cat([found[goal].put(batch.x[rows]) for goal, rows in shown.items()])
    labels = torch.cat([batch.y[rows] for rows in shown.values()])
    goals = torch.cat([torch.full((int(rows.sum()),), goal) for goal, rows in shown.items()])
    hot = functional.one_hot(labels, len(training.info.classes)).float().numpy()
    pruned: list[int] = []
    look = Features(model, (), batch.x[:1].to(training.device), WHO)

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part.to(training.device)).argmax(1).cpu() for part in torch.split(x, 256)])

    def prune(index: int) -> None:
        head = look.head
        if not isinstance(head, nn.Linear):
            raise UsageError(f"{WHO}: the model's last layer is not linear; use mitigation=unlearning")
        pruned.append(int(index))
        with torch.no_grad():
            head.weight[:, int(index)] = 0

    def fit(x: Array, y: Array, **_asked: Any) -> None:
        extra = int(min(len(x), SHOWN * len(clean)))
        order = torch.randperm(len(x), generator=training.stream.generator("shown"))[:extra].numpy()
        images = np.concatenate([batch.x.numpy(), x[order]])
        both = Split(ArrayImages(images), np.concatenate([clean.labels, y[order].argmax(1)]), np.arange(len(images)))
        plan = replace(training.schedule, epochs=epochs, lr=SLOWER * training.schedule.lr)
        replace(training, data=both).fit(model, schedule=plan)

    def effective(*_asked: Any) -> bool:
        return float((answers(after) == goals).float().mean()) > EFFECTIVE

    rate = float((answers(after) == goals).float().mean())
    cleanse = load("art.estimators.poison_mitigation.neural_cleanse.neural_cleanse:NeuralCleanseMixin")(0)
    # ART adds the trigger to images of its own class, and compares scores with labels to see whether it works.
    cleanse.backdoor_examples = lambda _x, _y: (before.numpy(), after.numpy(), hot)
    cleanse.check_backdoor_effective = effective
    cleanse._get_penultimate_layer_activations = lambda x: of_images(look, torch.from_numpy(x))
    cleanse._prune_neuron_at_index = prune
    cleanse._fit_classifier = fit
    with silent():
        cleanse.mitigate(None, None, [mitigation])
    told: dict[str, Any] = {"pruned": len(pruned)} if mitigation == "pruning" else {"epochs": epochs}
    left = float((answers(after) == goals).float().mean())
    return model.eval(), told | {"found_trigger_success": {"before": round(rate, 4), "after": round(left, 4)}}
