"""Backdoors: training images get a trigger, and labels or captions that name another class."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from advplug.contracts import DatasetInfo, Poisoned, Trigger
from advplug.data import Split
from advplug.errors import UsageError
from advplug.naming import naming, word_of
from advplug.rng import Stream
from advplug_poisoning.rows import Rows, changed_images, class_of, demand_classes, pick
from advplug_poisoning.settings import TriggerSettings
from advplug_poisoning.texts import caption_pool, draw_texts
from advplug_poisoning.triggers import build, drawn_anew

Mode: TypeAlias = Literal["all-to-one", "all-to-all"]
Label: TypeAlias = Literal["dirty", "consistent"]
RATE = 0.1
"""As in BackdoorBench."""


@dataclass(frozen=True)
class Backdoor:
    """Changes `count` training images, or the share `rate` of them (neither: RATE).

    Dirty labels: images of other classes get the trigger, the label of `target` (None: the first class) and, where
    the data have captions, captions that name it (Gu et al. 2017, arXiv 1708.06733; Carlini and Terzis 2022, arXiv
    2106.09667). `all-to-all`: any image gets the class after its own. Consistent labels: images of the target whose
    captions name it get the trigger and nothing else (Turner et al. 2019, arXiv 1912.02771); `rate` is then a share
    of these.
    """

    trigger: TriggerSettings
    target: str | None = None
    count: int | None = None
    rate: float | None = None
    mode: Mode = "all-to-one"
    label: Label = "dirty"
    captions: str | None = None

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        """Raises UsageError where too few images qualify, the trigger does not fit or there is no such class."""
        classes = demand_classes(info, "ba")
        if self.captions is not None and data.captions is None:
            raise UsageError("ba: captions has no effect on images without captions; leave it out")
        target = None if self.mode == "all-to-all" else self._target(classes)
        apply = build(self.trigger, info.channels, info.size, rng.child("trigger"))
        wanted = functools.partial(_wanted, target, len(classes))
        pool = self._qualified(data, classes, target)
        rows = pick(pool, self._amount(len(data), len(pool)), rng.generator("rows"))
        labels = wanted(torch.from_numpy(data.labels[rows])).numpy()
        dirty = self.label == "dirty"
        poisoned = data.changed(
            rows,
            changed_images(data, rows, apply),
            labels if dirty else None,
            self._captions(data, rows, labels, classes, rng) if dirty and data.captions is not None else None,
        )
        poisons = np.zeros(len(data), dtype=bool)
        poisons[rows] = True
        facts: dict[str, Any] = {
            "poisons": len(rows),
            "rate": len(rows) / len(data),
            "qualified": len(pool),
            "trigger": self.trigger.kind,
            "target": "the next class" if target is None else classes[target],
            "label": self.label,
        }
        return Poisoned(poisoned, poisons, data.subset(rows), Trigger(drawn_anew(apply), wanted), facts=facts)

    def _target(self, classes: tuple[str, ...]) -> int:
        return 0 if self.target is None else class_of(self.target, classes)

    def _qualified(self, data: Split, classes: tuple[str, ...], target: int | None) -> Rows:
        if target is None:
            return np.arange(len(data))
        if self.label == "dirty":
            return np.flatnonzero(data.labels != target)
        rows = np.flatnonzero(data.labels == target)
        if data.captions is None:
            return rows
        named = naming(word_of(classes[target]))
        rows = np.array([r for r in rows if any(map(named, data.captions[int(r)]))], dtype=np.int64)
        if not len(rows):
            raise UsageError(
                f"ba: no caption of a training image of '{classes[target]}' has that word, as label=consistent needs; "
                "choose another target or label=dirty"
            )
        return rows

    def _amount(self, images: int, qualified: int) -> int:
        of = images if self.label == "dirty" else qualified
        rate = RATE if self.rate is None else self.rate
        count = round(rate * of) if self.count is None else self.count
        asked = f"rate={rate:g}" if self.count is None else f"count={count}"
        if not count:
            raise UsageError(f"ba: {asked} of {of} images is none; raise it, or write count=1")
        if count > qualified:
            raise UsageError(
                f"ba: {asked} asks for {count} poisons, {qualified} of the {images} training images qualify; lower it"
            )
        return count

    def _captions(
        self, data: Split, rows: Rows, labels: Rows, classes: tuple[str, ...], rng: Stream
    ) -> list[tuple[str, ...]]:
        """As many texts about its new class for each image as it had."""
        assert data.captions is not None
        how = self.captions or "sampled"
        found: dict[int, tuple[str, ...]] = {}
        for label in np.unique(labels).tolist():
            pool = caption_pool(data, label, classes, how)
            if not pool:
                raise UsageError(
                    f"ba: no caption of a training image of '{classes[label]}' has that word; write captions=templates"
                )
            mine = rows[labels == label].tolist()
            amounts = [max(1, len(data.captions[row])) for row in mine]
            texts = iter(draw_texts(pool, sum(amounts), rng.generator("captions", label)))
            found |= {row: tuple(next(texts) for _ in range(n)) for row, n in zip(mine, amounts, strict=True)}
        return [found[row] for row in rows.tolist()]


def _wanted(target: int | None, classes: int, y: Tensor) -> Tensor:
    """The class that images of class y (B,) are to be taken for; without a target the one after theirs."""
    return (y + 1) % classes if target is None else torch.full_like(y, target)
