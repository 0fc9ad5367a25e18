"""A CLIP model as a classifier of pixels: its columns are texts, class prompts or a gallery of captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from advplug_clip.tokens import Tokens

Groups = tuple[tuple[str, ...], ...]
"""The texts behind each column: the prompts of one class, or one caption."""

CHUNK = 256
"""Texts encoded at once."""


@dataclass(frozen=True)
class Pixels:
    """How pixels in [0, 1] reach the image tower: scaled to `size` (height, width), then (x - mean) / std."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"


@dataclass(frozen=True)
class Memory:
    """What is given up for memory where gradients are taken.

    `micro_batch` images at a time pass the image tower, and are computed again on the way back (0: all at once);
    `checkpointing` keeps a block's inputs only (Chen et al. 2016); `bf16` computes in bfloat16. Without gradients,
    as in decisions, everything is float32.
    """

    micro_batch: int = 0
    checkpointing: bool = False
    bf16: bool = False


class ClipScorer(nn.Module):
    """An open_clip model with pixel-space input. Logits (B, C) are `scale` times the cosine of image and text.

    Texts are encoded once, without gradient. Whoever changes the text tower's weights other than by `load_state_dict`
    calls `refresh`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, clip: nn.Module, tokens: Tokens, groups: Groups, pixels: Pixels, memory: Memory | None = None
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.tokens, self.groups, self.pixels, self.memory = tokens, groups, pixels, memory or Memory()
        self.size = pixels.size
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, -1, 1, 1), persistent=False)
        self._known: dict[str, Tensor] = {}
        self._columns: Tensor | None = None
        self.assumed: str | None = None
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    # --- images ---

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 1 or 3, H, W) in [0, 1]."""
        features = functional.normalize(self.encode_image(x), dim=-1)
        # A traced graph holds no number that is read off a tensor.
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        scale = self.clip.logit_scale.detach().exp() if traced else self.scale
        logits: Tensor = scale * (features @ self.columns.to(features).T)
        return logits

    def encode_image(self, x: Tensor) -> Tensor:
        """Features (B, D), projected and not normalised; grey images count as three equal channels.

        Scaling is antialiased and, unlike an image library's, not rounded and clipped afterwards.
        """
        step = self.memory.micro_batch
        if not step or len(x) <= step or not torch.is_grad_enabled() or self._follows_batches():
            return self._tower(x)
        parts = [checkpoint(self._tower, part, use_reentrant=False) for part in torch.split(x, step)]
        return torch.cat(parts)

    def _tower(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if tuple(x.shape[2:]) != self.size:
            x = functional.interpolate(x, self.size, mode=self.pixels.mode, align_corners=False, antialias=True)
        x = (x - self.mean) / self.std
        if not (self.memory.bf16 and torch.is_grad_enabled()):
            features: Tensor = self.clip.encode_image(x)
            return features
        with torch.autocast(x.device.type, torch.bfloat16):
            features = self.clip.encode_image(x)
        return features.float()

    def _follows_batches(self) -> bool:
        """Whether statistics are taken from the batch, which must then stay whole."""
        return any(m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.clip.visual.modules())

    # --- texts ---

    @property
    def scale(self) -> float:
        """What cosines are multiplied with to give logits."""
        return float(self.clip.logit_scale.detach().exp())

    @property
    def columns(self) -> Tensor:
        """Unit features (C, D) of the texts: of several, the mean of their unit features, scaled to unit length."""
        where = self.clip.logit_scale.device
        if self._columns is None:
            flat = [text for group in self.groups for text in group]
            features = self.encode_text(flat)
            owner = torch.tensor([i for i, g in enumerate(self.groups) for _ in g], dtype=torch.long, device=where)
            means = features.new_zeros(len(self.groups), features.shape[1]).index_add_(0, owner, features)
            self._columns = functional.normalize(means, dim=-1)
        self._columns = self._columns.to(where)
        return self._columns

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit features (N, D) in float32, without gradient; texts that were seen before are not encoded again."""
        if not texts:
            return self.encode_text([""])[:0]
        where = self.clip.logit_scale.device
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        with torch.no_grad(), torch.autocast(where.type, enabled=False), _evaluating(self.clip):
            for start in range(0, len(fresh), CHUNK):
                part = fresh[start : start + CHUNK]
                features = self.clip.encode_text(self.tokens(part).to(where))
                self._known.update(zip(part, functional.normalize(features, dim=-1), strict=True))
            return torch.stack([self._known[text].to(where) for text in texts])

    def with_gallery(self, texts: Sequence[str]) -> ClipScorer:
        """The same model with a column for each of these texts; it shares all weights and what it read before."""
        made = ClipScorer(self.clip, self.tokens, tuple((text,) for text in texts), self.pixels, self.memory)
        made.to(self.mean.device)
        made._known, made.assumed = self._known, self.assumed
        made.training = self.training
        return made

    def refresh(self) -> None:
        """Forgets what was computed with other weights of the text tower."""
        self._known.clear()
        self._columns = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: how many texts were cut to the tower's length, and what had to be assumed."""
        flat = [text for group in self.groups for text in group]
        return tuple(note for note in (self.tokens.cut_note(flat), self.assumed) if note)


def frozen_texts(clip: nn.Module) -> nn.Module:
    """`clip` with gradients for the parameters of its image tower only."""
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    return clip


def _loaded(module: nn.Module, keys: Any) -> None:
    if isinstance(module, ClipScorer):
        module.refresh()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: dropout and the like are no part of what a text means."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode
