"""Adversarial images kept for reuse: one file a sweep and budget, written chunk by chunk, complete or absent."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from advplug.store import explained

if TYPE_CHECKING:
    from torch import Tensor


def _path(folder: Path, sweep: str, eps: Fraction) -> Path:
    return folder / f"{sweep}-{eps.numerator}_{eps.denominator}.npy"


class CraftedWriter:
    """Collects a sweep's images (n, C, H, W) at each budget; nothing is visible before `finish`."""

    def __init__(self, folder: Path, sweep: str, budgets: tuple[Fraction, ...], n: int) -> None:
        self._paths = {eps: _path(folder, sweep, eps) for eps in budgets}
        self._n = n
        self._begun: set[Fraction] = set()
        self._folder = folder

    def put(self, eps: Fraction, start: int, x: Tensor) -> None:
        """Images `start`, `start + 1`, ... of the evaluated subset."""
        images = np.ascontiguousarray(x.float().cpu().numpy(), dtype="<f4")
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._n, *images.shape[1:])}
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not through a memory map: on a full disk, writing to one kills the process.
            with self._partial(eps).open("r+b" if eps in self._begun else "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.seek(start * images[:1].nbytes, os.SEEK_CUR)
                file.write(images.data)
                file.flush()
                os.fsync(file.fileno())
        self._begun.add(eps)

    def finish(self) -> None:
        with explained(self._folder):
            for eps in self._begun:
                os.replace(self._partial(eps), self._paths[eps])
        self._begun.clear()

    def _partial(self, eps: Fraction) -> Path:
        return self._paths[eps].with_suffix(".partial")


def crafted_files(folder: Path, sweep: str, budgets: tuple[Fraction, ...]) -> dict[Fraction, Path]:
    """Where a sweep's images are, by budget; empty unless all of them are there."""
    files = {eps: _path(folder, sweep, eps) for eps in budgets}
    return files if all(file.is_file() for file in files.values()) else {}


def has_crafted(folder: Path, sweep: str, budgets: tuple[Fraction, ...]) -> bool:
    return bool(crafted_files(folder, sweep, budgets))


def read_crafted(folder: Path, sweep: str, eps: Fraction, start: int, stop: int) -> Tensor:
    """Images `start` to `stop` of the evaluated subset, float32."""
    import torch

    images = np.load(_path(folder, sweep, eps), mmap_mode="r", allow_pickle=False)
    return torch.from_numpy(np.array(images[start:stop]))
