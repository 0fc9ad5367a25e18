"""What a network makes of images on the way: the features in front of its last layer, or those of named layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.errors import UsageError, did_you_mean

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Features:
    """Features of images (B, C, H, W): one tensor (B, D) a layer, differentiable.

    Without `layers` there is one, what enters the last linear layer or convolution that `probe` (1, C, H, W) passes
    through; a named layer gives what leaves it. Raises UsageError, which begins with `who`, for a layer that the
    network does not have or that gives no tensor.
    """

    def __init__(self, net: nn.Module, layers: tuple[str, ...], probe: Tensor, who: str) -> None:
        self.net = net
        self.head: nn.Linear | nn.Conv1d | nn.Conv2d | None = None
        if layers:
            self._parts = [(named(net, layer, who), layer) for layer in layers]
        else:
            self.head = last(net, probe)
            if self.head is None:
                raise UsageError(f"{who}: the model has no linear layer and no convolution; name a layer")
        self._who = who
        with torch.no_grad():
            self(probe)

    def __call__(self, x: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def enters(_module: nn.Module, inputs: Any) -> None:
            found[0] = inputs[0]

        def leaves(place: int) -> Any:
            return lambda _module, _inputs, output: found.__setitem__(place, output)

        if self.head is not None:
            hooks = [self.head.register_forward_pre_hook(enters)]
            names = [""]
        else:
            hooks = [part.register_forward_hook(leaves(i)) for i, (part, _) in enumerate(self._parts)]
            names = [name for _, name in self._parts]
        try:
            self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        for place, name in enumerate(names):
            if not isinstance(found.get(place), Tensor) or len(found[place]) != len(x):
                raise UsageError(f"{self._who}: layer '{name}' gives no tensor for each image; name another one")
        return [found[place].flatten(1) for place in range(len(names))]


def last(net: nn.Module, probe: Tensor) -> nn.Linear | nn.Conv1d | nn.Conv2d | None:
    """The linear layer or convolution that images pass through last."""
    passed: list[Any] = []
    parts = [part for part in net.modules() if isinstance(part, _WEIGHTED)]
    hooks = [part.register_forward_hook(lambda module, _inputs, _output: passed.append(module)) for part in parts]
    try:
        with torch.no_grad():
            net(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return passed[-1] if passed else None


def named(net: nn.Module, layer: str, who: str) -> nn.Module:
    """The submodule of that name; `net.`, which the built-in networks begin with, may be left out."""
    parts = dict(net.named_modules())
    for name in (layer, f"net.{layer}"):
        if name and name in parts:
            found: nn.Module = parts[name]
            return found
    names = [name.removeprefix("net.") for name in parts if name and name != "net"]
    hint = did_you_mean(layer, names) or f"; it has {', '.join(names[:12])}"
    raise UsageError(f"{who}: the model has no layer '{layer}'{hint}")


def device_of(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the network's weights are, and their precision."""
    first = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    return first.device, first.dtype


@torch.no_grad()
def of_images(features: Features, x: Tensor, size: int = 256) -> np.ndarray[Any, Any]:
    """The features (N, D) of images (N, C, H, W) as an array, those of several layers side by side."""
    device, dtype = device_of(features.net)
    made = [torch.cat(features(part.to(device, dtype)), 1).float().cpu() for part in torch.split(x, size)]
    return torch.cat(made).numpy()
