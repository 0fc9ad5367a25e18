"""timm's networks built, filled from checked files, behind their input processing."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advplug import weights
from advplug.builtin import nets
from advplug.builtin.models import MEAN, STD
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.vision import import_torchvision
from advplug_hub import fetch, lock

log = logging.getLogger("advplug")

SMALLEST = 32
"""Smaller images are scaled up: most of timm's networks halve them five times."""
FILES = ("model.safetensors", "pytorch_model.bin")


class Selected(nn.Module):
    """Some logits of a network, in another order."""

    columns: Tensor

    def __init__(self, net: nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits[:, self.columns]


def plain(name: str, info: DatasetInfo, file: Path | None, key: str | None, strip: str) -> nn.Module:
    """The network for a dataset, with fresh weights from the global generator or those of `file`.

    Fresh weights get the normalisation that networks are trained with here, a file's that of timm's own weights.
    Raises UsageError where timm cannot build it so, and where the file does not fit.
    """
    net = _created(name, num_classes=len(info.classes), in_chans=info.channels)
    settings = net.pretrained_cfg
    if file is None:
        return _behind_input(net, info, settings, (MEAN,), (STD,))
    weights.fill(net, weights.load(file, key, strip), file)
    return _behind_input(net, info, settings, *_statistics(settings, info.channels))


def pretrained(
    name: str, tag: str, info: DatasetInfo, columns: Sequence[int] | None, offline: bool
) -> nn.Module:  # fmt: skip
    """The network with a tag's weights; `columns` are the dataset's classes among its logits, None asks for a new head.

    Raises UsageError for an unknown tag, and where the weights are not at hand and cannot or may not be fetched.
    """
    import_torchvision()
    from timm.models import get_pretrained_cfg, list_pretrained

    with _quiet():
        tags = [n.partition(".")[2] for n in list_pretrained(f"{name}.*")]
        settings = get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=True) if tag in tags else None
    if settings is None:
        choices = f"write {name}@{' or @'.join(tags)}" if tags else f"write timm:{name} to train it"
        raise UsageError(f"timm has no weights of {name} tagged '{tag}'; {choices}")
    config = settings.to_dict()
    if columns is not None and config.get("num_classes") != 1000:
        raise UsageError(f"timm:{name}@{tag} does not answer with ImageNet's classes; use a tag that ends in in1k")
    path = _file_of(f"{name}.{tag}", config, offline)
    classes = 1000 if columns is not None else len(info.classes)
    return _filled(name, path, config, info, classes, columns)


def described(
    config: Mapping[str, Any], file: Path, name: str, info: DatasetInfo, columns: Sequence[int] | None
) -> nn.Module:  # fmt: skip
    """The network of a repository's description with its weights, its logits in the order of the dataset's classes."""
    import_torchvision()
    from timm.models import PretrainedCfg

    # What authors add (names of labels, their own notes) and what timm keeps beside the configuration stays outside.
    plan = {k: v for k, v in config.items() if k in {f.name for f in dataclasses.fields(PretrainedCfg)}}
    classes = int(config["num_classes"])
    model = _filled(config["architecture"], file, plan, info, classes, columns, **config["model_args"])
    log.info("%s is %s", name, file)
    return model


def _filled(
    name: str,
    file: Path,
    config: Mapping[str, Any],
    info: DatasetInfo,
    classes: int,
    columns: Sequence[int] | None,
    **arguments: Any,
) -> nn.Module:
    """timm reads the file itself, since some need its conversion; `weights` has looked into it before."""
    if file.suffix != ".npz":
        weights.shapes(file)
    settings = {k: v for k, v in config.items() if k not in ("url", "hf_hub_id", "hf_hub_filename", "source")}
    settings |= {"file": str(file), "num_classes": int(config.get("num_classes", classes))}
    overlay = {"pretrained": True, "pretrained_cfg": settings, "num_classes": classes, "in_chans": info.channels}
    net = _created(name, **overlay, **arguments)
    mean, std = _statistics(settings, info.channels)
    chosen = net if columns is None or tuple(columns) == tuple(range(classes)) else Selected(net, columns)
    return _behind_input(chosen, info, settings, mean, std)


def _file_of(name: str, config: Mapping[str, Any], offline: bool) -> Path:
    """The file of timm's weights: from the hub, or from the address that some have instead."""
    shown = f"timm:{name.replace('.', '@', 1)}"
    if config.get("hf_hub_id"):
        named = config.get("hf_hub_filename")
        return fetch.from_hub(config["hf_hub_id"], (named,) if named else FILES, None, shown, offline)
    if config.get("url"):
        address = str(config["url"])
        return fetch.from_address(address, lock.folder() / "timm" / address.rpartition("/")[2], shown, offline)
    raise UsageError(f"timm does not say where the weights of {shown} are; write timm:NAME#weights=FILE")


def _created(name: str, **arguments: Any) -> Any:
    import_torchvision()
    import timm

    with _quiet():
        try:
            return timm.create_model(name, **arguments)
        except UsageError:
            raise
        except Exception as error:  # its networks raise what they like for shapes they cannot have
            why = " ".join(str(error).split())
            why = why if len(why) < 200 else f"{why[:200]}..."
            held = arguments.get("pretrained_cfg", {}).get("file")
            what = f"{held} does not fit timm:{name}" if held else f"timm:{name} cannot be built for these images"
            raise UsageError(f"{what} ({why}); use another model or file") from error


def _statistics(config: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalisation of timm's weights; for other than their channels, its mean."""
    mean, std = (tuple(float(v) for v in config.get(name) or (default,))
                 for name, default in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
    if len(mean) in (1, channels):
        return mean, std
    return (sum(mean) / len(mean),), (sum(std) / len(std),)


def _behind_input(
    net: nn.Module, info: DatasetInfo, config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    own = tuple(config.get("input_size") or ())[1:]
    if config.get("fixed_input_size") and own:
        wanted = (int(own[0]), int(own[1]))
    else:
        least = max(SMALLEST, *(tuple(config.get("min_input_size") or ())[1:] or (SMALLEST,)))
        scale = max(1.0, least / min(info.size))
        wanted = (math.ceil(info.size[0] * scale), math.ceil(info.size[1] * scale))
    return nets.classifier(net, mean, std, None if wanted == info.size else wanted)


@contextmanager
def _quiet() -> Iterator[None]:
    """timm tells of every file it reads, through the root logger's handlers."""
    loggers = [logging.getLogger(name) for name in ("timm.models._builder", "timm.models._helpers", "timm.models._hub")]
    before = [found.level for found in loggers]
    try:
        for found in loggers:
            found.setLevel(logging.ERROR)
        yield
    finally:
        for found, level in zip(loggers, before, strict=True):
            found.setLevel(level)
