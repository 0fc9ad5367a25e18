"""The conformance kit on models, datasets and metrics: each planted fault trips its own check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import (
    DatasetCaps,
    DatasetInfo,
    MetricCaps,
    ModelCaps,
    Schedule,
)
from advplug.data import ArrayImages, Dataset, Split
from advplug.estimate import Estimate, rate
from advplug.testing import check_dataset, check_metric, check_model
from planting import breaches, numbers


class Net(nn.Module):
    """A linear classifier of digits of any size, with a fault on request."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.LazyLinear(10)
        self.secret = float(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "in place":
            x.sub_(0.5)
        x = x.detach() if self.fault == "detached" else x
        x = x - x.mean(0, keepdim=True) if self.fault == "batch" else x
        logits: Tensor = self.linear(x.flatten(1))
        if self.fault == "probabilities":
            return logits.softmax(1)
        if self.fault == "hidden state":
            return logits + self.secret
        return logits[:, :5] if self.fault == "columns" else logits.double() if self.fault == "double" else logits


class Source_:
    """A model source with a fault on request."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.number = next(numbers)

    def identity(self) -> Mapping[str, Any]:
        if self.fault == "identity":
            return {"n": self.number}
        return {"x": object()} if self.fault == "json" else {}

    def misfit(self, info: DatasetInfo) -> str | None:
        return "too small; use another" if self.fault == "misfit" else None

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return Schedule()

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        if self.fault == "dtype":
            torch.set_default_dtype(torch.float64)
        net = Net(self.fault)
        net(torch.zeros(1, info.channels, *info.size))
        if self.fault == "unseeded":
            with torch.no_grad():
                net.linear.weight.add_(self.number + next(numbers))
        return net


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("misfit", ""),
        ("identity", "identity: identity() changes"),
        ("json", "identity: identity() must be JSON-ready"),
        ("unseeded", "same seed, same weights: two builds from one seed differ"),
        ("dtype", "builds: it leaves changed: torch's default dtype"),
        ("probabilities", "logits: these look like probabilities"),
        ("columns", "logits: logits must be (B, K) = (4, 10), they are (4, 5)"),
        ("double", "logits: logits must be float32"),
        ("in place", "logits: it changed its input in place"),
        ("detached", "input gradients: raised RuntimeError"),
        ("batch", "answers image by image: logits change by"),
        ("hidden state", "weights can be stored and restored: its state_dict does not hold"),
    ],
)
def test_faults_of_models_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_model, plant("model", ModelCaps(), lambda: Source_(fault)))
    torch.set_default_dtype(torch.float32)
    assert found in text
    assert bool(found) == bool(text)


class Images_:
    """A dataset source with a fault on request."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.number = next(numbers)

    def info(self) -> DatasetInfo:
        names = ("a", "a") if self.fault == "names" else ("a", "b")
        budgets = {} if self.fault == "budgets" else {"linf": Fraction(9 if self.fault == "eps" else 1, 8)}
        return DatasetInfo(names, 1, (4, 4), budgets, images=9 if self.fault == "images" else 20)

    def fingerprint(self) -> str:
        return str(self.number) if self.fault == "fingerprint" else "fixed"

    def load(self, offline: bool = False) -> Dataset:
        if self.fault == "global":
            np.random.rand()
        draws = np.random.default_rng(self.number if self.fault == "order" else 0)
        x = draws.random((40, 1, 4, 5 if self.fault == "shape" else 4), dtype=np.float32)
        x = x + 1 if self.fault == "range" else x
        y = draws.integers(0, 3 if self.fault == "labels" else 2, 40)
        index = np.zeros(40, dtype=int) if self.fault == "index" else np.arange(40)
        y[0] = 2 if self.fault == "labels" else y[0]
        train, test = slice(0, 30), slice(20 if self.fault == "leak" else 30, 40)
        return Dataset(self.info(), *(Split(ArrayImages(x[s]), y[s], index[s]) for s in (train, test)))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("names", "facts: class names must differ"),
        ("images", "loads: info() tells of 9 test images, there are "),
        ("budgets", "facts: it needs a customary budget"),
        ("eps", "facts: pixels lie in [0, 1]"),
        ("fingerprint", "fingerprint: fingerprint() changes"),
        ("global", "leaves the process as it was: it leaves changed: the global random state of NumPy"),
        ("order", "train split is the same each time"),
        ("shape", "train split: images must be (8, 1, 4, 4)"),
        ("range", "train split: images must hold numbers in [0, 1]"),
        ("labels", "train split: labels 0 to 2 for 2 classes"),
        ("index", "train split: index holds a position twice"),
        ("leak", "test images are not trained on: 10 of 64"),
    ],
)
def test_faults_of_datasets_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_dataset, plant("dataset", DatasetCaps(embedded=True), lambda: Images_(fault)))
    assert found in text
    assert bool(found) == bool(text)


# --- metrics ---


def mean_of(fault: str) -> Callable[[Any], Mapping[str, Any]]:
    def measure(evidence: Any) -> Mapping[str, Any]:
        value = rate(float(evidence.clean.mean(1).sum()), evidence.n)
        if fault == "nan":
            value = Estimate(float("nan"), None, None, evidence.n)
        if fault == "order":
            value = rate(float(evidence.y[0]) / 3, evidence.n)
        if fault == "writes":
            evidence.clean[:] = True
        if fault == "optional":
            value = rate(float(evidence.static.sum()) / evidence.draws, evidence.n)
        return {"other" if fault == "name" else "mine": value.value if fault == "number" and value else value}

    return measure


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ""),
        ("nan", "mine is nan; None means unknown"),
        ("order", "mine changes with the order of the images"),
        ("writes", "it changed the evidence"),
        ("name", "it returned ['other'], its caps say ['mine']"),
        ("number", "mine must be an Estimate or None"),
        ("optional", "an attack that tells nothing of itself: raised AttributeError"),
    ],
)
def test_faults_of_metrics_are_found(fault: str, found: str, plant: Callable[..., str]) -> None:
    text = breaches(check_metric, plant("metric", MetricCaps(("mine",)), lambda: mean_of(fault)))
    assert found in text
    assert bool(found) == bool(text)
