"""Model sources: tiny CLIP models trained on a captioned dataset, and those of open_clip. Imports no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug import weights
from advplug.builtin.models import Key, Strip
from advplug.contracts import DatasetInfo, Param, Schedule
from advplug.errors import UsageError
from advplug_clip import names, prompts

if TYPE_CHECKING:
    from torch import nn

    from advplug.contracts import Tuned
    from advplug.train import Training

REVISION = 2
"""Part of every identity: raised when the same reference would give another network or training."""
RATE, DECAY, SHIFT = 1e-3, 0.1, 2

Task = Annotated[
    Literal["zero-shot", "retrieval"], Param("what the columns are: classes in prompts, or the evaluated captions")
]
Templates = Annotated[
    str | None, Param("digits, simple, openai, or a sentence with {} for the class (none: digits or simple)")
]
Epochs = Annotated[int, Param("passes over the training images", ge=1)]
Rate = Annotated[float, Param("highest learning rate", gt=0)]
BatchSize = Annotated[int, Param("image-caption pairs a training step, each other's wrong answers", ge=2)]
Context = Annotated[int, Param("tokens of a caption that are read, the two that mark its ends among them", ge=3)]
Words = Annotated[int, Param("word pieces of the training captions that are told apart, the most frequent ones", ge=8)]
Seed = Annotated[int, Param("another number, another network: initial weights, order of images", ge=0)]


@dataclass(frozen=True)
class Texts:
    """What the columns of the logits are."""

    task: str
    templates: str | None

    def misfit(self, name: str, info: DatasetInfo) -> str | None:
        """Why a dataset cannot be evaluated so."""
        if info.modality != "image" or info.channels not in (1, 3):
            return f"{name} sees grey and RGB images, the dataset holds others"
        if self.task == "retrieval" and not info.captions:
            return f"task=retrieval of {name} needs captions and the dataset has none; use data with captions"
        if self.task == "zero-shot" and len(info.classes) < 2:
            return f"{name} names classes in prompts and the dataset has none; write task=retrieval"
        return None

    def groups(self, info: DatasetInfo) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class; nothing for a gallery, which the evaluated images bring."""
        return prompts.prompts(self.templates, info.classes) if self.task == "zero-shot" else ()


# --- trained for the dataset -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A tiny CLIP, trained on a dataset's captions, or on its classes' names where it has none; what is asked of it
    afterwards makes no other weights."""

    name: str
    texts: Texts
    epochs: int
    lr: float
    batch_size: int
    context: int
    words: int
    seed: int

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION, "open_clip": importlib.metadata.version("open_clip_torch")}

    def weights_recipe(self) -> Mapping[str, Any]:
        """The parameters that trained weights depend on."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "texts")}

    def misfit(self, info: DatasetInfo) -> str | None:
        misfit = self.texts.misfit(self.name, info)
        if misfit:
            return misfit
        if not info.trainable:
            return f"{self.name} has to be trained and there are no training images; use an open_clip model"
        return None

    def schedule(self, info: DatasetInfo) -> Schedule:
        shift = round(SHIFT * min(info.size) / 32)
        # A caption may say where something is; a class's name does not.
        flip = info.flip and not info.captions
        return Schedule(self.epochs, "adamw", self.lr, self.batch_size, DECAY, flip=flip, shift=shift, seed=self.seed)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        import torch

        from advplug.rng import Stream
        from advplug_clip import tiny

        with Stream(torch.initial_seed(), "weights").as_global(self.seed):
            tower: Any = "convolutional" if self.name == "clip-tiny" else "transformer"
            return tiny.scorer(tower, self.texts.groups(info), self.context, self.words)

    def fit(self, model: nn.Module, training: Training) -> Tuned:
        """Contrastive training of both towers."""
        from advplug_clip import contrastive
        from advplug_clip.scorer import ClipScorer

        assert isinstance(model, ClipScorer)
        return contrastive.fit(model, training)


def clip_tiny(
    task: Task = "zero-shot",
    templates: Templates = None,
    epochs: Epochs = 12,
    lr: Rate = 4e-4,
    batch_size: BatchSize = 32,
    context: Context = 20,
    words: Words = 1024,
    seed: Seed = 0,
) -> Tiny:
    """A CLIP of 0.7 million parameters with a convolutional image tower for 32 x 32 pixels."""
    prompts.check(templates)
    return Tiny("clip-tiny", Texts(task, templates), epochs, lr, batch_size, context, words, seed)


def clip_tiny_vit(
    task: Task = "zero-shot",
    templates: Templates = None,
    epochs: Epochs = 12,
    lr: Rate = RATE,
    batch_size: BatchSize = 64,
    context: Context = 20,
    words: Words = 1024,
    seed: Seed = 0,
) -> Tiny:
    """As clip-tiny, with a vision transformer, which so little data teaches much less."""
    prompts.check(templates)
    return Tiny("clip-tiny-vit", Texts(task, templates), epochs, lr, batch_size, context, words, seed)


# --- open_clip's -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenClip:
    """An architecture of open_clip with pretrained weights, those of a file, or random ones; used as it is."""

    architecture: str
    tag: str | None
    file: Path | None
    texts: Texts
    key: str | None
    strip: str
    like: str | None
    micro_batch: int
    checkpointing: bool
    bf16: bool

    def identity(self) -> Mapping[str, Any]:
        held = None if self.file is None else weights.sha256(weights.find(self.file))
        version = importlib.metadata.version("open_clip_torch")
        return {"revision": REVISION, "open_clip": version, "sha256": held}

    def misfit(self, info: DatasetInfo) -> str | None:
        return self.texts.misfit("open_clip", info)

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug_clip import pretrained
        from advplug_clip.scorer import Memory

        memory = Memory(self.micro_batch, self.checkpointing, self.bf16)
        groups = self.texts.groups(info)
        asked = pretrained.Asked(self.architecture, self.tag, self.file, self.key, self.strip, self.like)
        return pretrained.scorer(asked, groups, memory, offline)


def open_clip(
    model: Annotated[str, Param("ARCH@TAG, ARCH@random or ARCH@FILE, such as ViT-B-32@openai", positional=True)],
    task: Task = "zero-shot",
    templates: Templates = None,
    strip: Strip = "",
    key: Key = None,
    like: Annotated[
        str | None,
        Param("tag whose activation and preparation of pixels a file's weights were trained with", later=True),
    ] = None,
    micro_batch: Annotated[
        int, Param("images that pass the image tower at once where gradients are taken (0: all)", ge=0)
    ] = 0,
    checkpointing: Annotated[bool, Param("compute the tower's blocks again instead of keeping all")] = False,
    bf16: Annotated[bool, Param("gradients in bfloat16; decisions stay in float32")] = False,
) -> OpenClip:
    """A model of open_clip. A file is one that torch.save or safetensors wrote, with a slash or a dot in its name."""
    architecture, _, rest = model.partition("@")
    names.check_architecture(architecture)
    if not rest:
        choices = ", ".join((*names.tags(architecture), "random"))
        raise UsageError(f"'{model}' does not say which weights; write {architecture}@ and one of {choices}, or a file")
    prompts.check(templates)
    file = Path(rest).expanduser() if "/" in rest or "." in rest else None
    tag = None if rest == "random" or file else names.check_tag(architecture, rest)
    if file is None and (key or strip or like):
        raise UsageError("key=, strip= and like= are for weights from a file; leave them out")
    if like is not None:
        names.check_tag(architecture, like)
    if file is not None:
        weights.shapes(file, key, strip)  # a file that cannot be used is refused at once
    texts = Texts(task, templates)
    return OpenClip(architecture, tag, file, texts, key, strip, like, micro_batch, checkpointing, bf16)
