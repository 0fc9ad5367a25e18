"""A few images of each cell, as they were and as the attack left them, kept to be looked at; of poisons likewise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advplug.evidence import Array
from advplug.stored.columns import packed, unpacked

if TYPE_CHECKING:
    from fractions import Fraction

    from torch import Tensor

    from advplug.contracts import Batch, Poisoned
    from advplug.data import Split
    from advplug.decisions import Batching
    from advplug.poisons.evidence import PoisonEvidence
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


@dataclass(frozen=True)
class PoisonSample:
    """A few rows of a training set that was attacked, and test images with the trigger.

    row (k,): positions in the poisoned training set; original, poisoned (k, C, H, W) uint8; before, after (k,): the
    classes that they are said to be of; captions (2, k): the first ones, where the data have some. Where there is a
    trigger, also index, y, wanted, answer (m,): position, true class, the class that the trigger asks for and the one
    that the victim answers, -1 for none; clean, triggered (m, C, H, W) uint8: without and with the trigger.
    """

    row: Array
    original: Array
    poisoned: Array
    before: Array
    after: Array
    captions: Array | None = None
    index: Array | None = None
    y: Array | None = None
    wanted: Array | None = None
    answer: Array | None = None
    clean: Array | None = None
    triggered: Array | None = None

    def __len__(self) -> int:
        return len(self.row)

    def to_bytes(self) -> bytes:
        return packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> PoisonSample:
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


def poisons_sampled(poisoned: Poisoned, test: Split, seen: PoisonEvidence) -> PoisonSample | None:
    """Poisons evenly taken from all, beside their originals; and the first images of `test`, those that `seen` is
    about, that the trigger has something to gain on. None where nothing was poisoned."""
    import numpy as np

    rows = np.flatnonzero(poisoned.poisons)
    if not len(rows):
        return None
    k = amount(poisoned.data.batch(rows[:1]).x.numel())
    places = np.unique(np.linspace(0, len(rows) - 1, min(k, len(rows))).round().astype(int))
    picked = rows[places]
    captions = None
    if poisoned.data.captions is not None and poisoned.originals.captions is not None:
        pairs = ((poisoned.originals.captions, places), (poisoned.data.captions, picked))
        captions = np.array([[(texts[i] or ("",))[0] for i in at.tolist()] for texts, at in pairs])
    return PoisonSample(
        row=picked,
        original=_bytes(poisoned.originals.batch(places).x),
        poisoned=_bytes(poisoned.data.batch(picked).x),
        before=poisoned.originals.labels[places],
        after=poisoned.data.labels[picked],
        captions=captions,
        **_triggered(poisoned, test, seen, k),
    )


def _triggered(poisoned: Poisoned, test: Split, seen: PoisonEvidence, k: int) -> dict[str, Array]:
    import numpy as np

    from advplug.poisons.prepared import triggered

    if poisoned.trigger is None or not seen.backdoor:
        return {}
    rows = np.flatnonzero(seen.gains)[:k]
    if not len(rows):
        return {}
    batch = test.batch(rows)
    return {
        "index": seen.index[rows],
        "y": seen.y[rows],
        "wanted": seen.wanted[rows],
        "answer": seen.triggered[rows, 0],
        "clean": _bytes(batch.x),
        "triggered": _bytes(triggered(poisoned.trigger, batch.x, batch.index)),
    }


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
