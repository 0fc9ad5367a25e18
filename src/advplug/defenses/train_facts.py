"""What adversarial training has to say of itself: measured on training images that were held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.ball import distance
from advplug.contracts import Batch
from advplug.data import Split
from advplug.defenses.adversarial import Ascent, Examples, worst_cross_entropy
from advplug.estimate import paired_p_value
from advplug.health import SIGNIFICANCE
from advplug.train import Training

HELD_BACK = 256
"""Training images that are held back, at most a tenth of them."""
OVERFITTED = 0.2
"""Accuracy under FGSM less that under PGD from which on training against one step is said to have failed."""
PGD_STEPS = 10


def hold_back(training: Training) -> tuple[Training, Split]:
    """The training without a few images, and these; drawn from the training's stream."""
    data = training.data
    count = min(HELD_BACK, len(data) // 10)
    order = torch.randperm(len(data), generator=training.stream.generator("held back")).numpy()
    return replace(training, data=data.subset(np.sort(order[count:]))), data.subset(np.sort(order[:count]))


def overfitting(model: nn.Module, held: Split, training: Training, norm: str, eps: float) -> dict[str, Any]:
    """Accuracy on `held` under FGSM and under PGD at the training's budget; with a warning where the first is far
    above the second, paired and significant: catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994,
    section 5)."""
    if not len(held):
        return {}
    classes = len(training.info.classes)
    attacks = {
        "fgsm": Ascent(norm, eps, 1, eps, "clean"),
        "pgd": Ascent(norm, eps, PGD_STEPS, 2.5 * eps / PGD_STEPS),
    }
    right = {}
    for name, ascent in attacks.items():
        make = worst_cross_entropy(ascent, classes)
        right[name] = torch.cat(list(_each(model, held, training, name, lambda b, x: model(x).argmax(1) == b.y, make)))
    fgsm, pgd = (right[name].double().mean().item() for name in ("fgsm", "pgd"))
    facts: dict[str, Any] = {"held_back": len(held), "fgsm_accuracy": round(fgsm, 4), "pgd_accuracy": round(pgd, 4)}
    only = [int((right[a] & ~right[b]).sum()) for a, b in (("fgsm", "pgd"), ("pgd", "fgsm"))]
    if fgsm - pgd > OVERFITTED and paired_p_value(*only) < SIGNIFICANCE:
        facts["warnings"] = [
            f"catastrophic overfitting: on {len(held)} held-back training images {100 * fgsm:.0f} % hold against FGSM "
            f"and {100 * pgd:.0f} % against PGD; train with several steps, such as attack=(pgd:steps=7)"
        ]
    return facts


def median_size(model: nn.Module, held: Split, training: Training, examples: Examples) -> dict[str, Any]:
    """The median L2 size of what the trained model's examples change on `held`; images that are wrong without a change
    are left out, and where that leaves none it is None."""
    if not len(held):
        return {}
    sizes = torch.cat(list(_each(model, held, training, "size", lambda b, x: distance(b.x, x, "l2"), examples)))
    changed = sizes[sizes > 0]
    return {"held_back": len(held), "median_l2": round(changed.median().item(), 4) if len(changed) else None}


def _each(
    model: nn.Module,
    held: Split,
    training: Training,
    name: str,
    read: Callable[[Batch, Tensor], Tensor],
    examples: Examples,
) -> Iterator[Tensor]:
    """`read` (batch, adversarial images), batch by batch, on the CPU."""
    model.eval()
    stream = training.stream.child("facts", name)
    for number, batch in enumerate(held.batches(training.schedule.batch_size, training.device)):
        made = examples(model, batch.x, batch.y, stream.child(number))
        with torch.no_grad():
            yield read(batch, made).cpu()
