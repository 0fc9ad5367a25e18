"""A few images of each cell, as they were and as the attack left them, kept to be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advplug.columns import packed, unpacked
from advplug.evidence import Array

if TYPE_CHECKING:
    from fractions import Fraction

    from torch import Tensor

    from advplug.contracts import Batch
    from advplug.decisions import Batching
    from advplug.victim import Victim

MOST, LEAST = 8, 2
BYTES = 256 * 1024
"""Pixels kept of a cell, before compression; at least `LEAST` images are kept, however large."""


@dataclass(frozen=True)
class Sample:
    """The first `k` images of a cell.

    index, y (k,): position in the dataset and true class; clean, adversarial (k, C, H, W) uint8, the latter rounded to
    8 bits toward the clean image; before, after (k,): the class answered to the clean image, and to the adversarial
    one before rounding, -1 where no answer was given, in one decision; attacked (k,): whether there was anything to
    attack. texts (3, k): what y, before and after read, where the classes are texts of a gallery.
    """

    index: Array
    y: Array
    clean: Array
    adversarial: Array
    before: Array
    after: Array
    attacked: Array
    texts: Array | None = None

    def __len__(self) -> int:
        return len(self.y)

    def to_bytes(self) -> bytes:
        return packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Sample:
        return unpacked(cls, data)


def amount(pixels: int) -> int:
    """How many images of so many values each are kept."""
    return max(LEAST, min(MOST, BYTES // (2 * pixels)))


def sampled(
    victim: Victim, batch: Batch, attacked: Array, crafted: Mapping[Fraction, Tensor], batching: Batching
) -> dict[Fraction, Sample]:
    """By budget, the first images of `batch` beside those of `crafted` (k or more, C, H, W).

    `victim` is left as it is, its randomness and its counts too.
    """
    from advplug.decisions import decide, round_to_8_bits
    from advplug.victim import Passes

    k = min(len(batch), amount(batch.x[0].numel())) if len(batch) else 0
    if not k:
        return {}
    judge, clean = replace(victim, passes=Passes()), batch.x[:k]
    y = batch.y[:k].cpu().numpy()

    def answers(x: Tensor) -> Array:
        judge.reseed("sample")
        labels, accepted, _ = decide(judge, x, batching, 1)
        labels[~accepted] = -1
        return labels[:, 0]

    before = answers(clean)
    made = {}
    for eps, x in crafted.items():
        after = answers(x[:k])
        rounded = round_to_8_bits(clean, x[:k])
        texts = _texts(victim, (y, before, after))
        index = batch.index[:k].cpu().numpy()
        made[eps] = Sample(index, y, _bytes(clean), _bytes(rounded), before, after, attacked[:k], texts)
    return made


def _bytes(x: Tensor) -> Array:
    pixels: Array = (x * 255).round().byte().cpu().numpy()
    return pixels


def _texts(victim: Victim, labels: tuple[Array, ...]) -> Array | None:
    """The first text of each class, where the columns are those of a gallery."""
    import numpy as np

    if victim.columns is None or not victim.columns.texts:
        return None
    first: dict[int, str] = {}
    for group, text in zip(victim.columns.group.tolist(), victim.columns.texts, strict=True):
        first.setdefault(group, text)
    return np.array([[first.get(int(label), "") for label in row] for row in labels])
