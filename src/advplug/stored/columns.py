"""Records of arrays and numbers as bytes, for the store. No torch."""

from __future__ import annotations

import io
import zipfile
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")


def packed(record: DataclassInstance) -> bytes:
    """A dataclass of arrays and numbers as a compressed, pickle-free archive; what is None is left out."""
    values: dict[str, Any] = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in values.items() if v is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def holds(data: bytes, name: str) -> bool:
    """Whether a packed record has that value; much faster than unpacking it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return f"{name}.npy" in archive.namelist()


def unpacked(kind: type[Record], data: bytes) -> Record:
    """The inverse of `packed`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        values = {k: archive[k] for k in archive.files}
    return kind(**{k: v.item() if v.ndim == 0 else v for k, v in values.items()})
