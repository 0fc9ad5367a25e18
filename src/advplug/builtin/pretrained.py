"""torchvision's ImageNet weights by tag: fetched once into torch's own cache, their head kept or replaced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advplug import weights
from advplug.builtin import nets
from advplug.builtin.architectures import Architecture
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.vision import import_torchvision

log = logging.getLogger("advplug")


def build(
    arch: Architecture, tag: str, info: DatasetInfo, columns: Sequence[int] | None, offline: bool
) -> nn.Sequential:
    """The pretrained network for a dataset, with the normalisation that its weights were trained with.

    `columns` are the dataset's classes among the 1000 logits; None asks for a fresh head. For other
    than 3 channels the first convolution is made from the old one. Raises UsageError where the weights
    are not at hand and cannot or may not be fetched.
    """
    models = import_torchvision().models
    chosen = models.get_model_weights(arch.name)[tag]
    fetch(chosen.url, f"torchvision:{arch.name}@{tag}", offline)
    options = {"aux_logits": False} if arch.name == "inception_v3" else {}
    net: nn.Module = models.get_model(arch.name, weights=chosen, progress=False, **options)
    transform = chosen.transforms()
    mean, std = tuple(transform.mean), tuple(transform.std)
    if columns is None:
        nets.replace_head(net, arch, len(info.classes))
    elif tuple(columns) != tuple(range(len(chosen.meta["categories"]))):
        nets.select_classes(net, arch, columns)
    if info.channels != 3:
        mean, std = _for_other_channels(net, arch, info.channels, mean, std)
    return nets.classifier(net, mean, std, _resize(arch, transform.crop_size[0], info))


def fetch(url: str, name: str, offline: bool) -> Path:
    """The cached file of `url`, downloaded (its hash checked) where it is missing and `offline` allows."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    by_hand = f"fetch them elsewhere with 'curl -L --create-dirs -o {path} {url}'"
    if not path.exists():
        if offline:
            raise UsageError(f"the weights of {name} are not at {path} and --offline forbids the download; {by_hand}")
        log.info("fetching %s to %s", url, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=known, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no space; RuntimeError: another hash
            why = " ".join(str(error).split())
            raise UsageError(f"the weights of {name} cannot be fetched to {path} ({why}); {by_hand}") from error
    weights.shapes(path)
    return path


def _for_other_channels(
    net: nn.Module, arch: Architecture, channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nets.replace_stem(net, arch, channels, keep=True)
    if getattr(net, "transform_input", False):
        # Inception turns ImageNet's normalisation, channel by channel, into the one it was trained with.
        holder: Any = net
        holder.transform_input = False
        return (0.5,), (0.5,)
    return (sum(mean) / len(mean),), (sum(std) / len(std),)


def _resize(arch: Architecture, side: int, info: DatasetInfo) -> tuple[int, int] | None:
    # Position embeddings and grids belong to one size; convolutional networks take any above their least.
    wanted = (side, side) if arch.patch or arch.grid else arch.input_size(info.size)
    if wanted == info.size:
        return None
    log.info("%s scales %d x %d images to %d x %d", arch.name, *info.size, *wanted)
    return wanted
