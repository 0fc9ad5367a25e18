"""Targeted data poisoning: copies of a few test images join the training set under the name of another class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from advplug.contracts import DatasetInfo, Poisoned, Targets
from advplug.data import Split
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug_poisoning.rows import Rows, demand_classes, in_bytes
from advplug_poisoning.texts import caption_pool, draw_texts

CAPTION_COPIES, LABEL_COPIES = 6, 3
SHIFT, NOISE = 1, 0.02
"""How copies for classifiers differ: in pixels, and in standard deviations of pixels in [0, 1]."""


@dataclass(frozen=True)
class Targeted:
    """Adds `copies` of each of `targets` test images, with a class that is not theirs.

    Copies with captions are exact, and each has another text that names that class (Carlini and Terzis 2022, arXiv
    2106.09667). Copies with labels (None: LABEL_COPIES) differ but for the first: they are moved by up to
    `shift` pixels, edges repeated, under normal noise of standard deviation `noise`.
    """

    targets: int = 8
    copies: int | None = None
    shift: int | None = None
    noise: float | None = None
    captions: str | None = None

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        """Raises UsageError where there are too few test images or no captions that name another class."""
        classes = demand_classes(info, "tdpa")
        if self.captions is not None and data.captions is None:
            raise UsageError("tdpa: captions has no effect on images without captions; leave it out")
        if self.targets >= len(test):
            raise UsageError(
                f"tdpa: targets={self.targets} of {len(test)} test images leaves none to measure accuracy on; lower it"
            )
        texts = None if data.captions is None else self._texts(data, classes)
        order = torch.randperm(len(test), generator=rng.generator("targets")).numpy()
        rows = np.sort(order[: self.targets])
        wanted = _wanted(test.labels[rows], sorted(texts) if texts else list(range(len(classes))), rng)
        copies = self.copies or (LABEL_COPIES if texts is None else CAPTION_COPIES)
        captions = None if texts is None else self._captions(texts, wanted, copies, rng)
        poisoned = data.joined(
            self._images(test, rows, copies, texts is None, rng), np.repeat(wanted, copies), captions
        )
        added = np.arange(len(poisoned)) >= len(data)
        facts: dict[str, Any] = {
            "poisons": int(added.sum()),
            "rate": float(added.mean()),
            "targets": len(rows),
            "copies": copies,
            "wanted": [f"{classes[a]} as {classes[b]}" for a, b in zip(test.labels[rows], wanted, strict=True)],
        }
        originals = test.subset(np.repeat(rows, copies))
        return Poisoned(poisoned, added, originals, targets=Targets(rows, wanted), facts=facts)

    def _texts(self, data: Split, classes: tuple[str, ...]) -> dict[int, list[str]]:
        """The texts about each class that has some."""
        how = self.captions or "sampled"
        pools = {label: caption_pool(data, label, classes, how) for label in range(len(classes))}
        found = {label: pool for label, pool in pools.items() if pool}
        if len(found) < 2:
            raise UsageError("tdpa: the captions of the training images name no two classes; write captions=templates")
        return found

    def _captions(self, texts: dict[int, list[str]], wanted: Rows, copies: int, rng: Stream) -> list[tuple[str, ...]]:
        return [
            (text,)
            for target, label in enumerate(wanted.tolist())
            for text in draw_texts(texts[label], copies, rng.generator("captions", target))
        ]

    def _images(self, test: Split, rows: Rows, copies: int, labels: bool, rng: Stream) -> Rows:
        """All copies of the first target, then those of the next: uint8 (k, C, H, W)."""
        shift = (SHIFT if labels else 0) if self.shift is None else self.shift
        noise = (NOISE if labels else 0.0) if self.noise is None else self.noise
        made = []
        for row in rows.tolist():
            x = test.batch(np.array([row])).x
            draws = rng.generator("copies", row)
            made += [x, *(_jittered(x, shift, noise, draws) for _ in range(copies - 1))]
        return in_bytes(torch.cat(made))


def _wanted(own: Rows, among: list[int], rng: Stream) -> Rows:
    """For each target a class of `among` other than its own (k,), at random."""
    draws = rng.generator("wanted")
    found = []
    for label in own.tolist():
        others = [c for c in among if c != label]
        found.append(others[int(torch.randint(len(others), (1,), generator=draws))])
    return np.array(found, dtype=np.int64)


def _jittered(x: Tensor, shift: int, noise: float, draws: torch.Generator) -> Tensor:
    """An image (1, C, H, W) moved by up to `shift` pixels, under noise."""
    height, width = x.shape[2:]
    down, right = torch.randint(0, 2 * shift + 1, (2,), generator=draws).tolist()
    wide = functional.pad(x, (shift,) * 4, mode="replicate") if shift else x
    moved = wide[:, :, down : down + height, right : right + width]
    return (moved + noise * torch.randn(x.shape, generator=draws)).clamp(0, 1)
