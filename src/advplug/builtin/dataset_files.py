"""Reading datasets from a user's own files: image folders and .npz archives. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from advplug.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
TEST_FOLDERS = ("test", "val", "valid", "validation")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


# --- image folders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of one folder: names relative to `root` with '/', sorted; label and size in bytes of each."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def split_folders(root: Path) -> tuple[Path, Path] | None:
    """The train and test folders inside `root`, or None where its subfolders are the classes.

    Raises UsageError where `root` is no folder that can be read.
    """
    names = subfolders(root)
    test = next((name for name in TEST_FOLDERS if name in names), None)
    return (root / "train", root / test) if "train" in names and test else None


def subfolders(root: Path) -> list[str]:
    """The visible subfolders of `root`, sorted. Raises UsageError where it cannot be read."""
    if not root.exists():
        raise UsageError(f"there is no folder '{root}'; check the path")
    if not root.is_dir():
        raise UsageError(f"'{root}' is a file; name the folder that holds one subfolder a class")
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not _hidden(e.name))
    except OSError as error:
        raise UsageError(f"the folder '{root}' cannot be read: {error.strerror}") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # macOS leaves '._x.jpg' in archives, too


def list_images(root: Path, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], Listing]:
    """The class folders of `root` and their images. Raises UsageError for an empty folder or class.

    `classes`, where given, are the folders to number by: others are refused, missing ones are allowed.
    """
    found = subfolders(root)
    if not found:
        raise UsageError(f"'{root}' has no subfolders; it needs one subfolder of images a class")
    known = tuple(classes or found)
    names: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for name in found:
        if name not in known:
            raise UsageError(f"'{root}' has the class folder '{name}', which the training folder lacks")
        images = sorted(_images(root / name, name))
        if not images:
            formats = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UsageError(f"the class folder '{root / name}' holds no image ({formats}); fill or remove it")
        names += [n for n, _ in images]
        sizes += [s for _, s in images]
        labels += [known.index(name)] * len(images)
    return known, Listing(root, tuple(names), tuple(labels), tuple(sizes))


def _images(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if _hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _images(folder / entry.name, name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield name, entry.stat().st_size
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be read: {error.strerror}") from error


def images_below(root: Path) -> list[Path]:
    """All image files in a folder and its subfolders, sorted. Raises UsageError where there are none."""
    found = sorted(root / name.lstrip("/") for name, _ in _images(root, ""))
    if not found:
        raise UsageError(f"'{root}' holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def decode_image(path: Path, size: int, resize: int) -> Array:
    """RGB pixels uint8 (3, size, size) of a file, as `square` cuts them. Raises UsageError that names the file."""
    return square(read_rgb(path), size, resize)


def read_rgb(source: Path | IO[bytes], name: object = None, advice: str = "repair or remove it") -> Image:
    """An image in RGB, of its full size; `name` is what errors call it, `advice` how they end. Raises UsageError.

    Transparency is dropped and EXIF rotation not applied, as in torchvision's ImageFolder, so that
    checkpoints see what they were trained on.
    """
    from PIL import Image

    try:
        with Image.open(source) as opened:
            return _to_rgb(opened)
    except Exception as error:  # decoders raise anything on damaged bytes
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the image '{name or source}' cannot be read ({why}); {advice}") from error


def square(image: Image, size: int, resize: int) -> Array:
    """Pixels uint8 (3, size, size): the shorter side scaled to `resize` (bilinear), then the centre."""
    from PIL.Image import Resampling

    width, height = image.size
    shape = (width * resize // min(width, height), height * resize // min(width, height))
    if shape != image.size:
        image = image.resize(shape, Resampling.BILINEAR)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16"):  # convert() would clip 16 bits at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # convert() to RGB at once would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


# --- npz -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpzHead:
    """What is known of an .npz without reading its images.

    `axes` brings x to (N, C, H, W); `grey` says that x came as (N, H, W); labels are int64 (N,).
    """

    path: Path
    axes: tuple[int, ...] | None
    grey: bool
    channels: int
    size: tuple[int, int]
    labels: Array
    classes: tuple[str, ...] | None

    @property
    def highest(self) -> int:
        return int(self.labels.max())


def npz_head(path: Path) -> NpzHead:
    """Reads labels, class names and the shape of x. Raises UsageError for whatever is wrong with them."""
    return _npz_head(path, *stamp(path))


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time. Raises UsageError where there is no such file."""
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder; name an .npz file (image folders: folder:{path})")
    try:
        facts = path.stat()
    except OSError as error:
        raise UsageError(f"the file '{path}' cannot be read: {error.strerror}; check the path") from error
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _npz_head(path: Path, size: int, modified: int) -> NpzHead:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {n.removesuffix(".npy") for n in archive.namelist()}
            for key in ("x", "y"):
                if key not in members:
                    have = ", ".join(sorted(members)) or "nothing"
                    raise UsageError(
                        f"'{path}' has no array '{key}', it holds {have}; save it with np.savez(x=..., y=...)"
                    )
            with archive.open("x.npy") as member:
                shape, dtype = _array_header(member)
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["y"]
            classes = arrays["classes"] if "classes" in members else None
    except _UNREADABLE as error:
        raise UsageError(_diagnose(path, error)) from error
    axes, grey, channels, pixels = _layout(path, shape)
    if dtype != np.uint8 and dtype.kind != "f":
        raise UsageError(f"'{path}': x is {dtype}; store uint8 (0 to 255) or floats in [0, 1]")
    _check_labels(path, labels, shape[0])
    names = _class_names(path, classes, int(labels.max()))
    return NpzHead(path, axes, grey, channels, pixels, labels.astype(np.int64), names)


def _array_header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def _layout(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, ...] | None, bool, int, tuple[int, int]]:
    if len(shape) not in (3, 4) or 0 in shape:
        raise UsageError(f"'{path}': x has shape {shape}; it takes images (N, H, W, C), (N, C, H, W) or (N, H, W)")
    if len(shape) == 3:
        return None, True, 1, (shape[1], shape[2])
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        what = "either axis could be the channels" if first else "no axis holds 1 or 3 channels"
        raise UsageError(f"'{path}': x has shape {shape}, {what}; store (N, H, W, C) or (N, C, H, W) with C of 1 or 3")
    if first:
        return None, False, shape[1], (shape[2], shape[3])
    return (0, 3, 1, 2), False, shape[3], (shape[1], shape[2])


def _check_labels(path: Path, labels: Array, images: int) -> None:
    if labels.ndim != 1:
        raise UsageError(f"'{path}': y has shape {labels.shape}; it takes one class number an image, shape ({images},)")
    if len(labels) != images:
        raise UsageError(f"'{path}': x holds {images} images but y {len(labels)} labels; they must be as many")
    if labels.dtype.kind not in "iu":
        raise UsageError(f"'{path}': y is {labels.dtype}; labels are whole numbers from 0, stored as integers")
    if labels.min() < 0:
        raise UsageError(f"'{path}': y holds the label {labels.min()}; classes are numbered from 0")


def _class_names(path: Path, classes: Array | None, highest: int) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if classes.ndim != 1 or len(classes) <= highest:
        raise UsageError(f"'{path}': classes has shape {classes.shape}, but labels go up to {highest}; name them all")
    names = [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in classes.tolist()]
    if len(set(names)) < len(names):
        raise UsageError(f"'{path}': classes holds a name twice; every class needs its own")
    return tuple(names)


def npz_images(head: NpzHead) -> Array:
    """The images, (N, C, H, W), uint8 or float32. Raises UsageError for NaN and values outside [0, 1]."""
    try:
        with np.load(head.path, allow_pickle=False) as arrays:
            x: Array = arrays["x"]
    except _UNREADABLE as error:
        raise UsageError(_diagnose(head.path, error)) from error
    if x.dtype != np.uint8:
        low, high = float(x.min()), float(x.max())  # NaN passes through both
        if not (low >= 0 and high <= 1):
            raise UsageError(
                f"'{head.path}': x holds numbers from {low:g} to {high:g}; floats must lie in [0, 1], without NaN"
            )
        x = x.astype(np.float32)
    if head.grey:
        return x[:, None]
    return x if head.axes is None else x.transpose(head.axes)


def _diagnose(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as unreadable:
        return f"the file '{path}' cannot be read: {unreadable.strerror}"
    if start.lstrip()[:1] == b"<":
        return f"'{path}' is an HTML page, not an .npz archive; download the file itself"
    if start[:6] == b"\x93NUMPY":
        return f"'{path}' is a single array; save images and labels with np.savez(x=..., y=...)"
    if start[:2] != b"PK":
        return f"'{path}' is no .npz archive; save one with np.savez(x=..., y=...)"
    if "allow_pickle" in str(error) or "Object arrays" in str(error):
        return f"'{path}' holds pickled objects, which are never loaded; save plain number arrays"
    why = " ".join(str(error).split()) or type(error).__name__
    return f"'{path}' is damaged or truncated ({why}); download or save it again"


# --- fingerprints ----------------------------------------------------------------------------------


HASHED_BYTES = 256 * 2**20
"""Folders up to this size are told apart by what their files hold."""


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, kept in the process until size or time changes. Raises UsageError."""
    return _file_sha256(path, *stamp(path))


@functools.cache
def _file_sha256(path: Path, size: int, modified: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"the file '{path}' cannot be read: {error.strerror}") from error


def listing_sha256(*listings: Listing) -> str:
    """The sha256 of names and contents; above 256 MB, of names, sizes and times of change instead.

    So a copy of a small folder is the same dataset, and a large one is not read through for a dry run.
    """
    total = hashlib.sha256()
    for listing in listings:
        small = sum(listing.sizes) <= HASHED_BYTES
        for name, size in zip(listing.names, listing.sizes, strict=True):
            path = listing.root / name
            told = file_sha256(path) if small else str(path.stat().st_mtime_ns)
            total.update(f"{name}\0{size}\0{told}\n".encode("utf-8", "surrogateescape"))
        total.update(b"\0")
    return total.hexdigest()
