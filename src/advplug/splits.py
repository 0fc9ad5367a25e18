"""Which images train and which test: stratified, seeded, independent of file order, platform and NumPy version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.errors import UsageError

if TYPE_CHECKING:
    from advplug.data import Split

Rows = np.ndarray[Any, Any]
TEST_SHARE = Fraction(1, 5)


def ranks(keys: Iterable[object], seed: int = 0) -> Rows:
    """A pseudo-random uint64 for each key; it depends on the key and `seed` only.

    Hashes, because NumPy does not promise equal generator streams over its versions.
    """
    hashes = (hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "surrogateescape"), digest_size=8) for key in keys)
    return np.fromiter((int.from_bytes(h.digest(), "little") for h in hashes), dtype=np.uint64)


def allocate(counts: Rows, total: int) -> Rows:
    """`total` shared out in proportion to `counts` by largest remainder; no share exceeds its count."""
    whole, rest = np.divmod(counts * total, counts.sum())
    order = np.argsort(-rest, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def choose(labels: Rows, total: int, order: Rows) -> Rows:
    """True (N,) for `total` images with the class proportions of `labels`: those of smallest `order` a class."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return places(labels, order) < allocate(counts, total)[inverse]


def places(labels: Rows, order: Rows) -> Rows:
    """The place (N,) of each image among those of its class by ascending `order`, from 0."""
    found = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        found[members[np.argsort(order[members], kind="stable")]] = np.arange(len(members))
    return found


def interleave(labels: Rows, order: Rows) -> Rows:
    """Rows in pseudo-random order with the class proportions kept, nearly, by every first n of them."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.lexsort((order, (places(labels, order) + 0.5) / counts[inverse]))


def subset(labels: Rows, total: int, seed: int = 0) -> Rows:
    """The rows of a stratified subset of `total` images, ascending."""
    if total >= len(labels):
        return np.arange(len(labels))
    return np.flatnonzero(choose(labels, total, ranks(range(len(labels)), seed)))


def split(labels: Rows, keys: Iterable[object], seed: int = 0, what: str = "the dataset") -> tuple[Rows, Rows]:
    """Training and test rows of a stratified 80/20 split by the hash of each image's key.

    Both are in an order in which any first images are a fair sample. Each class keeps at
    least one training image. Raises UsageError where nothing is left to test on.
    """
    order = ranks(keys, seed)
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.minimum(allocate(counts, math.ceil(len(labels) * TEST_SHARE)), counts - 1)
    if not shares.sum():
        have = f"{len(labels)} images in {len(classes)} classes"
        raise UsageError(f"{what} has {have}, too few to split 80/20; add images")
    is_test = places(labels, order) < shares[inverse]
    parts = (np.flatnonzero(~is_test), np.flatnonzero(is_test))
    train, test = (rows[interleave(labels[rows], order[rows])] for rows in parts)
    return train, test


def mixed(labels: Rows, keys: Iterable[object]) -> Rows:
    """All rows: in their own order unless that is class by class, where the first n would be a few classes only."""
    in_order = (np.diff(labels) >= 0).all()
    return interleave(labels, ranks(keys)) if in_order else np.arange(len(labels))


@dataclass(frozen=True)
class Amounts:
    """How much of a dataset is used: `train` a fraction (at most 1) or a count of the training images, `n`
    a count of the test images (None: all). Raises UsageError for what is neither."""

    train: float = 1.0
    n: int | None = None

    def __post_init__(self) -> None:
        train = self.train
        if not (0 < train < math.inf) or (train > 1 and train != int(train)):
            raise UsageError(f"train takes a fraction above 0 up to 1 or a count of images, got {train:g}")
        if self.n is not None and self.n < 1:
            raise UsageError(f"n takes a count of test images of at least 1, got {self.n}")

    def check(self, train: int, test: int, what: str) -> None:
        """Raises UsageError where there are fewer images than asked for."""
        if train and self.train > train:
            raise UsageError(f"{what} has {train} training images, train={self.train:g} asks for more")
        if self.n is not None and self.n > test:
            raise UsageError(f"{what} has {test} test images, n={self.n} asks for more")

    def apply(self, train: Split, test: Split, what: str) -> tuple[Split, Split]:
        """Stratified subsets of both, in unchanged order; an empty training split stays empty."""
        self.check(len(train), len(test), what)
        if len(train):
            wanted = int(self.train) if self.train > 1 else max(1, round(self.train * len(train)))
            train = train.subset(subset(train.labels, wanted))
        return train, test if self.n is None else test.subset(subset(test.labels, self.n))
