"""Captioned images by the `datasets` library, which is loaded on use: from the Hugging Face hub or a local folder."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.builtin.dataset_files import read_rgb, square
from advplug.builtin.dataset_sources import EVALUATE_LARGE, EVALUATE_SMALL, LARGE_BUDGETS, LARGE_FROM, SMALL_BUDGETS
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.keys import digest
from advplug_clip.caption_files import Trouble, shared
from advplug_clip.caption_formats import column

if TYPE_CHECKING:
    from torch import Tensor

    from advplug.data import Dataset, Split
    from advplug.splits import Amounts

FORMAT = 1
INSTALL = "hf-captions needs the library datasets: pip install 'advplug-clip[datasets]'"


@dataclass(frozen=True)
class HubCaptions:
    """`dataset` is an owner/name of the hub or a folder; `train` None leaves nothing to train on.

    Nothing is fetched before `load`, so the fingerprint is what was asked for: a `revision` pins what that is.
    """

    dataset: str
    config: str | None
    revision: str | None
    train: str | None
    test: str
    image: str | None
    caption: str | None
    size: int
    resize: int
    skip_bad: bool
    amounts: Amounts
    name = "hf-captions"

    def info(self) -> DatasetInfo:
        if self.resize < self.size:
            raise UsageError(f"{self.name}: resize={self.resize} is below size={self.size}; it takes at least the size")
        large = self.size >= LARGE_FROM
        customary = EVALUATE_LARGE if large else EVALUATE_SMALL
        # How many test images there are is not known yet.
        evaluate = customary if self.amounts.n is None or self.amounts.n > customary else None
        budgets = LARGE_BUDGETS if large else SMALL_BUDGETS
        return DatasetInfo((), 3, (self.size, self.size), budgets, evaluate, trainable=bool(self.train), captions=True)

    def fingerprint(self) -> str:
        return digest({"hub": {**vars(self), "amounts": vars(self.amounts)}, "format": FORMAT})

    def load(self, offline: bool = False) -> Dataset:
        """Raises UsageError where the library is missing, the hub is out of reach or the data are not as named."""
        from advplug.data import Dataset

        trouble = Trouble(self.skip_bad)
        test = self._split(self.test, offline, trouble)
        train = self._split(self.train, offline, trouble) if self.train else test.subset(np.arange(0))
        parts = self.amounts.apply(train, test, f"{self.name}:{self.dataset}")
        return Dataset(self.info(), *parts, (*trouble.notes(self.name), *shared(self.name, *parts)))

    def _split(self, part: str, offline: bool, trouble: Trouble) -> Split:
        from advplug.data import Split

        library = _library()
        where = f"{self.dataset}[{part}]"
        rows = self._fetch(library, part, offline)
        image = column(where, rows.column_names, "image", self.image)
        texts = rows[column(where, rows.column_names, "caption", self.caption)]
        try:
            rows = rows.cast_column(image, library.Image(decode=False))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UsageError(f"'{where}': the column '{image}' holds no images; write image=COLUMN") from error
        images = HubImages(rows, image, where, self.size, self.resize)
        captions = [_captions(text, f"{where}, row {i}", trouble) for i, text in enumerate(texts)]
        good = []
        for i, own in enumerate(captions):
            why = images.unreadable(i) if own and trouble.skip else None
            if own and why is None:
                good.append(i)
            else:
                trouble.found(why or f"{where}, row {i} has no caption")
        n = len(captions)
        names = tuple(f"{self.dataset}/{row}" for row in _rows(part, n))
        return Split(images, np.zeros(n, np.int64), np.arange(n), tuple(captions), names).subset(np.array(good, int))

    def _fetch(self, library: Any, part: str, offline: bool) -> Any:
        try:
            with _network(library, offline):
                return library.load_dataset(self.dataset, self.config, split=part, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:  # what it raises for all that can be wrong
            why = " ".join(str(error).split())
            raise UsageError(
                f"hf-captions: '{self.dataset}' [{part}] cannot be loaded ({why}); check the name, or load it once "
                "where there is a network, copy the folder that HF_HOME names, and use --offline here"
            ) from error


def _rows(part: str, n: int) -> list[str]:
    """Names of a split's rows: those of `train[500:]` are rows of `train`, so that two slices of it can be told to
    overlap. Of what cannot be counted from the start (shares, sums of splits) the rows are named by themselves."""
    found = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", part)
    base, first = (found[1], int(found[2] or 0)) if found else (part, 0)
    return [f"{base}/{first + i}" for i in range(n)]


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(INSTALL) from error


@dataclass(frozen=True)
class HubImages:
    """The images of a column, decoded when they are asked for."""

    rows: Any
    column: str
    where: str
    size: int
    resize: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        from advplug.data import ArrayImages

        pixels = np.stack([square(self._read(int(i)), self.size, self.resize) for i in rows])
        return ArrayImages(pixels).take(np.arange(len(rows)))

    def _read(self, i: int) -> Any:
        held = self.rows[i][self.column] or {}
        source = io.BytesIO(held["bytes"]) if held.get("bytes") else held.get("path") or io.BytesIO()
        return read_rgb(source, f"{self.where}, row {i}")

    def unreadable(self, i: int) -> str | None:
        """What is wrong with an image, if anything."""
        try:
            self._read(i)
        except UsageError as error:
            return str(error).rpartition(";")[0]
        return None


def _captions(value: Any, where: str, trouble: Trouble) -> tuple[str, ...]:
    """A text or a list of texts, without repetitions. Raises UsageError for anything else."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(t, str | None) for t in texts):
        raise UsageError(f"{where}: captions are a text or a list of texts, got {type(value).__name__}")
    clean = [" ".join((t or "").split()) for t in texts]
    own = tuple(dict.fromkeys(t for t in clean if t))
    if own and not all(clean):
        trouble.found(f"{where} has an empty caption")
    trouble.repeated += sum(bool(t) for t in clean) - len(own)
    return own


@contextlib.contextmanager
def _network(library: Any, offline: bool) -> Iterator[None]:
    """No word and no bars of what the libraries try meanwhile; with `offline` they do not try."""
    from huggingface_hub import constants

    chatter = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [c.level for c in chatter]
    settings = [(library.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")]
    before = [(owner, name, getattr(owner, name, None)) for owner, name in settings]
    silent = library.are_progress_bars_disabled()
    try:
        library.disable_progress_bars()
        for c in chatter:
            c.setLevel(logging.ERROR)
        for owner, name, value in before:
            setattr(owner, name, offline or value)
        yield
    finally:
        if not silent:
            library.enable_progress_bars()
        for c, level in zip(chatter, levels, strict=True):
            c.setLevel(level)
        for owner, name, value in before:
            setattr(owner, name, value)
