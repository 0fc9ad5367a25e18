"""Texts to the token numbers that a text tower reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from advplug.vision import import_torchvision


class Tokens:
    """A tokenizer for one text tower: rows of exactly `length` tokens, the end always among them.

    `tokenizer` (texts, length) gives token numbers (N, length); `encode` the numbers of one text, however long,
    without the marks of its start and end, or None where the tokenizer does not say.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str], int], Tensor],
        length: int,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self._tokenizer, self.length, self._encode = tokenizer, length, encode

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (N, length); a text that is too long loses its end."""
        return self._tokenizer(list(texts), self.length)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are too long to be read to the end."""
        encode = self._encode
        return 0 if encode is None else sum(len(encode(text)) + 2 > self.length for text in texts)

    def cut_note(self, texts: Sequence[str]) -> str | None:
        """A sentence for the reader where texts were cut."""
        cut = self.cut(texts)
        if not cut:
            return None
        return f"{cut} of {len(texts)} texts are longer than the {self.length} tokens that the model reads and were cut"


@cache
def _bundled() -> Any:
    import_torchvision()
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def bundled(length: int) -> Tokens:
    """CLIP's byte-pair encoding, which comes with open_clip (Radford et al. 2021); lower case."""
    return Tokens(lambda texts, n: _bundled()(texts, n), length, lambda text: _bundled().encode(text))


def pieces(rows: Tensor) -> Tensor:
    """The token numbers in `rows` (N, length), the most frequent first; those used as often, by number."""
    numbers, counts = torch.unique(rows, return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.index_select(numbers, 0, order)
