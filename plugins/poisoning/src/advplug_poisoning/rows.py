"""What both attacks need: classes by name, rows at random, images in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from advplug.contracts import DatasetInfo
    from advplug.data import Split

Rows = np.ndarray[Any, Any]
CHUNK = 256
"""Images that are changed at once."""


def demand_classes(info: DatasetInfo, what: str) -> tuple[str, ...]:
    """The classes. Raises UsageError where there are none that an image could be taken for."""
    if len(info.classes) < 2:
        raise UsageError(f"{what} needs images of classes, and this dataset names none; use one such as digit-scenes")
    return info.classes


def class_of(name: str, classes: Sequence[str]) -> int:
    """The class of that name, or else of that number, counted from 0. Raises UsageError."""
    told = name.strip().casefold().replace("_", " ")
    known = [c.casefold().replace("_", " ") for c in classes]
    if told in known:
        return known.index(told)
    if told.isascii() and told.isdigit() and int(told) < len(classes):
        return int(told)
    some = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    hint = "" if told.lstrip("-").isdigit() else did_you_mean(name, classes)
    hint = hint or f"; write one of {some} or a number from 0 to {len(classes) - 1}"
    raise UsageError(f"ba: the dataset has no class '{name}' for target{hint}")


def pick(rows: Rows, count: int, draws: torch.Generator) -> Rows:
    """`count` of `rows` at random, ascending."""
    order = torch.randperm(len(rows), generator=draws).numpy()
    return np.sort(rows[order[:count]])


def in_bytes(x: Tensor) -> Rows:
    """Images (B, C, H, W) in [0, 1] as uint8."""
    pixels: Rows = (x * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return pixels


def changed_images(data: Split, rows: Rows, change: Callable[[Tensor, Tensor], Tensor]) -> Rows:
    """`change` (x, index) of the images at `rows`, as uint8 (k, C, H, W)."""
    made = []
    for start in range(0, len(rows), CHUNK):
        batch = data.batch(rows[start : start + CHUNK])
        made.append(in_bytes(change(batch.x, batch.index)))
    return np.concatenate(made)
