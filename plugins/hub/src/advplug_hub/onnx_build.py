"""Modules of ONNX files, by onnx2torch: differentiable, so that they can be attacked with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advplug.builtin import nets
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.vision import import_torchvision
from advplug_hub import onnx_files

OLDER = 17
"""The operator set that a model is rewritten for where onnx2torch does not know its own."""
SOFTMAX = "a last softmax was taken off the ONNX model: attacks want logits, and the answers stay the same"


class OneByOne(nn.Module):
    """A network that was exported for a batch of one image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x[i : i + 1]) for i in range(len(x))])


def build(path: Path, info: DatasetInfo, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """The network of a file, from pixels in [0, 1] to logits (B, K); its `notes` tell what was changed.

    Raises UsageError where onnx2torch knows no counterpart of an operator, and where no logits of the dataset's classes
    come out.
    """
    model, bare = onnx_files.tidied(onnx_files.load(path))
    batch = onnx_files.shapes(path).input[0]
    if batch not in (None, 1):
        raise UsageError(f"{path} was exported for batches of {batch} images; export it with a free batch dimension")
    net = converted(model, path)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    made: Any = nets.classifier(OneByOne(net) if batch == 1 else net, mean, std)
    made.notes = (SOFTMAX,) if bare else ()
    _probe(made.eval(), path, info)
    module: nn.Module = made
    return module


def converted(model: Any, path: Path) -> nn.Module:
    """The module of a tidied model, rewritten for an older operator set where that is needed."""
    import_torchvision()
    from onnx import version_converter
    from onnx2torch import convert

    try:
        net: nn.Module = convert(model)
        return net
    except Exception as error:  # it asserts, and raises what it likes, for operators that it does not know
        first = error
    try:
        older: nn.Module = convert(version_converter.convert_version(model, OLDER))
        return older
    except Exception as error:
        why = " ".join(str(first).split()) or type(first).__name__
        raise UsageError(
            f"{path} cannot be made differentiable: onnx2torch does not know all its operators ({why}); export it with "
            "torch.onnx.export(..., opset_version=13, dynamo=False), or use the py: model with your own code"
        ) from error


def _probe(net: nn.Module, path: Path, info: DatasetInfo) -> None:
    x = torch.zeros(2, info.channels, *info.size)
    try:
        with torch.no_grad():
            logits = net(x)
    except Exception as error:  # shapes that only a pass reveals
        why = " ".join(str(error).split())
        raise UsageError(f"{path} does not take images of shape {tuple(x.shape)} ({why}); use data that fits, or "
                         "export it with a free batch dimension") from error  # fmt: skip
    want = (2, len(info.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != want:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"{path} must give logits of shape {want} for two images, got {got}; use data that fits")
