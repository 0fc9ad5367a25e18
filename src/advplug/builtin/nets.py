"""The built-in networks, torchvision's architectures for any dataset, and input processing inside the model."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.builtin.architectures import CUSTOM, Architecture
from advplug.vision import import_torchvision


class Normalised(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] to (x - mean) / std by channel; one number serves all channels.

    Mean and std are part of the code, not of the weights, so that a checkpoint's keys stay its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Resized(nn.Module):
    """Images scaled bilinearly to `size` (height, width), for networks that cannot take them as they are."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, self.size, mode="bilinear", align_corners=False)


def classifier(
    net: nn.Module,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    resize: tuple[int, int] | None = None,
) -> nn.Sequential:
    """`net` behind its input processing: children `resize` and `normalise` (where needed), then `net`."""
    parts: list[tuple[str, nn.Module]] = []
    if resize is not None:
        parts.append(("resize", Resized(resize)))
    if any(m != 0 for m in mean) or any(s != 1 for s in std):
        parts.append(("normalise", Normalised(mean, std)))
    return nn.Sequential(OrderedDict([*parts, ("net", net)]))


def bare(arch: Architecture, channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """The architecture with fresh weights, for images (channels, *size) that it can take as they are."""
    if arch.name in CUSTOM:
        makers = {"cnn": _cnn, "cnn-a": _cnn_a, "cnn-b": _cnn_b}
        return makers[arch.name](channels, size, classes)
    options: dict[str, Any] = {}
    if arch.patch:
        options["image_size"] = size[0]
    if arch.grid:
        options["input_size"] = size
    if arch.name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple; torchvision warns unless the (slow) initialisation is chosen.
        options |= {"aux_logits": False, "init_weights": True}
    net: nn.Module = import_torchvision().models.get_model(arch.name, weights=None, num_classes=classes, **options)
    if channels != 3:
        replace_stem(net, arch, channels, keep=False)
    return net


def replace_stem(net: nn.Module, arch: Architecture, channels: int, keep: bool) -> None:
    """Gives `net` a first convolution for another channel count.

    With `keep`, each new filter is the mean of the old over its channels, scaled so that a grey image in
    all channels gives the old response; otherwise weights are drawn with the spread of the old ones.
    """
    old = net.get_submodule(arch.stem)
    assert isinstance(old, nn.Conv2d)
    assert not isinstance(old.padding, str)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        if keep:
            new.weight.copy_(old.weight.sum(1, keepdim=True).expand_as(new.weight) / channels)
        else:
            nn.init.normal_(new.weight, std=old.weight.std().item())
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    _put(net, arch.stem, new)


def replace_head(net: nn.Module, arch: Architecture, classes: int) -> None:
    """Gives `net` a fresh last layer with `classes` outputs."""
    old = net.get_submodule(arch.head)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, 1)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, classes)
        nn.init.normal_(new.weight, std=1 / math.sqrt(old.in_features))
        nn.init.zeros_(new.bias)
    _put(net, arch.head, new)


def select_classes(net: nn.Module, arch: Architecture, columns: Sequence[int]) -> None:
    """Keeps the logits `columns` of `net`, in that order."""
    head = net.get_submodule(arch.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.bias is not None
    rows = torch.tensor(columns)
    head.weight = nn.Parameter(head.weight.detach()[rows].clone())
    head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    if isinstance(head, nn.Linear):
        head.out_features = len(columns)
    else:
        head.out_channels = len(columns)


def _put(net: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, new)


def _cnn(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    features, pool = _blocks(channels, 16, 32, 64), nn.AdaptiveAvgPool2d(1)
    return _network(features=features, pool=pool, flatten=nn.Flatten(), fc=nn.Linear(64, classes))


def _cnn_a(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    # LeCun et al. 1998, with ReLU and max-pooling.
    height, width = ((n // 2 - 4) // 2 for n in size)
    features = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
    return _network(features=nn.Sequential(*features), flatten=nn.Flatten(), classifier=nn.Sequential(*head))


def _cnn_b(channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    height, width = (n // 8 for n in size)
    head = nn.Sequential(nn.Linear(128 * height * width, 256), nn.ReLU(), nn.Linear(256, classes))
    return _network(features=_blocks(channels, 32, 64, 128), flatten=nn.Flatten(), classifier=head)


def _blocks(*widths: int) -> nn.Sequential:
    """[3x3 convolution, batch norm, ReLU, max-pool] from each width to the next, halving height and width."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        )
    )


def _network(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
