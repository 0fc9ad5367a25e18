"""A model of images and texts small enough to be checked by hand, with captioned data, registered like a plugin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetCaps,
    DatasetInfo,
    DefenseCaps,
    ModelCaps,
    Spec,
    Tuned,
    Wrap,
)
from advplug.data import ArrayImages, Dataset, Split
from advplug.registry import Entry, Registry, Source, registry

N, CLASSES, SIZE = 24, ("red", "green", "blue"), 6
OWN = 2
"""Captions of each image; the last two images share theirs."""


class Toy(nn.Module):
    """A linear image tower; a text is a random direction, the same for equal texts, pulled toward what it names."""

    def __init__(self, texts: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.tower = nn.Linear(3 * SIZE * SIZE, 16, bias=False)
        with torch.no_grad():
            self.tower.weight.copy_(torch.randn(16, 3 * SIZE * SIZE, generator=g) / 10)
        self.show(texts)

    scale = 10.0
    notes = ("a text was cut",)

    def show(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.columns = torch.stack([self.direction(t) for t in texts])

    def direction(self, text: str) -> Tensor:
        named = torch.zeros(3, SIZE, SIZE)
        for i, name in enumerate(CLASSES):
            named[i] += float(name in text)
        if " thing " in text:
            named = colours().test.batch(np.array([int(text.split()[-1].split(".")[0])])).x[0]
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        own = 0.11 * torch.randn(16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            seen = functional.normalize(self.tower((named - 0.33).flatten()[None])[0], dim=0)
        return functional.normalize(seen + own, dim=0)

    def with_gallery(self, texts: Sequence[str]) -> Toy:
        other = Toy(texts)
        other.tower = self.tower
        other.show(texts)
        return other

    def forward(self, x: Tensor) -> Tensor:
        features = functional.normalize(self.tower(x.flatten(1) - 0.33), dim=1)
        return self.scale * features @ self.columns.to(features).T


def colours(classes: tuple[str, ...] = CLASSES) -> Dataset:
    """Noisy images of one colour, captioned by it."""
    draws = np.random.default_rng(0)
    labels = np.arange(N) % 3
    x = 0.3 + 0.2 * draws.random((N, 3, SIZE, SIZE))
    x[np.arange(N), labels] += 0.25
    x[-1], labels[-1] = x[-2], labels[-2]
    captions = [tuple(f"{CLASSES[y]} thing {i}.{k}" for k in range(OWN)) for i, y in enumerate(labels)]
    captions[-1] = captions[-2]
    info = DatasetInfo(classes, 3, (SIZE, SIZE), {"linf": Fraction(1, 10)}, captions=True)
    split = Split(ArrayImages(x.astype(np.float32)), labels, np.arange(N), tuple(captions))
    return Dataset(info, split, split)


class Colours:
    def __init__(self, classes: tuple[str, ...] = CLASSES) -> None:
        self.classes = classes

    def info(self) -> DatasetInfo:
        return colours(self.classes).info

    def fingerprint(self) -> str:
        return f"colours of {len(self.classes)} classes"

    def load(self, offline: bool = False) -> Dataset:
        return colours(self.classes)


class ToySource:
    def identity(self) -> Mapping[str, Any]:
        return {}

    def misfit(self, info: DatasetInfo) -> str | None:
        return None

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        return Toy(info.classes or ("nothing",))


class OwnWay(ToySource):
    """A source that trains its own way."""

    fits: list[int] = []  # noqa: RUF012 - the tests count in it

    def schedule(self, info: DatasetInfo) -> Any:
        from advplug.contracts import Schedule

        return Schedule(epochs=1)

    def weights_recipe(self) -> Mapping[str, Any]:
        return {"fixed": 1}

    def fit(self, model: nn.Module, training: Any) -> Tuned:
        assert training.test is not None
        self.fits.append(len(training.test))
        return Tuned(model, facts={"fitted_on": len(training.data)})


def lower(steps: int = 10, restarts: int = 1, random_start: bool = True) -> Any:
    """The loss under test, on the engine."""
    from advplug.attacks.engine import GradientAttack

    start = "uniform" if random_start else "clean"
    return GradientAttack(
        steps=steps, fraction=0.25, restarts=restarts, start=start, loss="similarity", keep_going=True
    )


def dimmed() -> tuple[Wrap]:
    """A wrap around the model that hands its scores on."""
    return (Wrap(lambda inner, x, rng: inner(0.9 * x)),)


LOWERS = AttackCaps(
    Access.GRADIENT, frozenset({"linf", "l2"}), frozenset({"minimise", "targeted"}), warm_start=True,
    stochastic=True, modality="image-text",
)  # fmt: skip


def known() -> Registry:
    """Everything that is installed, and these."""
    grown = registry()
    for kind, name, caps, target in (
        ("model", "toy-clip", ModelCaps("classification", "image-text"), "ToySource"),
        ("model", "toy-retrieval", ModelCaps("retrieval", "image-text"), "ToySource"),
        ("model", "toy-trained", ModelCaps("classification", "image-text"), "OwnWay"),
        ("dataset", "colours", DatasetCaps(), "Colours"),
        ("dataset", "captions-only", DatasetCaps(), "captions_only"),
        ("attack", "lower", LOWERS, "lower"),
        ("defense", "dimmed", DefenseCaps(("wrap",)), "dimmed"),
    ):
        params = None if target == "lower" else ()
        spec = Spec(name, f"textmodels:{target}", caps, "for tests", params=params)  # type: ignore[arg-type]
        entry = Entry(kind, spec, Source("textmodels", "textmodels", "1"))
        tables = {**grown.tables, kind: MappingProxyType({**grown.tables[kind], name: entry})}
        grown = replace(grown, tables=MappingProxyType(tables))
    return grown


def captions_only() -> Colours:
    return Colours(())
