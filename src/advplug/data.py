"""Images and labels in memory or on disk, handed out as float32 batches in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from advplug.contracts import Batch, DatasetInfo
from advplug.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Images(Protocol):
    """Random access to images of one shape."""

    def __len__(self) -> int: ...
    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """Float32 images (B, C, H, W) in [0, 1]."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images held as uint8 (0 to 255) or float32 in [0, 1], shape (N, C, H, W)."""

    array: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.array)

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        import torch

        picked = torch.from_numpy(np.ascontiguousarray(self.array[rows]))
        return picked.float().div_(255) if picked.dtype == torch.uint8 else picked.float()


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded on demand by `decode` to uint8 (C, H, W)."""

    paths: Sequence[Path]
    decode: Callable[[Path], np.ndarray[Any, Any]]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return ArrayImages(np.stack([self.decode(self.paths[int(i)]) for i in rows])).take(np.arange(len(rows)))


@dataclass(frozen=True)
class Split:
    """Images, labels int64 (N,), and `index` (N,): each image's position in the dataset's own order.

    `captions` are each image's own texts, where it has some; `names` say where each image comes from (a path, an
    identifier of its source), where that is known.
    """

    images: Images
    labels: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any]
    captions: tuple[tuple[str, ...], ...] | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: np.ndarray[Any, Any]) -> Split:
        return Split(
            _Picked(self.images, rows),
            self.labels[rows],
            self.index[rows],
            None if self.captions is None else tuple(self.captions[int(i)] for i in rows),
            None if self.names is None else tuple(self.names[int(i)] for i in rows),
        )

    def changed(
        self,
        rows: np.ndarray[Any, Any],
        images: np.ndarray[Any, Any] | None = None,
        labels: np.ndarray[Any, Any] | None = None,
        captions: Sequence[tuple[str, ...]] | None = None,
    ) -> Split:
        """The split with other images (uint8, (k, C, H, W)), labels or captions at `rows` (k,)."""
        new_labels = self.labels
        if labels is not None:
            new_labels = self.labels.copy()
            new_labels[rows] = labels
        new_captions = self.captions
        if captions is not None and self.captions is not None:
            written = list(self.captions)
            for row, texts in zip(rows, captions, strict=True):
                written[int(row)] = texts
            new_captions = tuple(written)
        pixels = self.images
        if images is not None:
            place = np.full(len(self), -1)
            place[rows] = np.arange(len(rows))
            pixels = _Patched(self.images, ArrayImages(images), place)
        return Split(pixels, new_labels, self.index, new_captions, self.names)

    def joined(
        self,
        images: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any],
        captions: Sequence[tuple[str, ...]] | None = None,
        names: Sequence[str] | None = None,
    ) -> Split:
        """The split with further images (uint8, (k, C, H, W)) at its end; their positions follow its greatest one."""
        start = int(self.index.max(initial=-1)) + 1
        if self.captions is not None and captions is None:
            raise ValueError("images that join captioned ones need captions")
        return Split(
            _Joined(self.images, ArrayImages(images)),
            np.concatenate([self.labels, labels]),
            np.concatenate([self.index, np.arange(start, start + len(images))]),
            None if self.captions is None else (*self.captions, *(captions or ())),
            None if self.names is None else (*self.names, *(names or [f"added {i}" for i in range(len(images))])),
        )

    def batch(self, rows: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> Batch:
        """The images at `rows`. Raises UsageError where a pixel is not a number in [0, 1]."""
        import torch

        x = self.images.take(rows)
        low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise UsageError(f"images must hold numbers in [0, 1], found {low:g} to {high:g}; divide bytes by 255")
        labels = torch.from_numpy(np.ascontiguousarray(self.labels[rows])).long()
        index = torch.from_numpy(np.ascontiguousarray(self.index[rows])).long()
        return Batch(x.to(device), labels.to(device), index)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))), device)


@dataclass(frozen=True)
class _Picked:
    images: Images
    rows: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paths(self) -> Sequence[Path] | None:
        """The files of the images, where they are read from files."""
        paths: Sequence[Path] | None = getattr(self.images, "paths", None)
        return None if paths is None else [paths[int(i)] for i in self.rows]

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return self.images.take(self.rows[rows])


@dataclass(frozen=True)
class _Patched:
    """`images` with others in the place of some; `place` (N,) says which, -1 where an image is as it was."""

    images: Images
    others: Images
    place: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        import torch

        taken, place = self.images.take(rows), self.place[rows]
        hit = place >= 0
        if hit.any():
            taken = taken.clone()
            taken[torch.from_numpy(hit)] = self.others.take(place[hit])
        return taken


@dataclass(frozen=True)
class _Joined:
    """`first`, then `second`."""

    first: Images
    second: Images

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def take(self, rows: np.ndarray[Any, Any]) -> Tensor:
        import torch

        rows = np.asarray(rows)
        late = rows >= len(self.first)
        if not late.any():
            return self.first.take(rows)
        added = self.second.take(rows[late] - len(self.first))
        if late.all():
            return added
        early = self.first.take(rows[~late])
        taken = torch.empty((len(rows), *early.shape[1:]), dtype=early.dtype)
        taken[torch.from_numpy(~late)], taken[torch.from_numpy(late)] = early, added
        return taken


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with what a model has to know of them; `notes` say what was left out of them."""

    info: DatasetInfo
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
