"""Captions as rows of words, and easy data augmentation of a whole batch at once (Wei and Zou 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advplug.errors import UsageError
from advplug_clip.tokens import Tokens

NONE = -1
"""Where a row has no word."""
OPERATIONS = ("replace", "insert", "swap", "delete")
SAMPLE = 256
"""Captions that are read both ways, to see whether their words make the same tokens."""


def synonym_groups() -> list[tuple[str, ...]]:
    """Groups of words that may stand for each other in a caption."""
    lines = files(__package__).joinpath("synonyms.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split()) for line in lines if line and not line.startswith("#")]


@dataclass(frozen=True)
class Words:
    """Captions as numbers of words, and the words as tokens.

    `rows` (N, L) int64 hold each caption's words, then `NONE`; `pieces` (W, P) each word's tokens and `widths` (W,) how
    many there are; `synonyms` (W, S) the words that may stand for a word, then `NONE`. `first` and `last` are the
    tokens that mark the ends of a text, `length` is the number of tokens that the tower reads.
    """

    rows: Tensor
    pieces: Tensor
    widths: Tensor
    synonyms: Tensor
    first: int
    last: int
    length: int

    def changed(self, captions: Tensor, share: float, draws: torch.Generator) -> Tensor:
        """Tokens (B, length) of the captions (B,), each changed by one of the four operations, drawn at random.

        A `share` of the words, one at least, is replaced by synonyms, joined by a synonym of a word of the caption at
        a random place, or swapped; or each word is deleted with probability `share`, all but one at most.
        """
        rows = self.rows[captions]
        operation = torch.randint(len(OPERATIONS), (len(rows), 1), generator=draws)
        chosen = {name: operation == i for i, name in enumerate(OPERATIONS)}
        lengths = (rows != NONE).sum(1, keepdim=True)
        count = (share * lengths).long().clamp(min=1)
        rows = self._replaced(rows, torch.where(chosen["replace"], count, 0), draws)
        rows = _swapped(rows, lengths, torch.where(chosen["swap"], count, 0), draws)
        rows = _without(rows, chosen["delete"], share, draws)
        return self.tokens(self._joined(rows, lengths, torch.where(chosen["insert"], count, 0), draws))

    def tokens(self, rows: Tensor) -> Tensor:
        """Tokens (B, length) of rows of words (B, L); what does not fit is cut, the end always among them."""
        there = rows != NONE
        words = rows.clamp(min=0)
        flat = self.pieces[words].flatten(1)
        places = torch.arange(self.pieces.shape[1])
        used = (there[..., None] & (places < self.widths[words][..., None])).flatten(1)
        # Stable: words keep their order, the gaps between them close.
        order = torch.sort((~used).byte(), dim=1, stable=True).indices[:, : self.length - 2]
        body, kept = flat.gather(1, order), used.gather(1, order)
        ends = kept.sum(1)
        made = torch.zeros(len(rows), self.length, dtype=torch.long)
        made[:, 0] = self.first
        made[:, 1 : 1 + body.shape[1]] = torch.where(kept, body, 0)
        made[torch.arange(len(rows)), ends + 1] = self.last
        return made

    # --- the operations ---

    def _synonym(self, words: Tensor, draws: torch.Generator) -> Tensor:
        """One synonym of each word at random; `NONE` where it has none."""
        options = self.synonyms[words.clamp(min=0)]
        known = (options != NONE).sum(-1)
        at = (torch.rand(words.shape, generator=draws) * known).long()
        picked = options.gather(-1, at[..., None])[..., 0]
        return torch.where((words != NONE) & (known > 0), picked, NONE)

    def _replaced(self, rows: Tensor, count: Tensor, draws: torch.Generator) -> Tensor:
        others = self._synonym(rows, draws)
        keys = torch.rand(rows.shape, generator=draws).masked_fill(others == NONE, 2.0)
        ranks = keys.argsort(1).argsort(1)
        return torch.where((ranks < count) & (others != NONE), others, rows)

    def _joined(self, rows: Tensor, lengths: Tensor, count: Tensor, draws: torch.Generator) -> Tensor:
        """Further words, each before a random place; what has no synonym in the caption is as it was."""
        wide = int(count.max())
        if not wide:
            return rows
        others = self._synonym(rows, draws)
        keys = torch.rand(len(rows), wide, rows.shape[1], generator=draws)
        source = keys.masked_fill((others == NONE)[:, None], -1.0).argmax(2)
        added = others.gather(1, source).masked_fill(torch.arange(wide) >= count, NONE)
        before = (torch.rand(len(rows), wide, generator=draws) * (lengths + 1)).floor() - 0.5
        at = torch.arange(rows.shape[1], dtype=before.dtype).expand_as(rows)
        order = torch.cat([at, before], 1).argsort(dim=1, stable=True)
        return torch.cat([rows, added], 1).gather(1, order)


def _swapped(rows: Tensor, lengths: Tensor, count: Tensor, draws: torch.Generator) -> Tensor:
    for turn in range(int(count.max())):
        ends = (torch.rand(len(rows), 2, generator=draws) * lengths).long()
        pair = rows.gather(1, ends)
        # A caption of fewer words to swap, or of none, is written back as it was.
        rows = rows.scatter(1, ends, torch.where(turn < count, pair.flip(1), pair))
    return rows


def _without(rows: Tensor, chosen: Tensor, share: float, draws: torch.Generator) -> Tensor:
    keys = torch.rand(rows.shape, generator=draws).masked_fill(rows == NONE, -1.0)
    gone = chosen & (keys < share) & (keys < keys.amax(1, keepdim=True))
    return rows.masked_fill(gone, NONE)


# --- reading captions ------------------------------------------------------------------------------


def read_words(captions: Sequence[str], tokens: Tokens, groups: Iterable[Sequence[str]] | None = None) -> Words:
    """The words of `captions`, which are told apart at spaces, with the synonyms in `groups` that the captions use.

    A tower that learns from these captions knows no other words. None stands for `synonym_groups`. Raises UsageError
    for a tokenizer that does not read a text word by word, between two marks.
    """
    split = [text.split() for text in captions]
    vocabulary = list(dict.fromkeys(word for words in split for word in words)) or [""]
    number = {word: i for i, word in enumerate(vocabulary)}
    length = max((len(words) for words in split), default=1) or 1
    rows = np.full((len(split), length), NONE, dtype=np.int64)
    for i, words in enumerate(split):
        rows[i, : len(words)] = [number[word] for word in words]
    first, last = (int(token) for token in tokens([""])[0, :2])
    coded = tokens(vocabulary)
    widths = (coded == last).int().argmax(1) - 1
    pieces = coded[:, 1 : 1 + max(1, int(widths.max()))]
    table = _synonyms(number, synonym_groups() if groups is None else groups)
    made = Words(torch.from_numpy(rows), pieces, widths.clamp(min=0), table, first, last, tokens.length)
    sample = list(captions[:SAMPLE])
    if not torch.equal(made.tokens(made.rows[: len(sample)]), tokens(sample)):
        raise UsageError("this model's tokenizer does not read word by word, so no words can be changed; write words=0")
    return made


def _synonyms(number: dict[str, int], groups: Iterable[Sequence[str]]) -> Tensor:
    """Words (W, S) that may stand for each of the words."""
    found: list[list[int]] = [[] for _ in number]
    lower: dict[str, list[int]] = {}
    for word, i in number.items():
        lower.setdefault(word.lower(), []).append(i)
    for group in groups:
        known = [i for word in group for i in lower.get(word, ())]
        for own in known:
            found[own] += [other for other in known if other != own and other not in found[own]]
    table: np.ndarray[Any, Any] = np.full((len(found), max(1, *map(len, found)) if found else 1), NONE, dtype=np.int64)
    for row, others in enumerate(found):
        table[row, : len(others)] = others
    return torch.from_numpy(table)
