"""Conformance of attacks on training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from advplug.contracts import DatasetInfo, PoisonCaps, Poisoned, Trigger
from advplug.data import ArrayImages, Dataset, Split
from advplug.judging import IMAGE_TEXT
from advplug.poisons.prepared import poisoned_by
from advplug.registry import Entry
from advplug.rng import Stream
from advplug.testing.problems import fragile
from advplug.testing.report import Report, Result, require
from advplug.victim import Victim

CLASSES = ("zero", "one", "two", "three", "four")
TRAIN, TEST, SIDE = 100, 60, 16


def poison_results(entry: Entry, caps: PoisonCaps, params: Mapping[str, Any]) -> list[Result]:
    """One result a check and kind of data."""
    report = Report()
    report.check("declaration", lambda: _declaration(caps))
    for modality in sorted(caps.modalities & {"image", IMAGE_TEXT}):
        channels = 3 if modality == IMAGE_TEXT or caps.channels == (3,) else 1
        case = _Case(entry, caps, params, channels, modality == IMAGE_TEXT)
        if report.check(f"{modality}: runs", lambda case=case: case.made):  # type: ignore[misc]
            for label, test in case.checks().items():
                report.check(f"{modality}: {label}", test)
    return report.results


def _declaration(caps: PoisonCaps) -> None:
    known = {"image", IMAGE_TEXT}
    require(caps.modalities and caps.modalities <= known, f"modalities must be among {', '.join(sorted(known))}")
    require(caps.min_classes >= 2, "min_classes must be at least 2")


@dataclass
class _Case:
    """One attack on a small set of noise."""

    entry: Entry
    caps: PoisonCaps
    params: Mapping[str, Any]
    channels: int
    captioned: bool

    def split(self, n: int, first: int) -> Split:
        draws = np.random.default_rng(first)
        images = draws.integers(0, 256, (n, self.channels, SIDE, SIDE), dtype=np.uint8)
        labels = np.arange(n) % len(CLASSES)
        texts = tuple((f"a photo of the digit {CLASSES[y]}",) for y in labels) if self.captioned else None
        return Split(ArrayImages(images), labels, np.arange(n), texts)

    @cached_property
    def dataset(self) -> Dataset:
        info = DatasetInfo(CLASSES, self.channels, (SIDE, SIDE), {}, captions=self.captioned)
        return Dataset(info, self.split(TRAIN, 1), self.split(TEST, 2))

    def run(self) -> Poisoned:
        wanted = self.entry.needs(self.params)
        twins = {name: Victim(fragile(self.channels, len(CLASSES)), len(CLASSES)) for name in wanted}
        attack = self.entry.make(self.params, **twins)
        return poisoned_by(attack, self.dataset, Stream(0, "kit"), self.entry.name)

    @cached_property
    def made(self) -> Poisoned:
        return self.run()

    def checks(self) -> dict[str, Callable[[], None]]:
        checks: dict[str, Callable[[], None]] = {
            "repeats itself": self.repeats,
            "leaves its input alone": self.pure,
            "records what it changed": self.recorded,
        }
        if self.caps.clean_label:
            checks["labels stay"] = self.clean_labels
        if self.made.trigger is not None:
            checks["trigger"] = self.triggers
        return checks

    def repeats(self) -> None:
        again = self.run()
        rows = np.arange(len(again.data))
        require(len(again.data) == len(self.made.data), "the same seed gives another number of images")
        same = torch.equal(again.data.batch(rows).x, self.made.data.batch(rows).x)
        require(same and np.array_equal(again.data.labels, self.made.data.labels), "the same seed gives other poisons")
        require(again.data.captions == self.made.data.captions, "the same seed gives other captions")

    def pure(self) -> None:
        fresh, rows = self.split(TRAIN, 1), np.arange(TRAIN)
        kept = self.dataset.train
        require(torch.equal(kept.batch(rows).x, fresh.batch(rows).x), "it writes into the images that it is given")
        require(np.array_equal(kept.labels, fresh.labels), "it writes into the labels that it is given")

    def recorded(self) -> None:
        made, data = self.made, self.dataset.train
        poisons = np.asarray(made.poisons)
        require(poisons.any(), "it poisons nothing by default")
        old = np.flatnonzero(~poisons)
        source = np.searchsorted(data.index, made.data.index[old])
        require((source < len(data)).all(), "images that it added are not marked as poisons")
        same = torch.equal(made.data.batch(old).x, data.batch(source).x)
        require(same, "images that are not marked as poisons were changed")
        require(np.array_equal(made.data.labels[old], data.labels[source]), "labels of others than poisons changed")
        if data.captions is not None and made.data.captions is not None:
            said = [made.data.captions[i] for i in old] == [data.captions[i] for i in source]
            require(said, "captions of others than poisons changed")

    def clean_labels(self) -> None:
        poisons = np.flatnonzero(self.made.poisons)
        same = np.array_equal(self.made.data.labels[poisons], self.made.originals.labels)
        require(same, "it declares true labels and changes some")

    def triggers(self) -> None:
        trigger = self.made.trigger
        assert isinstance(trigger, Trigger)
        batch = self.dataset.test.batch(np.arange(12))
        before = batch.x.clone()
        marked = trigger.apply(batch.x, batch.index)
        require(torch.equal(batch.x, before), "the trigger writes into the images that it is given")
        require(marked.shape == before.shape, f"the trigger makes {tuple(marked.shape)} of {tuple(before.shape)}")
        require(bool((marked >= -1e-6).all() and (marked <= 1 + 1e-6).all()), "triggered images leave [0, 1]")
        require(not torch.equal(marked, before), "the trigger changes nothing")
        alone = torch.cat([trigger.apply(batch.x[i : i + 1], batch.index[i : i + 1]) for i in range(12)])
        require(torch.allclose(alone, marked, atol=1e-6), "an image's trigger depends on the rest of its batch")
        wanted = trigger.wanted(batch.y)
        require(wanted.shape == batch.y.shape, "`wanted` gives one class an image")
        require(bool((wanted >= 0).all() and (wanted < len(CLASSES)).all()), "`wanted` gives classes there are not")
