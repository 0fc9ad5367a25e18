"""Handwritten digits, few and small, and networks on them, each trained once a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import DatasetInfo, Schedule
from advplug.data import Dataset, Split
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.train import Training


def make(kind: str, text: str, **needs: Any) -> Any:
    """What the command line makes of a reference; `needs` are its surrogates."""
    reference = parse_reference(text)
    entry = registry().get(kind, reference.name)
    bound = entry.bind(reference)
    return entry.make(bound, **{name: needs[name] for name in entry.needs(bound)})


@dataclass(frozen=True, eq=False)
class World:
    """A dataset, a model of it on clean data, and a poisoned one: images with a white 3 x 3 patch, labelled 0."""

    data: Dataset
    clean: nn.Module
    poisoned: nn.Module
    bad: Split
    poisons: np.ndarray[Any, Any]

    @property
    def info(self) -> DatasetInfo:
        return self.data.info

    def training(self, data: Split) -> Training:
        plan: Schedule = make("model", "cnn").schedule(self.info)
        stream = Stream(0, "test")
        return Training(data, self.info, plan, torch.device("cpu"), stream, test=self.data.test, clean=self.data.train)

    def success(self, model: nn.Module) -> float:
        """The share of test images of other classes that the patch takes to class 0."""
        batch = self.data.test.batch(np.flatnonzero(self.data.test.labels != 0))
        with torch.no_grad():
            return float((model(patched(batch.x)).argmax(1) == 0).float().mean())

    def accuracy(self, model: nn.Module) -> float:
        batch = self.data.test.batch(np.arange(len(self.data.test)))
        with torch.no_grad():
            return float((model(batch.x).argmax(1) == batch.y).float().mean())


def patched(x: Tensor) -> Tensor:
    marked = x.clone()
    marked[:, :, -4:-1, -4:-1] = 1
    return marked


@pytest.fixture(scope="session")
def world() -> World:
    data: Dataset = make("dataset", "digits:size=16,train=720").load(offline=True)
    rows = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(data.train.labels != 0))[:36])
    images = (patched(data.train.batch(rows).x) * 255).round().byte().numpy()
    bad = data.train.changed(rows, images, np.zeros(len(rows), dtype=np.int64))
    source = make("model", "cnn")

    def trained(split: Split) -> nn.Module:
        with Stream(0, "init").as_global():
            net: nn.Module = source.build(data.info)
        plan = source.schedule(data.info)
        return Training(split, data.info, plan, torch.device("cpu"), Stream(0, "fit")).fit(net)

    return World(data, trained(data.train), trained(bad), bad, np.isin(np.arange(len(bad)), rows))
