"""Conformance of what a defense does to data and training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.contracts import Objective, Schedule, Sift, Sifted, TrainingData, Tuned
from advplug.data import Dataset, Split
from advplug.errors import AdvplugError
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.problems import fragile
from advplug.testing.report import Unchecked, require
from advplug.testing.sources import bound, dataset_source
from advplug.testing.state import fingerprint, unchanged
from advplug.train import Training


@cache
def digits() -> Dataset:
    """The embedded handwritten digits."""
    return dataset_source("digits").load(offline=True)


def objective_checks(stage: Objective) -> dict[str, Callable[[], None]]:
    return {"objective": lambda: _objective(stage)}


def _objective(stage: Objective) -> None:
    batch = digits().train.batch(np.arange(8))
    module = fragile(batch.x.shape[1], len(digits().info.classes)).train()
    kept = batch.x.clone(), batch.y.clone()
    modes = [m.training for m in module.modules()]
    # The loop trains with seeded global generators; dropout draws from them.
    with Stream(0, "objective").as_global():
        loss = stage.loss(module, batch.x, batch.y, Stream(0, "objective"))
    require(isinstance(loss, Tensor) and loss.shape == (), "loss must be a scalar tensor")
    require(bool(loss.isfinite()), f"the loss is {loss.item():g}")
    require([m.training for m in module.modules()] == modes, "it leaves the model in another mode")
    require(torch.equal(batch.x, kept[0]) and torch.equal(batch.y, kept[1]), "it changes the batch in place")
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    alive = any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
    require(alive, "the loss has no gradient to the parameters")


def data_checks(stage: TrainingData) -> dict[str, Callable[[], None]]:
    return {"data": lambda: _data(stage)}


def _data(stage: TrainingData) -> None:
    train, info = digits().train, digits().info
    given = train.subset(np.arange(min(len(train), 200)))
    labels = given.labels.copy()
    with unchanged():
        first, again = stage.apply(given, Stream(0, "data")), stage.apply(given, Stream(0, "data"))
    require(isinstance(first, Split), f"it must return a Split, it returned {type(first).__name__}")
    require(np.array_equal(given.labels, labels), "it changes the labels in place")
    require(len(first) >= 2, f"{len(first)} images are left")
    require(len(first.images) == len(first.labels) == len(first.index), "images, labels and index differ in length")
    require(first.labels.min() >= 0 and first.labels.max() < len(info.classes), "a label is no class")
    batch = first.batch(np.arange(len(first)))
    require(np.array_equal(first.labels, again.labels), "the same stream gives other labels")
    require(torch.equal(batch.x, again.batch(np.arange(len(again))).x), "the same stream gives other images")


def sift_checks(stage: Sift, on: str) -> dict[str, Callable[[], None]]:
    return {"sift": lambda: _sift(stage, on)}


def _sift(stage: Sift, on: str) -> None:
    """Twice over the same images, through a model that a few steps have trained."""
    dataset = digits()
    entry = registry().get("model", on)
    source = entry.make(bound(entry, {}))
    if source.misfit(dataset.info):
        raise Unchecked(source.misfit(dataset.info))
    with Stream(0, "init").as_global():
        model = source.build(dataset.info, offline=True).eval()

    def sifted() -> Any:
        training = training_of(dataset, source.schedule(dataset.info))
        with training.stream.as_global("sift"):
            return stage.apply(lambda: copy.deepcopy(model), training)

    try:
        first, again = sifted(), sifted()
    except AdvplugError as refusal:
        raise Unchecked(f"it does not take '{on}': {refusal}; name a model that it takes (on=...)") from refusal
    require(isinstance(first, Sifted), f"it must return Sifted, it returned {type(first).__name__}")
    kept = np.asarray(first.kept)
    given = len(training_of(dataset, None).data)
    require(
        kept.shape == (given,) and kept.dtype == bool, f"kept must be ({given},) bool, it is {kept.shape} {kept.dtype}"
    )
    require(kept.sum() >= 2, f"{kept.sum()} images are left")
    require(np.array_equal(kept, again.kept), "the same stream keeps other images")
    require(is_json(first.facts), "its facts must be figures that JSON can hold")


def is_json(facts: Any) -> bool:
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def training_of(dataset: Dataset, schedule: Schedule | None, seed: int = 0) -> Training:
    short = replace(schedule or Schedule(), epochs=1)
    few = dataset.train.subset(np.arange(min(len(dataset.train), 128)))
    return Training(few, dataset.info, short, torch.device("cpu"), Stream(seed, "tune"))


def trains(apply: Callable[..., Any], rebuild: Callable[..., nn.Module] | None, on: str) -> None:
    dataset = digits()
    entry = registry().get("model", on)
    source = entry.make(bound(entry, {}))
    if source.misfit(dataset.info):
        raise Unchecked(source.misfit(dataset.info))

    def fresh() -> nn.Module:
        with Stream(0, "init").as_global():
            built: nn.Module = source.build(dataset.info, offline=True)
        return built.eval()

    model = fresh()
    before = fingerprint(model)
    training = training_of(dataset, source.schedule(dataset.info))
    try:
        tuned = apply(copy.deepcopy(model), training)
    except AdvplugError as refusal:
        raise Unchecked(f"it does not take '{on}': {refusal}; name a model that it takes (on=...)") from refusal
    require(isinstance(tuned, Tuned), f"it must return Tuned, it returned {type(tuned).__name__}")
    require(fingerprint(model) == before, "it changes the original model or the process (random states, settings)")
    x = dataset.test.batch(np.arange(8)).x
    with torch.no_grad():
        logits = tuned.model.eval()(x)
        require(tuple(logits.shape) == (8, len(dataset.info.classes)), "the tuned model's logits have another shape")
        require(logits.isfinite().all(), "the tuned model's logits are not finite")
        restored = fresh() if rebuild is None else rebuild(fresh(), tuned.structure)
        require(rebuild is not None or not tuned.structure, "structure without rebuild cannot be restored")
        restored.load_state_dict(tuned.model.state_dict())
        require(torch.equal(restored.eval()(x), logits), "stored and rebuilt, the tuned model answers otherwise")
