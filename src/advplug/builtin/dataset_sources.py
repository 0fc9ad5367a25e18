"""What the dataset factories return: cheap facts at once; NumPy, torch and scikit-learn are loaded on use."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advplug.builtin.dataset_classes import Kept
from advplug.contracts import DatasetInfo, Norm
from advplug.errors import UsageError
from advplug.keys import digest

if TYPE_CHECKING:
    import numpy as np

    from advplug.builtin.dataset_files import Listing, NpzHead
    from advplug.data import Dataset, Split
    from advplug.splits import Amounts

FORMAT = 1
"""Part of every fingerprint: raised when the same files would give other pixels or another split."""

# Radii of Maini et al. 2020 (MNIST) and Croce and Hein 2022 (CIFAR-10, ImageNet), who use all three norms.
MNIST_BUDGETS = {"linf": Fraction(3, 10), "l2": Fraction(2), "l1": Fraction(10)}
SMALL_BUDGETS = {"linf": Fraction(8, 255), "l2": Fraction(1, 2), "l1": Fraction(12)}
LARGE_BUDGETS = {"linf": Fraction(4, 255), "l2": Fraction(2), "l1": Fraction(255)}
DIGITS_BUDGETS = {"linf": Fraction(1, 10), "l2": Fraction(2), "l1": Fraction(20)}
LARGE_FROM = 128
"""Shorter side in pixels from which images count as large."""
EVALUATE_SMALL, EVALUATE_LARGE = 1000, 500


def _evaluate(customary: int, available: int) -> int | None:
    return customary if available > customary else None


def evaluated(side: int, available: int) -> int | None:
    """How many of the test images are evaluated by default, for photographs with this shorter side; None: all."""
    return _evaluate(EVALUATE_LARGE if side >= LARGE_FROM else EVALUATE_SMALL, available)


def _arrays(images: Any, labels: np.ndarray[Any, Any]) -> Split:
    import numpy as np

    from advplug.data import ArrayImages, Split

    return Split(ArrayImages(images), labels, np.arange(len(labels)))


def _dataset(source: Any, train: Split, test: Split, amounts: Amounts) -> Dataset:
    from advplug.data import Dataset

    return Dataset(source.info(), *amounts.apply(train, test, source.name))


@dataclass(frozen=True)
class Digits:
    """1,797 real handwritten digits that come with scikit-learn, split 1,437 to 360."""

    size: int
    amounts: Amounts
    name = "digits"

    def info(self) -> DatasetInfo:
        self.amounts.check(1437, 360, self.name)
        shape = (self.size, self.size)
        return DatasetInfo(tuple("0123456789"), 1, shape, DIGITS_BUDGETS, images=self.amounts.n or 360)

    def fingerprint(self) -> str:
        version = importlib.metadata.version("scikit-learn")
        return digest({"digits": version, "size": self.size, "amounts": vars(self.amounts), "format": FORMAT})

    def load(self, offline: bool = False) -> Dataset:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        from advplug.splits import split

        grey, labels = load_digits(return_X_y=True)
        # 0 to 16 in 8 x 8; on the 8-bit grid, so that images can be stored and compared as bytes.
        small = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        shape = (self.size, self.size)
        images = np.stack([np.asarray(Image.fromarray(i).resize(shape, Image.Resampling.BILINEAR)) for i in small])
        pool = _arrays(images[:, None], labels.astype(np.int64))
        train, test = split(pool.labels, range(len(pool)))
        return _dataset(self, pool.subset(train), pool.subset(test), self.amounts)


@dataclass(frozen=True)
class Fake:
    """Random images with one faint coarse pattern a class: made in no time, and learnable."""

    classes: int
    channels: int
    size: int
    train: int
    n: int
    seed: int
    name = "fake"

    def info(self) -> DatasetInfo:
        names = tuple(f"class {i}" for i in range(self.classes))
        return DatasetInfo(names, self.channels, (self.size, self.size), SMALL_BUDGETS, images=self.n)

    def fingerprint(self) -> str:
        return digest({"fake": vars(self), "format": FORMAT})

    def load(self, offline: bool = False) -> Dataset:
        import numpy as np

        from advplug.data import Dataset

        # The legacy generator: NumPy guarantees its streams for ever.
        coarse = np.random.RandomState(self.seed).uniform(-0.25, 0.25, (self.classes, self.channels, 4, 4))
        cell = -(-self.size // 4)
        patterns = np.kron(coarse, np.ones((1, 1, cell, cell)))[..., : self.size, : self.size]

        def draw(count: int, stream: int) -> Split:
            labels = np.arange(count, dtype=np.int64) % self.classes
            noise = np.random.RandomState([self.seed, stream]).normal(0, 0.1, (count, *patterns.shape[1:]))
            pixels = np.clip(0.5 + patterns[labels] + noise, 0, 1)
            return _arrays(np.rint(pixels * 255).astype(np.uint8), labels)

        return Dataset(self.info(), draw(self.train, 1), draw(self.n, 2))


MNIST_COUNTS = (
    (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
)
"""Training and test images of each digit."""


@dataclass(frozen=True)
class Download:
    """MNIST or CIFAR; the official checksums stand for the data, so no file is read for a fingerprint."""

    name: str
    classes: tuple[str, ...]
    root: Path | None
    amounts: Amounts
    kept: Kept

    @property
    def _numbers(self) -> tuple[int, ...]:
        return self.kept.numbers(self.classes, self.name)

    def _counts(self) -> tuple[int, int]:
        """Training and test images of the classes that are kept."""
        if self.name == "mnist":
            train, test = (sum(counts[i] for i in self._numbers) for counts in MNIST_COUNTS)
            return train, test
        shares = len(self._numbers), len(self.classes)
        return 50_000 * shares[0] // shares[1], 10_000 * shares[0] // shares[1]

    def info(self) -> DatasetInfo:
        train, test = self._counts()
        self.amounts.check(train, test, self.name)
        images = test if self.amounts.n is None else self.amounts.n
        evaluate = _evaluate(EVALUATE_SMALL, images)
        classes = self.kept.of(self.classes)
        if self.name == "mnist":
            return DatasetInfo(classes, 1, (28, 28), MNIST_BUDGETS, evaluate, images=images)
        return DatasetInfo(classes, 3, (32, 32), SMALL_BUDGETS, evaluate, flip=True, images=images)

    def fingerprint(self) -> str:
        kept = self.kept.recipe()
        return digest({"official": self.name, "amounts": vars(self.amounts), "format": FORMAT, **kept})

    def load(self, offline: bool = False) -> Dataset:
        from advplug.builtin.dataset_downloads import load_cifar, load_mnist

        if self.name == "mnist":
            found = load_mnist(self.root, offline)
        else:
            found = load_cifar(self.name.upper(), self.root, offline)
        parts = ((found.train_x, found.train_y), (found.test_x, found.test_y))
        train, test = (_kept(_arrays(x, y), self.kept, self._numbers) for x, y in parts)
        return _dataset(self, train, test, self.amounts)


def _kept(split: Split, kept: Kept, numbers: tuple[int, ...]) -> Split:
    """The images of the classes that are kept, with their new numbers."""
    if not kept.names:
        return split
    rows = kept.rows(split.labels, numbers)
    return replace(split, labels=kept.renumbered(split.labels, numbers)).subset(rows)


@dataclass(frozen=True)
class Folder:
    """Image files, one subfolder a class, decoded when they are asked for.

    `named` turns the folder names into class names; `inside` is a subfolder to look in where there is
    one; `test_only` makes every image a test image.
    """

    name: str
    path: Path
    size: int
    resize: int
    amounts: Amounts
    named: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple
    test_only: bool = False
    inside: str = ""

    @functools.cached_property
    def _found(self) -> tuple[tuple[str, ...], Listing | None, Listing]:
        """Class folders, training images (None: one pool) and test images or pool."""
        from advplug.builtin.dataset_files import list_images, split_folders

        root = self.path / self.inside if (self.path / self.inside).is_dir() else self.path
        folders = None if self.test_only else split_folders(root)
        classes, first = list_images(root if folders is None else folders[0])
        if len(classes) < 2:
            raise UsageError(
                f"'{self.path}' holds the single class '{classes[0]}'; it takes at least two class folders"
            )
        return (classes, None, first) if folders is None else (classes, first, list_images(folders[1], classes)[1])

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Rows of the training and of the test images in their listings, in pseudo-random order."""
        import numpy as np

        from advplug.splits import mixed, split

        _, train, test = self._found
        if train is None and not self.test_only:
            return split(np.array(test.labels), test.names, what=f"'{self.path}'")
        training = mixed(np.array(train.labels), train.names) if train else np.arange(0)
        return training, mixed(np.array(test.labels), test.names)

    def info(self) -> DatasetInfo:
        if self.resize < self.size:
            raise UsageError(f"{self.name}: resize={self.resize} is below size={self.size}; it takes at least the size")
        train, test = (len(rows) for rows in self._rows)
        self.amounts.check(train, test, f"'{self.path}'")
        budgets = LARGE_BUDGETS if self.size >= LARGE_FROM else SMALL_BUDGETS
        images = self.amounts.n or test
        evaluate = _evaluate(EVALUATE_LARGE, images)
        classes = self.named(self._found[0])
        if len(set(classes)) < len(classes):
            raise UsageError(f"'{self.path}' has two folders for one class: {', '.join(self._found[0])}; merge them")
        shape = (self.size, self.size)
        trainable = not self.test_only
        return DatasetInfo(classes, 3, shape, budgets, evaluate, flip=True, trainable=trainable, images=images)

    def fingerprint(self) -> str:
        from advplug.builtin.dataset_files import listing_sha256

        classes, train, test = self._found
        return digest(
            {
                "files": listing_sha256(*((train, test) if train else (test,))),
                "classes": classes,
                "image": [self.size, self.resize],
                "split": not self.test_only,
                "amounts": vars(self.amounts),
                "format": FORMAT,
            }
        )

    def load(self, offline: bool = False) -> Dataset:
        import numpy as np

        from advplug.builtin.dataset_files import decode_image
        from advplug.data import FileImages, Split

        decode = functools.partial(decode_image, size=self.size, resize=self.resize)

        def pool(listing: Listing) -> Split:
            labels = np.array(listing.labels, np.int64)
            return Split(FileImages(listing.paths, decode), labels, np.arange(len(labels)))

        _, train, test = self._found
        training = pool(train or test).subset(self._rows[0])
        return _dataset(self, training, pool(test).subset(self._rows[1]), self.amounts)


@dataclass(frozen=True)
class Npz:
    """Arrays x, y and, optionally, classes; `first` is the training file, the pool, or None for tests only."""

    first: Path | None
    test: Path | None
    flip: bool
    amounts: Amounts
    kept: Kept
    name = "npz"

    def _heads(self) -> tuple[NpzHead | None, NpzHead | None]:
        from advplug.builtin.dataset_files import npz_head

        first = npz_head(self.first) if self.first else None
        test = npz_head(self.test) if self.test else None
        main = first or test
        assert main is not None
        if len(set(main.labels.tolist())) < 2:
            raise UsageError(f"'{main.path}' holds images of one class only; it takes at least two")
        if first and test:
            _same(first, test)
        return first, test

    @functools.cached_property
    def _classes(self) -> tuple[str, ...]:
        """All classes of the files, by name, or by number where they are not named."""
        heads = [h for h in self._heads() if h]
        named = next((h.classes for h in heads if h.classes), None)
        return named or tuple(str(i) for i in range(max(h.highest for h in heads) + 1))

    @functools.cached_property
    def _numbers(self) -> tuple[int, ...]:
        """The classes that are kept, as the files number them."""
        main = next(h for h in self._heads() if h)
        numbers = self.kept.numbers(self._classes, f"'{main.path}'")
        present = set(main.labels.tolist())
        absent = next((n for n in numbers if self.kept.names and n not in present), None)
        if absent is not None:
            raise UsageError(
                f"'{main.path}' holds no image of class '{self._classes[absent]}'; leave it out of classes"
            )
        return numbers

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Rows of the training and of the test images, among those of their files that are kept."""
        import numpy as np

        from advplug.splits import mixed, split

        first, test = self._heads()
        no_one = np.zeros(0, np.int64)
        labels = [no_one if h is None else h.labels for h in (first, test)]
        found = [self.kept.rows(part, self._numbers) for part in labels]
        ours, theirs = (part[rows] for part, rows in zip(labels, found, strict=True))
        if test is None:
            assert first is not None
            return split(ours, found[0], what=f"'{first.path}'")
        return mixed(ours, found[0]), mixed(theirs, found[1])

    def info(self) -> DatasetInfo:
        first, test = self._heads()
        main = first or test
        assert main is not None
        train, tests = (len(rows) for rows in self._rows)
        if not tests:
            raise UsageError(f"'{(test or main).path}' holds no image of {', '.join(self.kept.of(self._classes))}")
        self.amounts.check(train, tests, self.name)
        budgets: Mapping[Norm, Fraction] = LARGE_BUDGETS if min(main.size) >= LARGE_FROM else SMALL_BUDGETS
        images = self.amounts.n or tests
        evaluate = evaluated(min(main.size), images)
        classes = self.kept.of(self._classes)
        trainable = first is not None
        return DatasetInfo(
            classes, main.channels, main.size, budgets, evaluate, self.flip, trainable=trainable, images=images
        )

    def fingerprint(self) -> str:
        from advplug.builtin.dataset_files import file_sha256

        files = [file_sha256(path) if path else None for path in (self.first, self.test)]
        kept = self.kept.recipe()
        return digest({"npz": files, "flip": self.flip, "amounts": vars(self.amounts), "format": FORMAT, **kept})

    def load(self, offline: bool = False) -> Dataset:
        from advplug.builtin.dataset_files import npz_images

        found = (_arrays(npz_images(h), h.labels) if h else None for h in self._heads())
        first, test = (_kept(split, self.kept, self._numbers) if split else None for split in found)
        either = test if first is None else first
        assert either is not None
        train_rows, test_rows = self._rows
        of_test = either if test is None else test
        return _dataset(self, either.subset(train_rows), of_test.subset(test_rows), self.amounts)


def _same(first: NpzHead, test: NpzHead) -> None:
    if (first.channels, first.size) != (test.channels, test.size):
        shapes = " and ".join(f"{h.channels}x{h.size[0]}x{h.size[1]}" for h in (first, test))
        raise UsageError(f"'{first.path}' and '{test.path}' hold images of different shape, {shapes}; they must agree")
    if first.classes and test.classes and first.classes != test.classes:
        raise UsageError(f"'{first.path}' and '{test.path}' name different classes; they must agree, in the same order")
    named, other = (first, test) if first.classes else (test, first)
    if named.classes and other.highest >= len(named.classes):
        raise UsageError(
            f"'{other.path}' has the label {other.highest}, but '{named.path}' names {len(named.classes)} classes only"
        )
