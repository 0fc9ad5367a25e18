"""Tiny CLIP models: open_clip's, small enough to be trained from nothing in about two minutes on one core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from advplug.vision import import_torchvision
from advplug_clip.scorer import ClipScorer, Groups, Pixels, frozen_texts
from advplug_clip.tokens import Tokens, bundled, pieces

SIDE = 32
FEATURES = 128
PIXELS = Pixels((SIDE, SIDE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CHANNELS = ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1), (96, 2))
"""Width and stride of each convolution."""
TRANSFORMER = {"layers": 3, "width": 96, "head_width": 32, "patch_size": 8, "image_size": SIDE}
_UNUSED = torch.iinfo(torch.int64).max


class ConvolutionalTower(nn.Module):
    """Six convolutions; their last map as it is, its maxima and its means give the features.

    The place of things is in the map, whether they are there in the maxima.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, stride in CHANNELS:
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers)
        self.image_size = (SIDE, SIDE)
        self.projection = nn.Linear(before * ((SIDE // 8) ** 2 + 2), FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 128) of normalised images (B, 3, 32, 32)."""
        maps = self.layers(x)
        features: Tensor = self.projection(torch.cat([maps.flatten(1), maps.amax((2, 3)), maps.mean((2, 3))], 1))
        return features


class WordTable(nn.Module):
    """Embeddings of those word pieces that the captions use, and one for all others, which starts at zero.

    It takes CLIP's own token numbers; a table of all 49,408 would be most of a tiny model.
    """

    known: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("known", torch.full((rows - 1,), _UNUSED))
        self.embedding = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            self.embedding.weight[-1].zero_()

    def learn(self, numbers: Tensor) -> int:
        """Gives a row to each of these token numbers, the first if there are too many; how many have none."""
        taken = numbers[: len(self.known)]
        self.known.fill_(_UNUSED)
        self.known[: len(taken)] = taken.sort().values
        return len(numbers) - len(taken)

    def forward(self, numbers: Tensor) -> Tensor:
        """Embeddings (N, length, width) of token numbers (N, length)."""
        rows = torch.searchsorted(self.known, numbers).clamp_(max=len(self.known) - 1)
        rows = torch.where(self.known[rows] == numbers, rows, len(self.known))
        embedded: Tensor = self.embedding(rows)
        return embedded


def scorer(tower: Literal["convolutional", "transformer"], groups: Groups, context: int, words: int) -> ClipScorer:
    """An untrained tiny CLIP: one layer of text transformer that reads `context` tokens, `words` rows of embeddings.

    Initial weights come from the global generator.
    """
    import_torchvision()
    from open_clip import CLIP

    text = {"context_length": context, "vocab_size": words, "width": 96, "heads": 3, "layers": 1}
    # open_clip builds a tower of its own kind in any case; the convolutional one takes the place of a narrow one.
    narrow = {"layers": 1, "width": 32, "head_width": 32}
    vision = TRANSFORMER | (narrow if tower == "convolutional" else {})
    clip = CLIP(FEATURES, vision, text)
    if tower == "convolutional":
        clip.visual = ConvolutionalTower()
    clip.token_embedding = WordTable(words, text["width"])
    tokens = bundled(context)
    learn_words(clip, tokens, [text for group in groups for text in group])
    return ClipScorer(frozen_texts(clip), tokens, groups, PIXELS)


def learn_words(clip: nn.Module, tokens: Tokens, texts: Sequence[str]) -> int:
    """Makes the word table that of these texts; returns how many of their word pieces have no row."""
    table = clip.token_embedding
    assert isinstance(table, WordTable)
    return table.learn(pieces(tokens(texts))) if texts else 0
