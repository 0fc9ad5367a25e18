"""Conformance of models and datasets, and what the other checks need of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.contracts import DatasetCaps, DatasetInfo, DatasetSource, ModelSource, Schedule
from advplug.data import Dataset, Split
from advplug.errors import UsageError
from advplug.parse import Reference
from advplug.perturbations import SETS
from advplug.registry import Entry, registry
from advplug.rng import Stream
from advplug.testing.report import Breach, Report, Result, Unchecked, require
from advplug.testing.state import unchanged

IMAGES = 4


def bound(entry: Entry, params: Mapping[str, Any]) -> dict[str, Any]:
    """Checked parameters from Python values or their text. Raises UsageError."""
    texts = tuple((name.rstrip("_"), _text(value)) for name, value in params.items())
    return entry.bind(Reference(entry.name, texts))


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ":".join(map(_text, value))
    return "none" if value is None else str(value)


def dataset_source(name: str) -> DatasetSource:
    """The source of a dataset, with default parameters."""
    entry = registry().get("dataset", name)
    source: DatasetSource = entry.make(bound(entry, {}))
    return source


# --- models ----------------------------------------------------------------------------------------


def model_results(name: str, params: Mapping[str, Any], on: str) -> list[Result]:
    """One result a check. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("model", name)
    checked = bound(entry, params)
    report = Report()
    info = dataset_source(on).info()
    sources: list[ModelSource] = []
    if not report.check("factory", lambda: sources.append(entry.make(checked))):
        return report.results
    source = sources[0]
    report.check("identity", lambda: _identity(source, entry.make(checked)))
    report.check("schedule", lambda: _schedule(source, info))
    if report.check(f"fits {on}", lambda: _fits(source, info)):
        built: list[nn.Module] = []
        if report.check("builds", lambda: built.append(_build(source, info))):
            module, x = built[0], _images(info)
            report.check("logits", lambda: _logits(module, x, info))
            report.check("input gradients", lambda: _gradient(module, x))
            report.check("answers image by image", lambda: _image_by_image(module, x))
            report.check("same seed, same weights", lambda: _same(module, _build(source, info), x))
            report.check("weights can be stored and restored", lambda: _restore(source, module, info, x))
    return report.results


def _identity(source: ModelSource, again: ModelSource) -> None:
    identity = source.identity()
    try:
        text = json.dumps(identity, sort_keys=True)
    except TypeError as error:
        raise Breach(f"identity() must be JSON-ready: {error}") from error
    require(json.dumps(again.identity(), sort_keys=True) == text, "identity() changes from one source to the next")


def _schedule(source: ModelSource, info: DatasetInfo) -> None:
    schedule = source.schedule(info)
    require(schedule is None or isinstance(schedule, Schedule), "schedule() must be a Schedule or None")


def _fits(source: ModelSource, info: DatasetInfo) -> None:
    reason = source.misfit(info)
    require(reason is None or isinstance(reason, str), "misfit() must be a sentence or None")
    if reason is not None:
        raise Unchecked(reason)


def _build(source: ModelSource, info: DatasetInfo) -> nn.Module:
    # The engine seeds the global generators for a build, which may draw from them and change nothing else.
    with unchanged(), Stream(0, "init").as_global():
        module = source.build(info, offline=True)
    require(isinstance(module, nn.Module), f"build() must return a module, it returned {type(module).__name__}")
    return module.eval()


def _images(info: DatasetInfo) -> Tensor:
    return torch.rand(IMAGES, info.channels, *info.size, generator=torch.Generator().manual_seed(0))


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(x)
    return logits


def _logits(module: nn.Module, x: Tensor, info: DatasetInfo) -> None:
    kept = x.clone()
    with unchanged(module):
        logits = _forward(module, x)
    require(isinstance(logits, Tensor), f"the module must return logits, it returned {type(logits).__name__}")
    want = (len(x), len(info.classes))
    require(tuple(logits.shape) == want, f"logits must be (B, K) = {want}, they are {tuple(logits.shape)}")
    require(logits.isfinite().all(), "logits must be finite")
    require(logits.dtype == torch.float32, f"logits must be float32, they are {logits.dtype}")
    require(torch.equal(x, kept), "it changed its input in place")
    summed = logits.exp().sum(1)
    ranged = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    require(not ranged, f"these look like probabilities, not logits: rows sum to 1 (exp: {float(summed[0]):.3g})")


def _gradient(module: nn.Module, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).log_softmax(1)[:, 0].sum(), leaf)
    require(gradient.isfinite().all(), "input gradients must be finite")
    require((gradient.flatten(1).abs().sum(1) > 0).all(), "an image has no input gradient; normalise without detaching")


def _image_by_image(module: nn.Module, x: Tensor) -> None:
    together = _forward(module, x)
    alone = torch.cat([_forward(module, x[i : i + 1]) for i in range(len(x))])
    gap = float((together - alone).abs().max() / together.abs().max().clamp_min(1e-6))
    require(gap < 1e-3, f"logits change by {gap:.1e} of their size with the rest of the batch")


def _same(module: nn.Module, again: nn.Module, x: Tensor) -> None:
    require(torch.equal(_forward(module, x), _forward(again, x)), "two builds from one seed differ")


def _restore(source: ModelSource, module: nn.Module, info: DatasetInfo, x: Tensor) -> None:
    with Stream(1, "other").as_global():
        other = source.build(info, offline=True).eval()
    other.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    require(
        torch.equal(_forward(module, x), _forward(other, x)), "its state_dict does not hold all that it computes with"
    )


# --- datasets --------------------------------------------------------------------------------------


def dataset_results(name: str, params: Mapping[str, Any]) -> list[Result]:
    """One result a check. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("dataset", name)
    checked = bound(entry, params)
    report = Report()
    sources: list[DatasetSource] = []
    if not report.check("factory", lambda: sources.append(entry.make(checked))):
        return report.results
    source = sources[0]
    report.check("facts", lambda: _facts(source.info()))
    report.check("fingerprint", lambda: _fingerprint(source, entry.make(checked)))
    loaded: list[Dataset] = []
    caps: DatasetCaps = entry.spec.caps  # type: ignore[assignment]
    if report.check("loads", lambda: loaded.append(_load_if_here(source, caps.embedded))):
        info, dataset = source.info(), loaded[0]
        report.check("leaves the process as it was", lambda: loaded.append(_load_again(entry.make(checked))))
        second = loaded[-1]
        for part in ("train", "test"):
            split: Split = getattr(dataset, part)
            report.check(f"{part} split", lambda split=split: _split(split, info))  # type: ignore[misc]
            again: Split = getattr(second, part)
            report.check(
                f"{part} split is the same each time",
                lambda split=split, again=again: _same_split(split, again),  # type: ignore[misc]
            )
        report.check("test images are not trained on", lambda: _disjoint(dataset))
    return report.results


def _facts(info: DatasetInfo) -> None:
    require(isinstance(info, DatasetInfo), f"info() must be DatasetInfo, it is {type(info).__name__}")
    require(len(info.classes) >= 2 or (info.captions and not info.classes), "it needs two classes or more, or captions")
    require(len(set(info.classes)) == len(info.classes), "class names must differ")
    require(info.budgets, "it needs a customary budget, for example {'linf': Fraction(8, 255)}")
    require(set(info.budgets) <= set(SETS), f"budgets are for the norms {', '.join(SETS)}")
    require(all(eps > 0 for eps in info.budgets.values()), "budgets must be positive")
    require(info.budgets.get("linf", 0) <= 1, "pixels lie in [0, 1]: an L-inf budget is at most 1")
    require(info.evaluate is None or info.evaluate > 0, "evaluate must be positive or None")


def _fingerprint(source: DatasetSource, again: DatasetSource) -> None:
    text = source.fingerprint()
    require(isinstance(text, str) and text, "fingerprint() must be a text")
    require(again.fingerprint() == text, "fingerprint() changes from one source to the next")


def _load_if_here(source: DatasetSource, embedded: bool) -> Dataset:
    try:
        return _load(source)
    except UsageError as error:
        if embedded:
            raise
        raise Unchecked(str(error)) from error


def _load_again(source: DatasetSource) -> Dataset:
    """The second time, when imports, which may do as they like, are behind us."""
    with unchanged():
        return _load(source)


def _load(source: DatasetSource) -> Dataset:
    dataset = source.load(offline=True)
    require(isinstance(dataset, Dataset), f"load() must return a Dataset, it returned {type(dataset).__name__}")
    require(dataset.info == source.info(), "Dataset.info differs from info()")
    most, n = dataset.info.images, len(dataset.test)
    require(most is None or most >= n, f"info() tells of {most} test images, there are {n}")
    return dataset


def _split(split: Split, info: DatasetInfo) -> None:
    n = len(split)
    require(n > 0, "it holds no images")
    require(len(split.images) == n == len(split.index), "images, labels and index differ in length")
    require(split.labels.dtype.kind in "iu", f"labels must be whole numbers, they are {split.labels.dtype}")
    low, high = int(split.labels.min()), int(split.labels.max())
    require(low >= 0 and high < max(1, len(info.classes)), f"labels {low} to {high} for {len(info.classes)} classes")
    if info.captions:
        texts = split.captions or ()
        require(len(texts) == n and all(texts), "every image needs captions of its own")
    require(len(np.unique(split.index)) == n, "index holds a position twice")
    rows = np.linspace(0, n - 1, min(n, 2 * IMAGES)).astype(int)
    batch = split.batch(rows)
    want = (len(rows), info.channels, *info.size)
    require(tuple(batch.x.shape) == want, f"images must be {want}, they are {tuple(batch.x.shape)}")
    require(batch.x.dtype == torch.float32, f"images must be float32, they are {batch.x.dtype}")
    require(torch.equal(batch.x[-1], split.batch(rows[-1:]).x[0]), "an image changes with the batch it is taken in")


def _same_split(split: Split, again: Split) -> None:
    require(np.array_equal(split.labels, again.labels), "labels differ between two loads")
    require(np.array_equal(split.index, again.index), "the order differs between two loads")
    rows = np.arange(min(len(split), IMAGES))
    require(torch.equal(split.batch(rows).x, again.batch(rows).x), "images differ between two loads")


def _disjoint(dataset: Dataset) -> None:
    def digests(split: Split) -> set[int]:
        rows = np.linspace(0, len(split) - 1, min(len(split), 64)).astype(int)
        return {hash(image.numpy().tobytes()) for image in split.batch(rows).x}

    shared = len(digests(dataset.train) & digests(dataset.test))
    require(shared == 0, f"{shared} of 64 test images looked at are training images too")
