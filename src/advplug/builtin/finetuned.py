"""A network that is trained on one dataset and then, with a new last layer, on the one that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from advplug.builtin.architectures import Architecture
from advplug.builtin.models import REVISION, TUNING_RATE, BatchSize, Epochs, Optimizer, Rate, Recipe, Seed, Trained
from advplug.contracts import DatasetInfo, Param, Schedule, Stack
from advplug.errors import UsageError
from advplug.plans import Bound, VictimPlan, bind
from advplug.registry import registry
from advplug.training import launch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Finetuned:
    """`backbone` is trained on `source` as its own parameters say; then everything is tuned as `recipe` says.

    The first training is that of the backbone on its dataset in any other cell, under seed 0: it is made once.
    """

    backbone: Bound
    source: Bound
    recipe: Recipe

    @property
    def _trained(self) -> Trained:
        made: Trained = self.backbone.value
        return made

    @property
    def _arch(self) -> Architecture:
        return self._trained.arch

    def identity(self) -> Mapping[str, Any]:
        return {"revision": REVISION, "origin": launch.without(self.origin().recipe)}

    def misfit(self, info: DatasetInfo) -> str | None:
        first: DatasetInfo = self.source.value.info()
        what = f"finetuned {self._arch.name}"
        unfit = self._trained.misfit(first)
        if unfit is not None:
            return f"{self.source.label}: {unfit}"
        return self._trained.misfit(info) or _mismatch(self._arch, what, first, info)

    def schedule(self, info: DatasetInfo) -> Schedule:
        return self.recipe.schedule(info, TUNING_RATE)

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        """The network with the weights that its last layer begins with; `adopt` brings the others."""
        return Trained(self._arch, self.recipe).build(info, offline)

    def origin(self) -> VictimPlan:
        return VictimPlan(self.source, self.backbone, (), 0)

    def adopt(self, fresh: nn.Module, trained: nn.Module) -> nn.Module:
        head = f"net.{self._arch.head}."
        kept = {name: value for name, value in trained.state_dict().items() if not name.startswith(head)}
        fresh.load_state_dict({**fresh.state_dict(), **kept})
        return fresh


def _mismatch(arch: Architecture, what: str, first: DatasetInfo, info: DatasetInfo) -> str | None:
    if first.channels != info.channels:
        return (
            f"{what} is trained on images of {first.channels} channels first, the dataset's have {info.channels}; "
            "use a source like the dataset"
        )
    sizes = [arch.input_size(size) for size in (first.size, info.size)]
    tied = arch.patch or arch.grid or arch.flat_features(info.size)
    if tied and sizes[0] != sizes[1]:
        shapes = " and ".join(f"{height} x {width}" for height, width in sizes)
        return f"{what} has weights for one image size, source and dataset have {shapes} px; use images of one size"
    return None


def finetuned(
    backbone: Annotated[
        Stack, Param("network and how it is trained first, in parentheses: (resnet18:epochs=8)", positional=True)
    ],
    source: Annotated[Stack, Param("the dataset that it is trained on first, in parentheses: (npz:FILE)")],
    epochs: Epochs = 5,
    optimizer: Optimizer = "adamw",
    lr: Rate = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> Finetuned:
    """Its last layer is replaced and everything fine-tuned; the first training is shared by all that begin with it."""
    network, data = _one("backbone", backbone, "model"), _one("source", source, "dataset")
    if not isinstance(network.value, Trained):
        raise UsageError(
            f"finetuned: '{network.label}' is no network that is trained here; write one like resnet18 or cnn, and for "
            "ImageNet's weights torchvision:NAME@TAG, which is fine-tuned by itself"
        )
    return Finetuned(network, data, Recipe(epochs, optimizer, lr, batch_size, seed))


def _one(name: str, stack: Stack, kind: str) -> Bound:
    if len(stack) != 1:
        raise UsageError(f"finetuned: {name} takes one {kind}, got '{stack}'")
    return bind(registry(), kind, stack.parts[0])
