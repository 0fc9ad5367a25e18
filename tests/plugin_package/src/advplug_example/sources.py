"""A dataset drawn by a few lines of NumPy, and a model for it. Neither imports torch before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from advplug.contracts import DatasetInfo, Schedule
from advplug.data import ArrayImages, Dataset, Split
from advplug.params import Param

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Bars:
    """Noisy gray images of `size` x `size` pixels with one bright row, which is the class."""

    size: int
    images: int

    def info(self) -> DatasetInfo:
        names = tuple(f"row {i}" for i in range(self.size))
        return DatasetInfo(names, 1, (self.size, self.size), {"linf": Fraction(1, 10), "l2": Fraction(1, 2)}, 100)

    def fingerprint(self) -> str:
        return f"bars-1-{self.size}-{self.images}"

    def load(self, offline: bool = False) -> Dataset:
        draws = np.random.default_rng(0)

        def split(images: int) -> Split:
            labels = draws.integers(0, self.size, images)
            x = draws.random((images, 1, self.size, self.size), dtype=np.float32) * 0.5
            x[np.arange(images), 0, labels] += 0.4
            return Split(ArrayImages(x), labels, np.arange(images))

        return Dataset(self.info(), split(4 * self.images), split(self.images))


def bars(
    size: Annotated[int, Param("pixels a side, and classes", ge=2, le=32)] = 6,
    images: Annotated[int, Param("test images; four times as many to train on", ge=10)] = 200,
) -> Bars:
    return Bars(size, images)


@dataclass(frozen=True)
class Linear:
    """One linear layer on pixels that are centred inside."""

    epochs: int

    def identity(self) -> Mapping[str, Any]:
        return {}

    def misfit(self, info: DatasetInfo) -> str | None:
        pixels = info.channels * info.size[0] * info.size[1]
        return f"{pixels} pixels are too many for example-linear; use cnn" if pixels > 10_000 else None

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return Schedule(epochs=self.epochs, lr=0.02)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug_example.modules import Centred

        return Centred(info.channels * info.size[0] * info.size[1], len(info.classes))


def linear(epochs: Annotated[int, Param("passes over the training images", ge=1)] = 20) -> Linear:
    return Linear(epochs)
