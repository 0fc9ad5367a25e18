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
class Dataset:
    """A training and a test split with what a model has to know of them; `notes` say what was left out of them."""

    info: DatasetInfo
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
