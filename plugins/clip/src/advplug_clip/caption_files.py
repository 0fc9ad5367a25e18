"""Captioned images in files: which are usable, how they are split and decoded. Imports no torch before `load`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advplug.builtin.dataset_files import Listing, decode_image, listing_sha256, read_rgb, stamp
from advplug.builtin.dataset_sources import EVALUATE_LARGE, LARGE_BUDGETS, LARGE_FROM, SMALL_BUDGETS
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.keys import digest
from advplug.naming import named_most

if TYPE_CHECKING:
    from advplug.data import Dataset, Split
    from advplug.splits import Amounts

FORMAT = 1
"""Part of every fingerprint: raised when the same files would give other pixels, captions or another split."""


class Row(NamedTuple):
    """One caption of one image, and where it is written."""

    image: str
    caption: str
    where: str


@dataclass(frozen=True)
class Table:
    """Images with their captions: `files` are relative to `root`, `sources` say where an image comes from; `labels`
    is empty where there are no classes."""

    root: Path
    files: tuple[str, ...]
    sources: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] = ()

    @functools.cached_property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.files]

    @functools.cached_property
    def classes(self) -> np.ndarray[Any, Any]:
        """(N,) int64; zeros where there are no classes."""
        return np.array(self.labels or [0] * len(self.files), dtype=np.int64)

    def labelled(self, classes: Sequence[str]) -> Table:
        """The images whose captions name one of the classes, each with the one that most of its captions name."""
        found = [(i, label) for i, own in enumerate(self.captions) if (label := named_most(own, classes)) is not None]
        rows = [i for i, _ in found]
        files, sources, captions = ([column[i] for i in rows] for column in (self.files, self.sources, self.captions))
        return Table(self.root, tuple(files), tuple(sources), tuple(captions), tuple(label for _, label in found))  # type: ignore[arg-type]


@dataclass
class Trouble:
    """What is wrong with the data: raised, or with `skip` left out and remembered."""

    skip: bool
    left_out: list[str] = field(default_factory=list)
    repeated: int = 0

    def found(self, what: str) -> None:
        """Raises UsageError unless that is to be skipped."""
        if not self.skip:
            raise UsageError(f"{what}; repair or remove it, or leave it out with skip_bad=true")
        self.left_out.append(what)

    def notes(self, name: str) -> tuple[str, ...]:
        """What was left out, in a few lines."""
        lines = []
        if self.left_out:
            some = "; ".join(self.left_out[:5]) + ("; ..." if len(self.left_out) > 5 else "")
            lines.append(f"{name}: {len(self.left_out)} left out as skip_bad asks: {some}")
        if self.repeated:
            lines.append(f"{name}: {self.repeated} captions stand there twice for an image and count once")
        return tuple(lines)


Parts = tuple[Table | None, Table]
"""Training table (None: the other one is a pool to be split) and test table."""


@dataclass(frozen=True)
class CaptionedFiles:
    """Images decoded when they are asked for, each with its captions.

    `read` gives the tables. `classes` are words that captions name; images that name none of them are left out. Without
    classes labels are 0.
    """

    name: str
    path: Path
    read: Callable[[Trouble], Parts]
    size: int
    resize: int
    skip_bad: bool
    amounts: Amounts
    classes: tuple[str, ...] = ()

    @functools.cached_property
    def _found(self) -> tuple[Table | None, Table, tuple[str, ...]]:
        trouble = Trouble(self.skip_bad)
        train, test = self.read(trouble)
        notes = trouble.notes(self.name)
        if self.classes:
            every = [t for t in (train, test) if t is not None]
            train, test = train and train.labelled(self.classes), test.labelled(self.classes)
            left = sum(len(t.files) for t in every) - sum(len(t.files) for t in (train, test) if t is not None)
            notes += (f"{self.name}: {left} images whose captions name no class are left out",) if left else ()
        if not test.files:
            what = f"that names one of {', '.join(self.classes)}" if self.classes else "with a caption"
            why = "".join(f"; {note}" for note in notes)
            raise UsageError(f"{self.name}: '{self.path}' holds no image {what} to test on{why}")
        return train, test, notes

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Rows of the training and of the test images in their tables, in pseudo-random order."""
        from advplug.splits import mixed, split

        train, test, _ = self._found
        if train is None:
            return split(test.classes, test.files, what=f"'{self.path}'")
        return mixed(train.classes, train.files), mixed(test.classes, test.files)

    def info(self) -> DatasetInfo:
        if self.resize < self.size:
            raise UsageError(f"{self.name}: resize={self.resize} is below size={self.size}; it takes at least the size")
        train, test = (len(rows) for rows in self._rows)
        self.amounts.check(train, test, f"'{self.path}'")
        budgets = LARGE_BUDGETS if self.size >= LARGE_FROM else SMALL_BUDGETS
        images = self.amounts.n or test
        evaluate = EVALUATE_LARGE if images > EVALUATE_LARGE else None
        shape = (self.size, self.size)
        return DatasetInfo(self.classes, 3, shape, budgets, evaluate, trainable=train > 0, captions=True, images=images)

    def fingerprint(self) -> str:
        tables = [t for t in self._found[:2] if t is not None]
        listings = [Listing(t.root, t.files, (), tuple(stamp(p)[0] for p in t.paths)) for t in tables]
        return digest(
            {
                "files": listing_sha256(*listings),
                "captions": digest({"all": [t.captions for t in tables]}),
                "image": [self.size, self.resize],
                "amounts": vars(self.amounts),
                "format": FORMAT,
                **({"classes": self.classes} if self.classes else {}),
            }
        )

    def load(self, offline: bool = False) -> Dataset:
        from advplug.data import Dataset, FileImages, Split

        decode = functools.partial(_decode, size=self.size, resize=self.resize)

        def pool(table: Table) -> Split:
            images = FileImages(table.paths, decode)
            return Split(images, table.classes, np.arange(len(table.files)), table.captions, table.sources)

        train, test, notes = self._found
        train_rows, test_rows = self._rows
        training = pool(train or test).subset(train_rows)
        parts = self.amounts.apply(training, pool(test).subset(test_rows), self.name)
        return Dataset(self.info(), *parts, (*notes, *shared(self.name, *parts)))


def _decode(path: Path, size: int, resize: int) -> np.ndarray[Any, Any]:
    try:
        return decode_image(path, size, resize)
    except UsageError as error:
        raise UsageError(f"{error}, or leave it out with skip_bad=true") from error


def shared(name: str, train: Split, test: Split) -> tuple[str, ...]:
    """A note where images are on both sides, as their sources say."""
    known = set(train.names or ())
    both, amount = sum(source in known for source in test.names or ()), len(test)
    if not both:
        return ()
    some = "all" if both == amount else str(both)
    are = "is a training image" if both == 1 else "are training images"
    return (f"{name}: {some} of the {amount} test images {are}, too; a model that is trained here has seen them",)


# --- rows to tables --------------------------------------------------------------------------------


def table(
    rows: Sequence[Row],
    root: Path,
    trouble: Trouble,
    source: Callable[[str], str],
    wanted: Sequence[str] | None = None,
    locate: Callable[[str], str] = str,
) -> Table:
    """The images of `rows` in the order in which they come, or those `wanted`, with their captions.

    `locate` turns an image's name into its file's, relative to `root`. Raises UsageError for an empty caption,
    an image without a caption, one that is no file and a missing one, unless these are to be skipped; an image that
    cannot be read is found here only when it is to be skipped.
    """
    captions: dict[str, dict[str, None]] = {name: {} for name in wanted or ()}
    for row in rows:
        if wanted is not None and row.image not in captions:
            continue
        why = _no_file(row)
        if why is not None:
            trouble.found(why)
            continue
        own = captions.setdefault(row.image, {})
        text = " ".join(row.caption.split())
        if not text:
            trouble.found(f"{row.where}: the caption of '{row.image}' is empty")
        trouble.repeated += text in own
        if text:
            own[text] = None
    good: dict[str, tuple[str, tuple[str, ...]]] = {}
    for image, own in captions.items():
        name = locate(image)
        why = _unusable(root / name, own, trouble.skip)
        if why is None:
            good[image] = (name, tuple(own))
        else:
            trouble.found(why)
    files, texts = ([pair[k] for pair in good.values()] for k in (0, 1))
    return Table(root, tuple(files), tuple(source(i) for i in good), tuple(texts))  # type: ignore[arg-type]


def _no_file(row: Row) -> str | None:
    """Why a row's image can be no file, whatever is there."""
    if not row.image:
        return f"{row.where} names no image"
    if "://" in row.image:
        return f"{row.where}: '{row.image}' is an address and no file, download it"
    return None


def _unusable(path: Path, captions: Mapping[str, None], look: bool) -> str | None:
    if not captions:
        return f"the image '{path}' has no caption"
    if path.is_dir():
        return f"the image '{path}' is a folder"
    if not path.is_file():
        return f"the image '{path}' is not there"
    return _unreadable(path, *stamp(path)) if look else None


@functools.lru_cache(maxsize=200_000)
def _unreadable(path: Path, size: int, modified: int) -> str | None:
    try:
        read_rgb(path)
    except UsageError as error:
        return str(error).rpartition(";")[0]
    return None
