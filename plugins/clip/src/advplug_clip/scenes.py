"""Digit scenes: real handwritten digits in colour on coloured ground, with captions, drawn on the spot.

Every attribute has a random stream of its own, so a smaller set is the beginning of a larger one. The generator is
NumPy's legacy one, whose streams are guaranteed for ever.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.builtin.dataset_sources import EVALUATE_SMALL, SMALL_BUDGETS
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.keys import digest
from advplug_clip.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    PLACES,
    PROMPTS,
    SIZES,
    TEMPLATES,
    Scene,
    long_caption,
    short_caption,
)

if TYPE_CHECKING:
    from advplug.data import Dataset, Split

Array = np.ndarray[Any, Any]
FORMAT = 1
"""Raised when the same parameters would give other pixels or captions."""
HELD_OUT = 400
"""Of scikit-learn's 1,797 digits, those that only test scenes show."""
SMALL, LARGE = 18 / 32, 25 / 32
"""Side of a digit as a share of the image's, or of a cell's where there are several digits."""
JITTER = 1 / 32
"""By how much of the image's side a digit may be off its place, either way."""
COLOUR_SD, NOISE_SD = 0.04, 0.03
SHORT, DROPPED = 0.6, 0.6
"""Share of training captions that name the digit only; how often each other leaves an attribute out."""
LEGIBLE = 8
"""Pixels a side below which digits that come as 8 x 8 lose what they are."""
_TRAIN, _TEST = 0, 1


@dataclass(frozen=True)
class DigitScenes:
    """`train` and `n` scenes, `size` pixels a side, of 1 to `count` copies of a digit; a training scene has one
    caption, a test scene `captions` full ones in different words."""

    train: int
    n: int
    size: int
    count: int
    captions: int
    seed: int
    name = "digit-scenes"

    def info(self) -> DatasetInfo:
        """Raises UsageError where `count` digits would be too small to be read."""
        grid = math.ceil(math.sqrt(self.count))
        least = grid * math.ceil((LEGIBLE - 0.5) * LARGE / SMALL)
        if grid > 1 and self.size < least:
            raise UsageError(f"digit-scenes: {self.count} digits need size={least} or more, got size={self.size}")
        evaluate = EVALUATE_SMALL if self.n > EVALUATE_SMALL else None
        return DatasetInfo(DIGITS, 3, (self.size, self.size), SMALL_BUDGETS, evaluate, captions=True, images=self.n)

    def fingerprint(self) -> str:
        version = importlib.metadata.version("scikit-learn")
        return digest({"digit-scenes": version, "params": vars(self), "format": FORMAT})

    def load(self, offline: bool = False) -> Dataset:
        """Draws both splits; they share no handwritten digit."""
        from sklearn.datasets import load_digits

        from advplug.data import Dataset
        from advplug.splits import choose, ranks

        grey, labels = load_digits(return_X_y=True)
        held_out = choose(labels, HELD_OUT, ranks(range(len(labels))))
        grey = (grey / 16).reshape(-1, 8, 8)
        train = self._split(_TRAIN, self.train, grey, labels, np.flatnonzero(~held_out))
        return Dataset(self.info(), train, self._split(_TEST, self.n, grey, labels, np.flatnonzero(held_out)))

    def _split(self, part: int, amount: int, grey: Array, labels: Array, pool: Array) -> Split:
        from advplug.data import ArrayImages, Split

        scenes = list(itertools.islice(self._scenes(part), amount))
        shown = np.array([s.digit for s in scenes], dtype=np.int64)
        # Which handwritten digits: copy k of an image is drawn from all of its class in the pool.
        draws = self._stream(part, "writer").random_sample((amount, self.count))
        by_class = [pool[labels[pool] == d] for d in range(10)]
        sizes = np.array([len(c) for c in by_class])[shown]
        chosen = (draws * sizes[:, None]).astype(int)
        writers = np.stack([by_class[d][row] for d, row in zip(shown, chosen, strict=True)])
        images = self._render(part, scenes, grey, writers)
        names = tuple(
            "scikit-learn digit " + "+".join(map(str, row[: s.count])) for row, s in zip(writers, scenes, strict=True)
        )
        return Split(ArrayImages(images), shown, np.arange(amount), self._captions(part, scenes), names)

    def _stream(self, part: int, what: str) -> np.random.RandomState:
        return np.random.RandomState([self.seed, part, *what.encode()])

    def _scenes(self, part: int) -> Iterator[Scene]:
        """Scenes without end, no two alike before all were shown; every ten hold each digit once."""
        places: list[tuple[str | None, int]] = [(place, 1) for place in PLACES]
        places += [(None, count) for count in range(2, self.count + 1)]
        looks = list(itertools.product(COLOURS, SIZES, places, BACKGROUNDS))
        order = self._stream(part, "order")
        rounds = [self._stream(part, f"digit {d}") for d in range(10)]
        while True:
            deals = [r.permutation(len(looks)) for r in rounds]
            for turn in range(len(looks)):
                for d in order.permutation(10):
                    colour, size, (place, count), background = looks[deals[d][turn]]
                    yield Scene(int(d), colour, size, place, background, count)

    def _captions(self, part: int, scenes: list[Scene]) -> tuple[tuple[str, ...], ...]:
        draws = self._stream(part, "words").random_sample((len(scenes), 5 + len(ATTRIBUTES)))
        if part == _TRAIN:
            return tuple((_training_caption(s, row),) for s, row in zip(scenes, draws.tolist(), strict=True))
        return tuple(
            tuple(
                long_caption(s, (int(row[1] * TEMPLATES) + k) % TEMPLATES, [(w + k / 3) % 1 for w in row[2:5]])
                for k in range(self.captions)
            )
            for s, row in zip(scenes, draws.tolist(), strict=True)
        )

    # --- pixels ---

    def _render(self, part: int, scenes: list[Scene], grey: Array, writers: Array) -> Array:
        """Images uint8 (N, 3, size, size)."""
        amount = len(scenes)
        mask = self._masks(part, scenes, grey, writers)
        tints = self._stream(part, "tints").normal(0, COLOUR_SD, (amount, 2, 3)).astype(np.float32)
        front = np.array([COLOURS[s.colour] for s in scenes], np.float32) + tints[:, 0]
        back = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32) + tints[:, 1]
        noise = self._stream(part, "noise")
        images = np.empty((amount, 3, self.size, self.size), np.uint8)
        for start in range(0, amount, 512):  # the noise of all at once would take eight bytes a value
            rows = slice(start, start + 512)
            low, high = back[rows, :, None, None], front[rows, :, None, None]
            pixels = low + (high - low) * mask[rows, None]
            pixels += noise.normal(0, NOISE_SD, pixels.shape)
            images[rows] = np.rint(pixels.clip(0, 1) * 255)
        return images

    def _masks(self, part: int, scenes: list[Scene], grey: Array, writers: Array) -> Array:
        """How much of each pixel is ink, (N, size, size), in [0, 1]."""
        amount, side = len(scenes), self.size
        copies = np.array([s.count for s in scenes])
        grid = np.ceil(np.sqrt(copies)).astype(int)
        share = np.array([LARGE if s.size == "large" else SMALL for s in scenes])
        # A cell has no room to spare for places: there a digit fills it, or the same part of it as of an image.
        sides = np.rint(np.where(copies > 1, side // grid * share / LARGE, side * share)).astype(int)
        reach = round(side * JITTER)
        jitter = self._stream(part, "jitter").random_sample((amount, self.count, 2)) * (2 * reach + 1)
        jitter = jitter.astype(int) - reach
        cells = self._stream(part, "cells").random_sample((amount, math.ceil(math.sqrt(self.count)) ** 2))
        corners = np.array([_corner(s.place) for s in scenes])
        mask = np.zeros((amount, side, side), np.float32)
        for k in range(self.count):
            for here, cut in {(int(s), int(g)) for s, g in zip(sides[copies > k], grid[copies > k], strict=True)}:
                rows = np.flatnonzero((copies > k) & (sides == here) & (grid == cut))
                room = (side // cut) - here
                cell = np.argsort(cells[rows, : cut * cut], axis=1)[:, k]
                origin = np.stack([cell // cut, cell % cut], axis=1) * (side // cut)
                start = np.rint(corners[rows] * room).astype(int) + jitter[rows, k]
                start = origin + start.clip(0, room)
                ink = _enlarged(grey[writers[rows, k]], here)
                y, x = (start[:, axis, None] + np.arange(here) for axis in (0, 1))
                mask[rows[:, None, None], y[:, :, None], x[:, None, :]] = ink
        return mask


def _training_caption(scene: Scene, row: list[float]) -> str:
    """A short caption, or a long one from which attributes are dropped."""
    if row[0] < SHORT:
        return short_caption(scene, int(row[1] * len(PROMPTS)))
    said = {name for name, draw in zip(ATTRIBUTES, row[5:], strict=True) if draw >= DROPPED}
    return long_caption(scene, int(row[1] * TEMPLATES), row[2:5], said)


def _corner(place: str | None) -> tuple[float, float]:
    """Where a digit stands in the room that it leaves: down and right, each from 0 to 1."""
    if place is None or place == "centre":
        return 0.5, 0.5
    down, right = place.split()
    return float(down == "bottom"), float(right == "right")


def _enlarged(grey: Array, side: int) -> Array:
    """(N, 8, 8) to (N, side, side), bilinear."""
    at = ((np.arange(side) + 0.5) * 8 / side - 0.5).clip(0, 7)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    enlarged: Array = weights @ grey @ weights.T
    return enlarged
