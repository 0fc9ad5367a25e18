"""Whether images that a model is judged on are in its training data: as files, as pixels, nearly, or by source.

Near copies are what re-saving and rescaling make: hashes of 64 bits (difference hash, and perceptual hash of the low
cosine frequencies) find candidates, the pixels decide. Mirrored, turned, recoloured and heavily cropped copies are
not looked for. Equal captions are told apart from leaks, since different images may well share one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from advplug.data import Dataset, FileImages, Split
from advplug.errors import GateError, UsageError
from advplug.parse import Reference, parse_reference
from advplug.registry import Registry, registry
from advplug.skipping import skipping

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]
How: TypeAlias = Literal["same file", "same pixels", "near copy", "same source"]
HAMMING = 4
"""Bits of 64 in which the hashes of a copy may differ."""
CLOSE = 0.04
"""Mean difference of a near copy in brightness, as a share of the image's own mean deviation from its mean.

Relative, since flat images and thin strokes on a plain ground are close to each other in absolute terms. Photographs
of Flickr8k and COCO saved as JPEG at quality 90, or scaled by 2 %, differ by at most 0.031; the most alike training
and test digits of MNIST by 0.047 (docs/captions.md). In brightness, since JPEG halves the resolution of colours.
"""
SIDE = 16
"""Images are compared at this many pixels a side."""
BLOCK = 1024
LUMA = (0.299, 0.587, 0.114)
"""Brightness from red, green and blue (ITU-R BT.601)."""
SHOWN = 20
WHOLE = 224
"""Side in pixels at which the images of a folder are compared with images that are no files."""
CAPTION_FILES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
OUT_OF_SCOPE = "mirrored, turned, recoloured and heavily cropped copies are not looked for"


@dataclass(frozen=True)
class Pair:
    """A training image and an evaluation image that are the same, by position and by name.

    `how` is the strongest evidence; `error` is the difference of a near copy, as `CLOSE` measures it.
    """

    train: int
    evaluation: int
    train_name: str
    evaluation_name: str
    how: How
    error: float | None = None


@dataclass(frozen=True)
class SharedCaption:
    """A text that both sides hold, with the images that have it; not a leak by itself."""

    text: str
    train: tuple[int, ...]
    evaluation: tuple[int, ...]


@dataclass(frozen=True)
class Leaks:
    """What was found among so many `train` and `evaluation` images; `unchecked` says what could not be compared."""

    train: int
    evaluation: int
    pairs: tuple[Pair, ...] = ()
    captions: tuple[SharedCaption, ...] = ()
    unchecked: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pairs)

    @property
    def leaked(self) -> int:
        """How many of the evaluation images are in the training data."""
        return len({p.evaluation for p in self.pairs})

    def to_json(self) -> str:
        """What `advplug leakage --json` prints."""
        return json.dumps({**asdict(self), "leaked": self.leaked, "out_of_scope": OUT_OF_SCOPE}, indent=2)


def find_leaks(train: Split, evaluation: Split) -> Leaks:
    """Compares every training image with every evaluation image.

    Where both come from files these are read whole, so that no crop hides a copy. Raises UsageError for an image
    that cannot be read.
    """
    return find_among((train,), (evaluation,))


def find_among(train: Sequence[Split], evaluation: Sequence[Split]) -> Leaks:
    """`find_leaks` for sets of images that come in several splits; positions count through all of them."""
    as_files = all(_paths(split) is not None for split in (*train, *evaluation))
    ours, theirs = (_joined([_prints(s, as_files) for s in side]) for side in (train, evaluation))
    found: dict[tuple[int, int], tuple[How, float | None]] = {}
    for i, j in _equal(ours.sources, theirs.sources):
        found[i, j] = ("same source", None)
    for i, j, error in _near(ours, theirs):
        found[i, j] = ("near copy", error)
    for i, j in _equal(ours.pixels, theirs.pixels):
        found[i, j] = ("same pixels", None)
    for i, j in _equal(ours.files, theirs.files):
        found[i, j] = ("same file", None)
    pairs = tuple(
        Pair(i, j, ours.names[i], theirs.names[j], how, error)
        for (i, j), (how, error) in sorted(found.items(), key=lambda item: item[0][::-1])
    )
    unchecked = [] if as_files else ["file bytes (some images are not files)"]
    if not (any(ours.sources) and any(theirs.sources)):
        unchecked.append("sources (some images name none)")
    if not (any(ours.captions) and any(theirs.captions)):
        unchecked.append("captions (some images have none)")
    return Leaks(len(ours.names), len(theirs.names), pairs, tuple(_shared(ours, theirs)), tuple(unchecked))


def refuse_leaks(train: Split, evaluation: Split) -> None:
    """Raises UsageError, naming the first pairs, where an evaluation image is in the training data."""
    leaks = find_leaks(train, evaluation)
    if leaks:
        raise UsageError(told(leaks))


def told(leaks: Leaks) -> str:
    """One line with the first pairs, of which there is at least one, and what to do about them."""
    some = ", ".join(f"{p.train_name} and {p.evaluation_name} ({p.how})" for p in leaks.pairs[:3])
    more = f", and {len(leaks.pairs) - 3} more pairs" if len(leaks.pairs) > 3 else ""
    return (
        f"{leaks.leaked} of {leaks.evaluation} evaluation images are in the training data: {some}{more}; take "
        "them out of the training data (advplug leakage lists them)"
    )


# --- what images are told by -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Prints:
    """Of N images: names, keys that tell equals ('' where there is none), and brightness (N, SIDE, SIDE), 0 to 255."""

    names: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    thumbs: Array = field(default_factory=lambda: np.zeros((0, SIDE, SIDE), np.float32))


def _joined(parts: Iterable[_Prints]) -> _Prints:
    whole = _Prints()
    for part in parts:
        lists = ("names", "sources", "files", "pixels", "captions")
        joined = {name: getattr(whole, name) + getattr(part, name) for name in lists}
        whole = _Prints(**joined, thumbs=np.concatenate([whole.thumbs, part.thumbs]))
    return whole


def _paths(split: Split) -> Sequence[Path] | None:
    paths: Sequence[Path] | None = getattr(split.images, "paths", None)
    return paths


def _prints(split: Split, as_files: bool) -> _Prints:
    from advplug.builtin.dataset_files import file_sha256, stamp

    n, paths = len(split), _paths(split)
    sources = list(split.names or [""] * n)
    named = (
        [str(p) for p in paths]
        if paths is not None
        else [s or f"image {split.index[i]}" for i, s in enumerate(sources)]
    )
    captions = list(split.captions or [()] * n)
    if as_files and paths is not None:
        try:
            read = [_file_print(path, *stamp(path)) for path in paths]
        except UsageError as error:
            raise UsageError(f"{error}, or leave it out with --skip-bad") from error
        thumbs = np.stack([t for _, t in read]) if read else _Prints().thumbs
        return _Prints(named, sources, [file_sha256(p) for p in paths], [d for d, _ in read], captions, thumbs)
    pixels: list[str] = []
    thumbs = np.empty((n, SIDE, SIDE), np.float32)
    for start in range(0, n, BLOCK // 4):
        x = split.batch(np.arange(start, min(start + BLOCK // 4, n))).x
        exact = x.mul(255).round().byte().numpy()
        pixels += [hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest() for image in exact]
        thumbs[start : start + len(x)] = _brightness(x)
    return _Prints(named, sources, [""] * n, pixels, captions, thumbs)


def _brightness(x: Tensor) -> Array:
    """Images (B, 1 or 3, H, W) in [0, 1] to (B, SIDE, SIDE), scaled as Pillow does."""
    from torch.nn.functional import interpolate

    weights = x.new_tensor(LUMA if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1])
    grey = (x * weights[:, None, None]).sum(1, keepdim=True) * 255
    small: Array = interpolate(grey, (SIDE, SIDE), mode="bicubic", antialias=True)[:, 0].numpy()
    return small


@functools.lru_cache(maxsize=20_000)
def _file_print(path: Path, size: int, modified: int) -> tuple[str, Array]:
    """The sha256 of a file's RGB pixels, and its brightness; `size` and `modified` tell its versions apart."""
    from PIL import Image

    from advplug.builtin.dataset_files import read_rgb

    image = read_rgb(path)
    told = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    thumb = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return told, np.asarray(thumb, np.float32)


@functools.cache
def _area(out: int) -> Array:
    """(out, SIDE): each output pixel is the mean of what it covers."""
    edges = np.arange(out + 1) * SIDE / out
    at = np.arange(SIDE)
    covered = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return (covered.clip(0) * out / SIDE).astype(np.float32)


def _hashes(thumbs: Array) -> tuple[Array, Array]:
    """Difference hash and perceptual hash, each as signs float32 (N, 64).

    The first tells for 8 x 9 areas whether the next one to the right is brighter; the second which of the 8 x 8
    lowest cosine frequencies lie above their median (Zauner 2010).
    """
    areas = _area(8) @ thumbs @ _area(9).T
    rising = np.diff(areas, axis=2).reshape(-1, 64) > 0
    k, x = np.arange(8)[:, None], np.arange(SIDE)
    cosines = np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE)).astype(np.float32)
    low = (cosines @ thumbs @ cosines.T).reshape(-1, 64)
    high = low > np.median(low, axis=1, keepdims=True)
    return np.where(rising, 1, -1).astype(np.float32), np.where(high, 1, -1).astype(np.float32)


# --- comparing -------------------------------------------------------------------------------------


def _equal(ours: list[str], theirs: list[str]) -> Iterator[tuple[int, int]]:
    where: dict[str, list[int]] = {}
    for i, key in enumerate(ours):
        if key:
            where.setdefault(key, []).append(i)
    for j, key in enumerate(theirs):
        for i in where.get(key, ()):
            yield i, j


def _near(ours: _Prints, theirs: _Prints) -> Iterator[tuple[int, int, float]]:
    """Pairs whose hashes are near and whose pixels agree, with the relative difference."""
    if not ours.names or not theirs.names:
        return
    columns = _hashes(theirs.thumbs)
    contrast = np.abs(theirs.thumbs - theirs.thumbs.mean(axis=(1, 2), keepdims=True)).mean(axis=(1, 2))
    for start in range(0, len(ours.names), BLOCK):
        block = ours.thumbs[start : start + BLOCK]
        # Signs agree in 64 - d places and differ in d: their product is 64 - 2 d. Exact, and faster than counting bits.
        products = [rows @ hashes.T for rows, hashes in zip(_hashes(block), columns, strict=True)]
        i, j = np.nonzero(np.maximum(*products) >= 64 - 2 * HAMMING)
        for part in range(0, len(i), BLOCK):
            rows, cols = i[part : part + BLOCK], j[part : part + BLOCK]
            error = np.abs(block[rows] - theirs.thumbs[cols]).mean(axis=(1, 2))
            close = error <= CLOSE * contrast[cols]
            for row, col, e in zip(rows[close], cols[close], error[close], strict=True):
                yield start + int(row), int(col), float(e / max(contrast[col], 1e-6))


def normalised(caption: str) -> str:
    """Letters and digits only, in lower case, words one space apart."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def _shared(ours: _Prints, theirs: _Prints) -> Iterator[SharedCaption]:
    first, second = (_by_caption(side.captions) for side in (ours, theirs))
    for text in sorted(first.keys() & second.keys() - {""}):
        yield SharedCaption(text, tuple(first[text]), tuple(second[text]))


def _by_caption(captions: list[tuple[str, ...]]) -> dict[str, list[int]]:
    where: dict[str, list[int]] = {}
    for i, own in enumerate(captions):
        for text in {normalised(c) for c in own}:
            where.setdefault(text, []).append(i)
    return where


# --- for the command line ---------------------------------------------------------------------------


def images_of(
    text: str, part: Literal["train", "test"], offline: bool = False, skip_bad: bool = False
) -> tuple[tuple[Split, ...], tuple[str, ...]]:
    """What `text` names, in one or more splits, with notes on what was left out.

    Of a dataset by name it is the split `part`, or the other where that is empty; of a folder every image in it and
    below; of a file of captions every image that it names. Raises UsageError for anything else.
    """
    path, reference = Path(text).expanduser(), _reference(text)
    known = registry()
    if reference is not None and (reference.name in known.tables["dataset"] or not path.exists()):
        dataset = _load(known, reference, offline, skip_bad)
        chosen = (dataset.train, dataset.test) if part == "train" else (dataset.test, dataset.train)
        return (chosen[0] if len(chosen[0]) else chosen[1],), dataset.notes
    if path.is_dir():
        return _folder(path, skip_bad)
    if not path.exists():
        raise UsageError(f"'{text}' is no dataset, and there is no such folder or file; check the path")
    if path.suffix.lower() not in CAPTION_FILES:
        forms = ", ".join(CAPTION_FILES)
        raise UsageError(f"'{text}' is no file of captions ({forms}); for a dataset write its name, like npz:{text}")
    if "captions" not in known.tables["dataset"]:
        raise UsageError(f"'{text}' is a file of captions; the plugin advplug-clip reads these, install it")
    dataset = _load(known, Reference("captions", (("", str(path)),)), offline, skip_bad)
    return (dataset.train, dataset.test), dataset.notes


def _reference(text: str) -> Reference | None:
    try:
        return parse_reference(text)
    except UsageError:  # then it is a path, if anything
        return None


def _load(known: Registry, reference: Reference, offline: bool, skip_bad: bool) -> Dataset:
    entry = known.get("dataset", reference.name)
    reference = skipping(known, reference) if skip_bad else reference
    dataset: Dataset = entry.make(entry.bind(reference)).load(offline=offline)
    return dataset


def _folder(path: Path, skip_bad: bool) -> tuple[tuple[Split, ...], tuple[str, ...]]:
    """Every image file in a folder and below; with `skip_bad` those that can be read."""
    from advplug.builtin.dataset_files import decode_image, images_below, stamp

    good, notes = [], []
    for image in images_below(path):
        try:
            if skip_bad:
                _file_print(image, *stamp(image))  # kept for the comparison
            good.append(image)
        except UsageError as error:
            notes.append(f"left out: {error}")
    n = len(good)
    decode = functools.partial(decode_image, size=WHOLE, resize=WHOLE)
    return (Split(FileImages(good, decode), np.zeros(n, np.int64), np.arange(n)),), tuple(notes)


# --- for people ------------------------------------------------------------------------------------


def render(leaks: Leaks) -> str:
    """The findings as text: the first pairs, shared captions, and what was not compared."""
    from advplug.tables.text import grid

    rows = [
        [p.train_name, p.evaluation_name, p.how + ("" if p.error is None else f" (differs by {p.error:.1%})")]
        for p in leaks.pairs[:SHOWN]
    ]
    parts = [grid("Evaluation images in the training data", ["training", "evaluation", "how"], rows)] if rows else []
    if len(leaks.pairs) > SHOWN:
        parts.append(f"and {len(leaks.pairs) - SHOWN} more pairs (--json lists all)")
    found = f"{leaks.leaked}" if leaks else "none"
    parts.append(f"{found} of {leaks.evaluation} evaluation images found among {leaks.train} training images")
    if leaks.captions:
        images = len({j for c in leaks.captions for j in c.evaluation})
        some = ", ".join(f"'{c.text}'" for c in leaks.captions[:3])
        parts.append(
            f"note: {images} evaluation images share a caption with training images, no leak by itself: {some}"
        )
    parts += [f"not compared: {what}" for what in leaks.unchecked]
    return "\n".join([*parts, f"note: {OUT_OF_SCOPE}"])


def gate(leaks: Leaks) -> None:
    """Raises GateError where there is a leak."""
    if leaks:
        raise GateError(f"{leaks.leaked} of {leaks.evaluation} evaluation images are in the training data")
