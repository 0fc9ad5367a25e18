"""Model sources: timm's, those on the Hugging Face hub, RobustBench's entries, ONNX files. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug import weights
from advplug.builtin import imagenet
from advplug.builtin.models import (
    TUNING_RATE,
    USER_RATE,
    BatchSize,
    Epochs,
    Key,
    Mean,
    Optimizer,
    Rate,
    Recipe,
    Seed,
    Std,
    Strip,
)
from advplug.contracts import DatasetInfo, Param, Schedule
from advplug.errors import UsageError
from advplug_hub import fetch, onnx_files, published, timm_models

if TYPE_CHECKING:
    from torch import nn

REVISION = 1
"""Part of every identity: raised when the same reference would give another network."""
CONFIG, WEIGHTS = ("config.json",), ("model.safetensors", "pytorch_model.bin")
"""What a repository in timm's format holds; of weights the better file first."""
CIFAR = (10, 3, (32, 32))


def _no_images(info: DatasetInfo, what: str) -> str | None:
    return f"{what} classifies images, the dataset holds {info.modality} data" if info.modality != "image" else None


def _untrainable(info: DatasetInfo, what: str) -> str | None:
    if info.trainable:
        return None
    return f"{what} has to be trained and there are no training images; add some, or use a model with fitting weights"


def _known(info: DatasetInfo, channels: int = 3) -> tuple[int, ...] | None:
    """The dataset's classes among ImageNet's."""
    return imagenet.columns(info.classes) if info.channels == channels else None


# --- timm ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timm:
    """A classifier of timm: trained for the dataset, with weights of a tag, or with those of a file as they are.

    The head of a tag's weights is kept for ImageNet's classes, else replaced, and everything fine-tuned.
    """

    name: str
    tag: str | None
    file: Path | None
    key: str | None
    strip: str
    recipe: Recipe

    def identity(self) -> Mapping[str, Any]:
        held = None if self.file is None else weights.sha256(weights.find(self.file))
        return {"revision": REVISION, "timm": importlib.metadata.version("timm"), "sha256": held}

    def columns(self, info: DatasetInfo) -> tuple[int, ...] | None:
        """The dataset's classes among the logits of the tag's weights; None where the model has to learn them."""
        return _known(info) if self.tag is not None and timm_models.answers_imagenet(self.tag) else None

    def misfit(self, info: DatasetInfo) -> str | None:
        what = f"timm:{self.name}"
        if self.file is None:
            return _no_images(info, what) or (None if self.columns(info) else _untrainable(info, what))
        heads = {s[0] for s in weights.shapes(self.file, self.key, self.strip).values() if len(s) in (2, 4)}
        if len(info.classes) not in heads:
            return f"{self.file.name} has no layer of {len(info.classes)} outputs, one a class; use a dataset that fits"
        return _no_images(info, what)

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        if self.file is not None or self.columns(info) is not None:
            return None
        return self.recipe.schedule(info, USER_RATE if self.tag is None else TUNING_RATE)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        import torch

        from advplug.rng import Stream
        from advplug_hub import timm_build

        with Stream(torch.initial_seed(), "weights").as_global(self.recipe.seed):
            if self.tag is not None:
                return timm_build.pretrained(self.name, self.tag, info, self.columns(info), offline)
            return timm_build.plain(self.name, info, self.file, self.key, self.strip)


def timm(
    model: Annotated[str, Param("NAME or NAME@TAG, such as resnet18@a1_in1k; without weights it is trained",
                                positional=True)],
    weights: Annotated[Path | None, Param("its checkpoint, used as it is (none: by tag, or trained)")] = None,
    key: Key = None,
    strip: Strip = "",
    epochs: Epochs = 5,
    optimizer: Optimizer = "adamw",
    lr: Rate = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> Timm:  # fmt: skip
    """A classifier of timm. Raises UsageError for an unknown name and a file that cannot be used."""
    name, at, tag = model.partition("@")
    timm_models.check_architecture(name)
    if at and not tag:
        raise UsageError(f"'{model}' names no tag; write {name}@ and one, or leave out the @")
    if weights is not None and at:
        raise UsageError(f"weights come from a tag or from a file; write timm:{name}#weights={weights}")
    _demand_file(weights, key, strip)
    return Timm(name, tag or None, weights, key, strip, Recipe(epochs, optimizer, lr, batch_size, seed))


def _demand_file(file: Path | None, key: str | None, strip: str) -> None:
    if file is None and (key or strip):
        raise UsageError("key= and strip= are for weights from a file; leave them out")
    if file is not None:
        weights.shapes(file, key, strip)


# --- the Hugging Face hub ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """A repository in timm's format at one revision, used as it is."""

    repository: str
    revision: str

    @property
    def name(self) -> str:
        return f"hf:{self.repository}@{self.revision}"

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION, "timm": importlib.metadata.version("timm")}

    def config(self, offline: bool) -> tuple[Path, dict[str, Any]]:
        """The repository's description and its file. Raises UsageError where it is not at hand or none of timm's."""
        path = fetch.from_hub(self.repository, CONFIG, self.revision, self.name, offline)
        return path, _described(path, self.name)

    def misfit(self, info: DatasetInfo) -> str | None:
        path = fetch.held(self.repository, CONFIG, self.revision)
        if path is None:  # nothing is fetched for a plan; the build says what does not fit
            return _no_images(info, self.name)
        return _no_images(info, self.name) or misfit_of(_described(path, self.name), self.name, info)

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug_hub import timm_build

        _, config = self.config(offline)
        misfit = misfit_of(config, self.name, info)
        if misfit is not None:
            raise UsageError(misfit)
        file = fetch.from_hub(self.repository, WEIGHTS, self.revision, self.name, offline)
        return timm_build.described(config, file, self.name, info, columns_of(config, info))


def _described(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        settings = {**config, **config.get("pretrained_cfg", {})}
        if not isinstance(config["architecture"], str) or int(settings["num_classes"]) < 1:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} does not describe a classifier of timm, so {name} cannot be built; use a repository "
                         "in timm's format, or the py: model with your own code") from error  # fmt: skip
    timm_models.check_architecture(config["architecture"])
    return {**settings, "architecture": config["architecture"], "model_args": config.get("model_args") or {}}


def columns_of(config: Mapping[str, Any], info: DatasetInfo) -> tuple[int, ...] | None:
    """Which logits are the dataset's classes, in their order: all, or those that ImageNet's names find."""
    known = _known(info) if int(config["num_classes"]) == 1000 else None
    if known is not None:
        return known
    return tuple(range(len(info.classes))) if int(config["num_classes"]) == len(info.classes) else None


def misfit_of(config: Mapping[str, Any], name: str, info: DatasetInfo) -> str | None:
    """Why a described model cannot take that dataset."""
    channels = int((config.get("input_size") or (3,))[0])
    if channels != info.channels:
        return f"{name} takes images of {channels} channels, the dataset's have {info.channels}; use data that fits"
    if columns_of(config, info) is None:
        return f"{name} tells {config['num_classes']} classes apart, the dataset has {len(info.classes)} others"
    return None


def hf(
    model: Annotated[str, Param("ORG/REPO@REVISION: a branch, a tag, or better a commit", positional=True)],
) -> Hub:
    """A classifier that was pushed to the hub by timm. Raises UsageError for a name without a revision."""
    repository, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository):
        raise UsageError(f"'{model}' is no repository of the hub; write hf:ORG/REPO@REVISION")
    if not re.fullmatch(r"[\w.\-/]+", revision) or ".." in revision:
        raise UsageError(f"'{model}' does not say which revision; write hf:{repository}@ and a commit, or main")
    return Hub(repository, revision)


# --- RobustBench -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobustBench:
    """An entry of a leaderboard, used as it is."""

    entry: published.Entry
    file: Path | None
    url: str | None
    sha256: str | None

    def identity(self) -> Mapping[str, Any]:
        held = None if self.file is None else weights.sha256(weights.find(self.file))
        return {"revision": REVISION, "entry": f"{self.entry.name} {self.entry.norm}", "sha256": held}

    def misfit(self, info: DatasetInfo) -> str | None:
        if (len(info.classes), info.channels, info.size) != CIFAR:
            return f"{self.entry.name} is a model of CIFAR-10: 10 classes, RGB images of 32 x 32 px; use cifar10"
        return _no_images(info, self.entry.name)

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug_hub import robustbench

        return robustbench.build(self.entry, self.file, self.url, self.sha256, offline)


def robustbench(
    name: Annotated[str, Param("the entry, such as Carmon2019Unlabeled", positional=True)],
    norm: Annotated[Literal["linf", "l2"], Param("the leaderboard")] = "linf",
    weights: Annotated[Path | None, Param("the published file, where it is at hand (none: fetched)")] = None,
    url: Annotated[str | None, Param("another address of that file")] = None,
    sha256: Annotated[str | None, Param("what the file must be (none: as the lock file recorded it)")] = None,
) -> RobustBench:
    """An entry of RobustBench's CIFAR-10 leaderboards. Raises UsageError for one that is not in the table."""
    if weights is not None and url is not None:
        raise UsageError("weights= and url= say twice where the file comes from; leave one out")
    found = published.entry(name, norm)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"'{sha256}' is no SHA-256; write its 64 hexadecimal digits")
    if weights is not None:
        _readable(weights)
    return RobustBench(found, weights, url, sha256 and sha256.lower())


def _readable(file: Path) -> None:
    weights.find(file)


# --- ONNX ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Onnx:
    """A classifier in an ONNX file; pixels reach it as (x - mean) / std."""

    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def identity(self) -> Mapping[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnx2torch")}
        return {"revision": REVISION, "sha256": onnx_files.digest(self.path), **versions}

    def misfit(self, info: DatasetInfo) -> str | None:
        return _no_images(info, self.path.name) or onnx_files.misfit(self.path, info, (self.mean, self.std))

    def schedule(self, info: DatasetInfo) -> None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        from advplug_hub import onnx_build

        return onnx_build.build(self.path, info, self.mean, self.std)


def onnx(
    path: Annotated[Path, Param("an .onnx file with one input, images, and logits for its first output",
                                positional=True)],
    mean: Mean = (0.0,),
    std: Std = (1.0,),
) -> Onnx:  # fmt: skip
    """A classifier in an ONNX file. Raises UsageError for a file that is none."""
    onnx_files.shapes(path)
    return Onnx(path, mean, std)
