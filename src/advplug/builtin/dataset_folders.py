"""Any dataset of images as image files: written once, then read as `folder:` reads them. Imports no torch."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from advplug.builtin.dataset_sources import FORMAT, Folder, evaluated
from advplug.contracts import DatasetInfo, DatasetSource, Param, Stack
from advplug.errors import UsageError
from advplug.keys import digest

if TYPE_CHECKING:
    from advplug.data import Dataset
    from advplug.splits import Amounts

log = logging.getLogger("advplug")

RECORD = "written.json"
PARTS = ("train", "test")
_TEMPORARY = ".part."


@dataclass(frozen=True)
class AsFolder:
    """The images of `source` as PNG files in the cache, in `train` and `test` with a subfolder a class.

    Captions have no place there and are left out; floats are rounded to 8 bits.
    """

    label: str
    source: DatasetSource
    size: int | None
    resize: int | None
    amounts: Amounts
    name = "as-folder"

    def info(self) -> DatasetInfo:
        info = self.source.info()
        if not info.classes or info.modality != "image":
            raise UsageError(f"as-folder: {self.label} has no classes to make folders of; use one of classified images")
        if not info.trainable:
            raise UsageError(f"as-folder: {self.label} has no training images; give it some")
        if info.channels not in (1, 3):
            raise UsageError(
                f"as-folder: {self.label} has images of {info.channels} channels; files hold grey ones or RGB"
            )
        size, resize = self._sizes(info)
        if resize < size:
            raise UsageError(f"as-folder: resize={resize} is below size={size}; it takes at least the size")
        evaluate = info.evaluate if self.amounts.n is None else evaluated(size, self.amounts.n)
        images = self.amounts.n or info.images
        return replace(info, channels=3, size=(size, size), evaluate=evaluate, captions=False, images=images)

    def _sizes(self, info: DatasetInfo) -> tuple[int, int]:
        size = self.size or min(info.size)
        return size, self.resize or size

    def fingerprint(self) -> str:
        info = self.source.info()
        image = list(self._sizes(info))
        return digest({"as-folder": self._content(info), "image": image, "amounts": vars(self.amounts)})

    def _content(self, info: DatasetInfo) -> str:
        """Names what is in the files."""
        return digest({"source": self.source.fingerprint(), "classes": info.classes, "format": FORMAT})

    def load(self, offline: bool = False) -> Dataset:
        from advplug.builtin.dataset_downloads import datasets_folder

        info = self.info()
        root = datasets_folder() / "folders" / self._content(self.source.info())
        write = functools.partial(_write, self.source, self.label, offline)
        _once(root, write)
        size, resize = self._sizes(self.source.info())
        folder = Folder(self.name, root, size, resize, self.amounts, named=lambda _: info.classes)
        return replace(folder.load(offline), info=info)


def as_folder(
    source: Annotated[Stack, Param("the dataset to write, in parentheses: (npz:FILE,flip=true)", positional=True)],
    size: Annotated[
        int | None, Param("height and width in pixels to read it at (none: the source's shorter side)", ge=8, le=1024)
    ] = None,
    resize: Annotated[
        int | None, Param("length the shorter side is scaled to before the centre is cut", ge=8, le=4096)
    ] = None,
    train: Annotated[float, Param("training images to use: a fraction up to 1, or a count", gt=0)] = 1.0,
    n: Annotated[int | None, Param("test images to use, a stratified sample (none: all)", ge=1)] = None,
) -> AsFolder:
    """Classes, budgets and mirroring are those of the source; grey images come back in three equal channels."""
    from advplug.plans import bind
    from advplug.registry import registry
    from advplug.splits import Amounts

    if len(source) != 1:
        raise UsageError(f"as-folder takes one dataset, like as-folder:(npz:FILE), got '{source}'")
    made = bind(registry(), "dataset", source.parts[0])
    return AsFolder(made.label, made.value, size, resize, Amounts(float(train), n))


# --- writing ---------------------------------------------------------------------------------------


def _write(source: DatasetSource, label: str, offline: bool, folder: Path) -> None:
    """Both splits and a record of them, in `folder`, which exists. Raises OSError where that cannot be."""
    import numpy as np

    from advplug.image_folders import class_folders, write_images

    data, classes = source.load(offline), source.info().classes
    missing = np.flatnonzero(np.bincount(data.train.labels, minlength=len(classes)) == 0)
    if len(missing):
        raise UsageError(
            f"as-folder: {label} has no training image of class '{classes[int(missing[0])]}'; use more images"
        )
    log.info("writing %s as image files to %s", label, folder.parent)
    folders = class_folders(classes)
    for part, split in zip(PARTS, (data.train, data.test), strict=True):
        write_images(split, folder, part, folders)
    record = {"source": label, "files": _contents(folder)}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _contents(folder: Path) -> str:
    from advplug.builtin.dataset_files import list_images, listing_sha256

    return listing_sha256(*(list_images(folder / part)[1] for part in PARTS))


def _is_whole(root: Path) -> bool:
    """Whether the folder holds what was written there."""
    try:
        known: str = json.loads((root / RECORD).read_text(encoding="utf-8"))["files"]
        return known == _contents(root)
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return False


def _once(root: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder `root` unless it is there: whole or not at all, by one process while others wait.

    One that was changed since is made anew. Raises UsageError where it cannot be written.
    """
    from filelock import FileLock

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock"):
            if _is_whole(root):
                return
            # What is there was left by a process that was killed, or is no longer what was written.
            for left in (root, *root.parent.glob(f"{root.name}{_TEMPORARY}*")):
                shutil.rmtree(left, ignore_errors=True)
            part = root.parent / f"{root.name}{_TEMPORARY}{uuid.uuid4().hex[:8]}"
            part.mkdir()
            try:
                write(part)
                os.rename(part, root)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            f"image files cannot be written to '{root.parent}': {why}; make room, or set ADVPLUG_CACHE"
        ) from error
