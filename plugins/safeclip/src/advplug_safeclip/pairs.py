"""Pairs of images and captions as a model is trained on them: in random views, read once and counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from advplug.data import Split
from advplug.errors import CellFailure, UsageError
from advplug_clip import finetune
from advplug_clip.scorer import ClipScorer
from advplug_safeclip.looks import view
from advplug_safeclip.settings import Views
from advplug_safeclip.words import Words, read_words

Array: TypeAlias = np.ndarray[Any, Any]

FEWEST = 4
"""Pairs that there must be: two for each loss."""
HELD = 2**31
"""Bytes of decoded images that are kept in memory at most; more are read again each time."""


@dataclass
class Ledger:
    """What training has cost so far: images and texts that were encoded, and those of them that gradients passed;
    seconds by phase, and those of them in which the model waited for data."""

    images: int = 0
    texts: int = 0
    trained: int = 0
    waiting: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - clock

    @contextmanager
    def wait(self) -> Iterator[None]:
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.waiting += time.perf_counter() - clock

    def facts(self, pairs: int, epochs: int) -> dict[str, Any]:
        """JSON-ready; `plain_passes` are those of plain training for as many `epochs` on as many `pairs`."""
        passes, whole = self.images + self.texts, sum(self.seconds.values())
        return {
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "data_share": round(self.waiting / whole, 4) if whole else 0.0,
            "image_encodings": self.images,
            "text_encodings": self.texts,
            "with_gradient": self.trained,
            "passes": passes,
            "plain_passes": 2 * pairs * epochs,
        }


@dataclass(frozen=True)
class Pairs:
    """Images and captions of a training split, in random views on the device.

    `held` (N, C, H, W) are the images as bytes where they fit into memory, `tokens` (C, length) all captions, `words`
    the same as words where some are changed. `numbers` (C,) tell captions that read the same, `first` (N + 1,) where
    each image's captions start among all.
    """

    data: Split
    held: Tensor | None
    tokens: Tensor
    words: Words | None
    numbers: Tensor
    first: Array
    drawn: Views
    device: torch.device
    ledger: Ledger

    def __len__(self) -> int:
        return len(self.data)

    def images(self, rows: Array, draws: torch.Generator, plain: bool = False) -> Tensor:
        """Views (B, 3, H, W) of the images at `rows`; as they are where they should be `plain`."""
        with self.ledger.wait():
            x = self.data.batch(rows).x if self.held is None else self.held[torch.from_numpy(rows)].float().div_(255)
            x = x.to(self.device)
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            return x if plain else view(x, self.drawn, draws)

    def captions(self, rows: Array, draws: torch.Generator) -> Tensor:
        """One caption of each image at random, by its place (B,) among all captions."""
        start, amount = self.first[rows], self.first[rows + 1] - self.first[rows]
        offset = (torch.rand(len(rows), generator=draws).double().numpy() * amount).astype(int)
        return torch.from_numpy(start + offset)

    def texts(self, captions: Tensor, draws: torch.Generator, plain: bool = False) -> Tensor:
        """Tokens (B, length) of changed captions; of the captions as they are where they should be `plain`."""
        with self.ledger.wait():
            if plain or self.words is None:
                return self.tokens[captions].to(self.device)
            return self.words.changed(captions, self.drawn.words, draws).to(self.device)

    def same(self, captions: Tensor) -> Tensor:
        """Which of the captions (B,) read the same, (B, B) bool, each the same as itself."""
        numbers = self.numbers[captions].to(self.device)
        return numbers[:, None] == numbers[None]

    # --- through the model ---

    def encode_images(self, scorer: ClipScorer, x: Tensor) -> Tensor:
        """Unit features (B, D)."""
        self._count(images=len(x))
        return functional.normalize(scorer.encode_image(x.contiguous(memory_format=torch.channels_last)), dim=-1)

    def encode_texts(self, scorer: ClipScorer, tokens: Tensor) -> Tensor:
        """Unit features (B, D), with gradient where gradients are recorded."""
        self._count(texts=len(tokens))
        return functional.normalize(scorer.clip.encode_text(tokens), dim=-1)

    def _count(self, images: int = 0, texts: int = 0) -> None:
        self.ledger.images += images
        self.ledger.texts += texts
        self.ledger.trained += (images + texts) * torch.is_grad_enabled()


def read(what: str, data: Split, scorer: ClipScorer, drawn: Views, device: torch.device) -> Pairs:
    """The pairs of a split. Raises UsageError for an image without a caption, CellFailure for too few pairs."""
    if data.captions is None:
        raise UsageError(f"{what} learns from captions and the dataset has none; use captioned data, as digit-scenes")
    own = finetune.captions_of(what, data)
    if len(data) < FEWEST:
        raise CellFailure(f"{what} needs at least {FEWEST} pairs to learn from, got {len(data)}; use more images")
    flat = [text for texts in own for text in texts]
    known: dict[str, int] = {}
    numbers = torch.tensor([known.setdefault(text, len(known)) for text in flat])
    first = np.concatenate([[0], np.cumsum([len(texts) for texts in own])])
    tokens = scorer.tokens(flat)
    table = read_words(flat, scorer.tokens) if drawn.words else None
    return Pairs(data, _held(data), tokens, table, numbers, first, drawn, device, Ledger())


def _held(data: Split) -> Tensor | None:
    """All images as bytes (N, C, H, W), decoded once; None where they are too many or are no bytes."""
    first = data.batch(np.arange(1)).x
    if first.numel() * len(data) > HELD:
        return None
    made = torch.empty((len(data), *first.shape[1:]), dtype=torch.uint8)
    for start in range(0, len(data), 256):
        x = data.batch(np.arange(start, min(start + 256, len(data)))).x
        rounded = x.mul(255).round()
        if not torch.allclose(rounded / 255, x, rtol=0, atol=1e-6):
            return None
        made[start : start + len(x)] = rounded.byte()
    return made


def spread(rows: Sequence[int] | Array, size: int) -> Iterator[Array]:
    """`rows` in order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield np.asarray(rows[start : start + size])
