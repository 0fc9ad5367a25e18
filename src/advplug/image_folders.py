"""Images of a dataset as PNG files, one subfolder a class: what `folder:` and `captions:` read back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from advplug.data import Split

Array = np.ndarray[Any, Any]
_AT_ONCE = 256
_UNSAFE = '/\\:*?"<>|\0'
"""No part of a file's name, here or on another system."""


def class_folders(classes: Sequence[str]) -> tuple[str, ...]:
    """The folder of each class, in an order that sorts: their names where these can stand, else with numbers before."""
    names = ["".join("_" if c in _UNSAFE else c for c in name).strip() for name in classes]
    if names == list(classes) and names == sorted(names) and not any(n[:1] in ("", ".", "_") for n in names):
        return tuple(names)
    digits = len(str(len(names) - 1))
    return tuple(f"{i:0{digits}}-{name}" for i, name in enumerate(names))


def write_images(data: Split, folder: Path, part: str, folders: Sequence[str] | None) -> list[str]:
    """Writes the images to `folder/part`, in the folders of their classes where there are some.

    Returns the files' names in the order of the images, from `folder` on. Pixels are rounded to 8 bits; one channel
    gives grey files, three give RGB. Raises OSError where that cannot be, UsageError for pixels outside [0, 1].
    """
    digits = len(str(max(len(data) - 1, 0)))
    # Only classes with images: an empty class folder is an error to those who read it.
    for name in [folders[i] for i in np.unique(data.labels)] if folders else [""]:
        (folder / part / name).mkdir(parents=True)
    names = []
    for start in range(0, len(data), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(data)))
        for row, pixels in zip(rows.tolist(), in_bytes(data, rows), strict=True):
            inside = f"{part}/{folders[int(data.labels[row])]}" if folders else part
            names.append(f"{inside}/{row:0{digits}}.png")
            (folder / names[-1]).write_bytes(png(pixels))
    return names


def in_bytes(data: Split, rows: Array) -> Array:
    """Images uint8 (k, H, W, C)."""
    pixels: Array = (data.batch(rows).x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels


def png(pixels: Array) -> bytes:
    """An image uint8 (H, W, C), of 1 or 3 channels, as a file's bytes."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(held, "PNG")
    return held.getvalue()
