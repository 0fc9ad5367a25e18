"""The built-in models: trained for a dataset, pretrained by tag, from a file, or from the user's own code."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug import weights
from advplug.builtin import imagenet, usercode
from advplug.builtin.architectures import CUSTOM, TORCHVISION, Architecture, architecture, tags
from advplug.contracts import DatasetInfo, ModelCaps, Param, Schedule, Spec
from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

REVISION = 1
"""Part of every identity: raised when the same reference would give another network or training."""

MEAN, STD = 0.5, 0.25
"""Normalisation of networks that are trained here: about zero mean and unit spread on photographs and digits."""

TUNING_RATE = 3e-4
"""AdamW's rate for pretrained weights."""
USER_RATE = 1e-3
"""AdamW's rate for a network that is not known."""
SGD_FACTOR = 25
"""Nesterov SGD takes steps of about the same size at this multiple of AdamW's rate."""

Epochs = Annotated[int, Param("passes over the training images", ge=1)]
Optimizer = Annotated[Literal["adamw", "sgd"], Param("how the weights are updated")]
Rate = Annotated[float | None, Param("highest learning rate of the one cycle (none: by optimizer and network)", gt=0)]
BatchSize = Annotated[int, Param("images a training step", ge=2)]
Seed = Annotated[int, Param("another number, another network: initial weights, order of images", ge=0)]
Mean = Annotated[tuple[float, ...], Param("subtracted inside the model, a number or one a channel: 0.485:0.456:0.406")]
Std = Annotated[tuple[float, ...], Param("divided by inside the model, a number or one a channel", gt=0)]
Strip = Annotated[str, Param("taken off the front of the tensors' names, such as module.")]
Key = Annotated[str | None, Param("entry of the checkpoint that holds the tensors, such as state_dict")]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, as the user asked for it."""

    epochs: int
    optimizer: Literal["adamw", "sgd"]
    lr: float | None
    batch_size: int
    seed: int

    def schedule(self, info: DatasetInfo, rate: float) -> Schedule:
        """`rate` is AdamW's, unless the user gave one. Where a mirrored image keeps its class, images are
        mirrored and moved by up to 1/8 of their size; elsewhere only moved, by up to 1/16."""
        shift = min(info.size) // (8 if info.flip else 16)
        if self.optimizer == "sgd":
            rate *= SGD_FACTOR
        rate = rate if self.lr is None else self.lr
        return Schedule(self.epochs, self.optimizer, rate, self.batch_size, flip=info.flip, shift=shift, seed=self.seed)


def _seeded(seed: int) -> Any:
    """A context in which weights are drawn from the global generator, or for seed > 0 from one derived from it."""
    import torch

    from advplug.rng import Stream

    return Stream(torch.initial_seed(), "weights").as_global(seed)


def _untrainable(info: DatasetInfo, what: str) -> str | None:
    if info.modality != "image":
        return f"{what} classifies images, the dataset holds {info.modality} data"
    if not info.trainable:
        return f"{what} has to be trained and there are no training images; add some, or use a model with weights"
    return None


def _misfit_norm(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> str | None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            return (
                f"{name} has {len(values)} numbers for {channels} channel{'s' * (channels > 1)}; give one or {channels}"
            )
    return None


# --- trained for the dataset -----------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """An architecture that takes a dataset's channels, size and classes, and is trained on it."""

    arch: Architecture
    recipe: Recipe

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION}

    def misfit(self, info: DatasetInfo) -> str | None:
        return _untrainable(info, self.arch.name)

    def schedule(self, info: DatasetInfo) -> Schedule:
        return self.recipe.schedule(info, self.arch.rate)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug.builtin import nets

        size = self.arch.input_size(info.size)
        with _seeded(self.recipe.seed):
            net = nets.bare(self.arch, info.channels, size, len(info.classes))
        return nets.classifier(net, (MEAN,), (STD,), None if size == info.size else size)


def _factory(name: str) -> Callable[..., Trained]:
    def make(
        epochs: Epochs = 5,
        optimizer: Optimizer = "adamw",
        lr: Rate = None,
        batch_size: BatchSize = 64,
        seed: Seed = 0,
    ) -> Trained:
        return Trained(architecture(name), Recipe(epochs, optimizer, lr, batch_size, seed))

    make.__doc__ = f"{name}, built for a dataset and trained on it."
    return make


by_name = SimpleNamespace(**{n.replace("-", "_"): _factory(n) for n in (*CUSTOM, *TORCHVISION)})
"""A factory for each architecture."""


# --- pretrained on ImageNet ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """torchvision's weights; the head is kept for ImageNet's classes, else replaced and everything fine-tuned."""

    arch: Architecture
    tag: str
    recipe: Recipe

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION, "torchvision": importlib.metadata.version("torchvision")}

    def columns(self, info: DatasetInfo) -> tuple[int, ...] | None:
        """The dataset's classes among the pretrained logits; None where the model has to learn them."""
        return imagenet.columns(info.classes) if info.channels == 3 else None

    def misfit(self, info: DatasetInfo) -> str | None:
        kept = info.modality == "image" and self.columns(info) is not None
        return None if kept else _untrainable(info, f"{self.arch.name}@{self.tag} with a new head")

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        if self.columns(info) is not None:
            return None
        return self.recipe.schedule(info, TUNING_RATE)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug.builtin import pretrained

        with _seeded(self.recipe.seed):
            return pretrained.build(self.arch, self.tag, info, self.columns(info), offline)


def torchvision(
    name: Annotated[
        str, Param("NAME@TAG, such as resnet50@DEFAULT; without a tag it is only trained", positional=True)
    ],
    epochs: Epochs = 5,
    optimizer: Optimizer = "adamw",
    lr: Rate = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> Trained | Pretrained:
    """A torchvision classifier with ImageNet weights; training serves where the head has to be replaced."""
    model, at, tag = name.partition("@")
    if model not in TORCHVISION:
        hint = did_you_mean(model, TORCHVISION) or "; write a name such as resnet50@DEFAULT"
        raise UsageError(f"torchvision has no classifier called '{model}'{hint}")
    recipe = Recipe(epochs, optimizer, lr, batch_size, seed)
    if not at:
        return Trained(architecture(model), recipe)
    if tag not in tags(model):
        raise UsageError(f"{model} has no weights tagged '{tag}'; write {model}@{' or @'.join(tags(model))}")
    return Pretrained(architecture(model), tag, recipe)


# --- from a file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Weights from a file, used as they are; classes, channels and input size follow from their shapes."""

    path: Path
    arch: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    strip: str
    key: str | None

    @functools.cached_property
    def shapes(self) -> dict[str, weights.Shape]:
        found = weights.shapes(self.path, self.key, self.strip)
        wanted = [f"{layer}.weight" for layer in (self.arch.stem, self.arch.head)]
        absent = [n for n in wanted if n not in found]
        if absent:
            hint = weights.strip_hint(found, wanted)
            raise UsageError(f"{self.path} has no tensor {absent[0]}, which arch={self.arch.name} needs{hint}")
        return found

    @property
    def classes(self) -> int:
        return self.shapes[f"{self.arch.head}.weight"][0]

    @property
    def channels(self) -> int:
        return self.shapes[f"{self.arch.stem}.weight"][1]

    def size(self, info: DatasetInfo) -> tuple[int, int]:
        """The input size of the network: that of its position embeddings, or what suits the dataset."""
        positions = self.shapes.get("encoder.pos_embedding")
        if not self.arch.patch or positions is None:
            return self.arch.input_size(info.size)
        side = round((positions[1] - 1) ** 0.5) * self.arch.patch
        return side, side

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION, "sha256": weights.sha256(weights.find(self.path))}

    def misfit(self, info: DatasetInfo) -> str | None:
        name, free = self.path.name, f"use a dataset that fits, or {self.arch.name}, which is trained for any"
        if info.modality != "image":
            return f"{name} classifies images, the dataset holds {info.modality} data"
        if self.classes != len(info.classes):
            return f"{name} tells {self.classes} classes apart, the dataset has {len(info.classes)}; {free}"
        if self.channels != info.channels:
            kinds = {1: "grayscale", 3: "RGB"}
            have, want = (kinds.get(n, f"{n}-channel") for n in (self.channels, info.channels))
            return f"{name} takes {have} images, the dataset's are {want}; {free}"
        if self.size(info) != self.arch.input_size(info.size):
            return f"{name} takes {self.size(info)[0]} px images, the dataset's have {max(info.size)} px; {free}"
        flat = self.arch.flat_features(info.size)
        if flat is not None and self.shapes.get(f"{flat[0]}.weight", (0, flat[1]))[1] != flat[1]:
            return f"{name} was made for another image size than {info.size[0]} x {info.size[1]} px; {free}"
        return _misfit_norm(self.mean, self.std, info.channels)

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug.builtin import nets

        state = weights.load(self.path, self.key, self.strip)
        size = self.size(info)
        with _seeded(0):
            net = nets.bare(self.arch, self.channels, size, self.classes)
        # Heads that only training uses; the networks are built without them.
        auxiliary = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}.get(self.arch.name, ())
        weights.fill(net, state, self.path, ignore=auxiliary)
        return nets.classifier(net, self.mean, self.std, None if size == info.size else size)


def file(
    path: Annotated[Path, Param("a .safetensors file, or one that torch.save wrote", positional=True)],
    arch: Annotated[str, Param("the architecture: a name that 'advplug list models' shows")],
    mean: Mean = (0.0,),
    std: Std = (1.0,),
    strip: Strip = "",
    key: Key = None,
) -> Checkpoint:
    """A checkpoint of a known architecture; pixels reach it as (x - mean) / std."""
    made = Checkpoint(path, architecture(arch), mean, std, strip, key)
    _ = made.shapes  # a file that cannot be used is refused at once
    return made


# --- the user's own code ---------------------------------------------------------------------------


@dataclass(frozen=True)
class UserCode:
    """A module of the user's own; with weights it is used as it is, without them it is trained."""

    source: str
    weights: Path | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    strip: str
    key: str | None
    recipe: Recipe

    def identity(self) -> Mapping[str, Any]:
        code = usercode.source_digest(self.source.partition(":")[0])
        held = None if self.weights is None else weights.sha256(weights.find(self.weights))
        return {"revision": REVISION, "code": code, "sha256": held}

    def misfit(self, info: DatasetInfo) -> str | None:
        untrained = _untrainable(info, f"py:{self.source} without weights=") if self.weights is None else None
        return untrained or _misfit_norm(self.mean, self.std, info.channels)

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return None if self.weights is not None else self.recipe.schedule(info, USER_RATE)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug.builtin import nets

        with _seeded(self.recipe.seed):
            net = usercode.build(self.source, info)
        if self.weights is not None:
            weights.fill(net, weights.load(self.weights, self.key, self.strip), self.weights)
        model = nets.classifier(net, self.mean, self.std)
        usercode.probe(model, info, self.source)
        return model


def py(
    source: Annotated[str, Param("MODULE:FACTORY, which is imported and called: your own code", positional=True)],
    weights: Annotated[Path | None, Param("its checkpoint (none: it is trained on the dataset)")] = None,
    mean: Mean = (0.0,),
    std: Std = (1.0,),
    strip: Strip = "",
    key: Key = None,
    epochs: Epochs = 5,
    optimizer: Optimizer = "adamw",
    lr: Rate = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> UserCode:
    """An nn.Module from your own code; the factory gets classes, channels and size if it takes them."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source):
        raise UsageError(f"'{source}' is no MODULE:FACTORY; write py:mymodels:make_net for make_net in mymodels.py")
    recipe = Recipe(epochs, optimizer, lr, batch_size, seed)
    made = UserCode(source, weights, mean, std, strip, key, recipe)
    made.identity()  # code or weights that are not there are refused at once
    if weights is not None:
        _check_shapes(weights, key, strip)
    return made


def _check_shapes(path: Path, key: str | None, strip: str) -> None:
    weights.shapes(path, key, strip)


# --- registered ------------------------------------------------------------------------------------

_PAPERS = {
    "alexnet": "Krizhevsky et al. 2012", "cnn-a": "LeCun et al. 1998", "convnext": "Liu et al. 2022",
    "densenet": "Huang et al. 2017", "efficientnet": "Tan and Le 2019", "efficientnet_v2": "Tan and Le 2021",
    "googlenet": "Szegedy et al. 2015", "inception": "Szegedy et al. 2016", "maxvit": "Tu et al. 2022",
    "mnasnet": "Tan et al. 2019", "mobilenet_v2": "Sandler et al. 2018", "mobilenet_v3": "Howard et al. 2019",
    "regnet": "Radosavovic et al. 2020", "resnet": "He et al. 2016", "resnext": "Xie et al. 2017",
    "shufflenet": "Ma et al. 2018", "squeezenet": "Iandola et al. 2016", "swin": "Liu et al. 2021",
    "swin_v2": "Liu et al. 2022", "vgg": "Simonyan and Zisserman 2015", "vit": "Dosovitskiy et al. 2021",
    "wide_resnet": "Zagoruyko and Komodakis 2016",
}  # fmt: skip


def _paper(name: str) -> str:
    return _PAPERS.get(max((p for p in _PAPERS if name.startswith(p)), key=len, default=""), "")


def _spec(name: str) -> Spec:
    summary = CUSTOM.get(name, "torchvision's architecture, built for the dataset and trained on it")
    target = f"{__name__}:by_name.{name.replace('-', '_')}"
    return Spec(name, target, ModelCaps(), summary, _paper(name))


MODELS: list[Spec] = [
    *(_spec(name) for name in (*CUSTOM, *TORCHVISION)),
    Spec(
        "torchvision", f"{__name__}:torchvision", ModelCaps(), "torchvision classifier with ImageNet weights: NAME@TAG"
    ),
    Spec(
        "finetuned",
        "advplug.builtin.finetuned:finetuned",
        ModelCaps(),
        "trained on one dataset, then fine-tuned on the evaluated one with a new last layer",
        "Yosinski et al. 2014, arXiv 1411.1792",
    ),
    Spec("file", f"{__name__}:file", ModelCaps(), "weights from a file, for a named architecture: PATH#arch=NAME"),
    Spec("py", f"{__name__}:py", ModelCaps(), "your own code, with or without weights: MODULE:FACTORY#weights=FILE"),
]
