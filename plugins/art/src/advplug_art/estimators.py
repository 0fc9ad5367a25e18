"""The victim as ART's estimators: a PyTorch classifier with gradients, or a black box that is only asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.errors import UsageError
from advplug.wrapping import AsModule

Array = np.ndarray[Any, np.dtype[Any]]


class Handle(nn.Module):
    """A module for ART to move, switch and clear, while the user's own stays out of its reach.

    ART sees a model on the CPU; images go to the victim's device and answers come back.
    """

    def __init__(self, module: AsModule) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._held = (module,)  # in a tuple, so that it does not become a submodule

    @property
    def module(self) -> AsModule:
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x.float()).to(x.device)
        return answer

    def deployed(self) -> Handle:
        """The deployed system, without gradients."""
        return Handle(self.module.deployed())

    def features(self, x: Tensor, layer: str) -> Tensor:
        """What the submodule `layer` of the user's model gives for images (B, C, H, W); '' is the model itself.

        Raises UsageError for a name that the model does not have.
        """
        inner = self.module.inner
        try:
            part = inner.get_submodule(layer)
        except AttributeError:
            names = ", ".join([name for name, _ in inner.named_modules() if name][:12])
            raise UsageError(f"art.feature-adversaries: the model has no layer '{layer}'; it has {names}") from None
        found: list[Tensor] = []
        hook = part.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        try:
            self(x)
        finally:
            hook.remove()
        if not found or not isinstance(found[-1], Tensor):
            raise UsageError(f"art.feature-adversaries: layer '{layer}' gives no tensor; name another one")
        return found[-1].to(x.device)


class Reordered(Handle):
    """The same with its classes in the order `order` (K,)."""

    def __init__(self, module: AsModule, order: Tensor) -> None:
        super().__init__(module)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


def classifier(handle: Handle, shape: tuple[int, ...], classes: int) -> Any:
    """ART's PyTorchClassifier around the victim, for images of `shape` (C, H, W) in [0, 1]."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model=handle,
        # Summed, not averaged: an image's gradient must not depend on how many others are in the batch.
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        channels_first=True,
        device_type="cpu",
    )


def black_box(
    module: AsModule,
    shape: tuple[int, ...],
    nearest: Callable[[Tensor], Tensor],
    clip: tuple[float, float],
    channels_first: bool,
) -> Any:
    """ART's black box: it asks `module` about `nearest` of each image, and no gradient is within reach.

    `shape` is (C, H, W); with `channels_first` False, ART hands over images (B, H, W, C).
    """
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    def ask(x: Array) -> Array:
        images = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        if not channels_first:
            images = images.permute(0, 3, 1, 2)
        with torch.no_grad():
            answers = [module(part) for part in torch.split(nearest(images), module.batch_size)]
        answer: Array = torch.cat(answers).cpu().numpy()
        return answer

    seen = shape if channels_first else (*shape[1:], shape[0])
    return BlackBoxClassifierNeuralNetwork(
        ask, input_shape=seen, nb_classes=module.classes, channels_first=channels_first, clip_values=clip
    )
