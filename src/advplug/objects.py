"""The user's own modules, tensors and loaders, in the place of registered models and datasets."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.behaviour import behaviour
from advplug.contracts import DatasetCaps, DatasetInfo, ModelCaps, Schedule
from advplug.data import ArrayImages, Dataset, Split
from advplug.errors import UsageError
from advplug.plans import Bound

BUDGETS = {"linf": Fraction(8, 255), "l2": Fraction(1, 2), "l1": Fraction(12)}
"""Budgets for data of the user's own, unless given: those customary for CIFAR-10."""


@dataclass(frozen=True)
class ModuleSource:
    """A module of the user's own, with its weights as they are; it maps pixels in [0, 1] to logits."""

    module: nn.Module
    digest: str

    def identity(self) -> Mapping[str, Any]:
        return {"sha256": self.digest, "class": type(self.module).__qualname__}

    def misfit(self, info: DatasetInfo) -> str | None:
        return None  # only a forward pass can tell, and it does

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        return None

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        try:
            module = copy.deepcopy(self.module).eval()
        except Exception as error:  # a module may hold anything
            text = " ".join(str(error).split())
            raise UsageError(f"the model cannot be copied, and it is never attacked in place: {text}") from error
        x = torch.zeros(1, info.channels, *info.size)
        try:
            with torch.no_grad():
                logits = module.cpu()(x)
        except Exception as error:  # the user's code may raise anything
            text = " ".join(str(error).split())
            raise UsageError(f"the model does not take images of shape {tuple(x.shape)}: {text}") from error
        if not isinstance(logits, Tensor) or logits.shape != (1, len(info.classes)):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"the model must return logits of shape (1, {len(info.classes)}) for one image, got {got}")
        return module


@dataclass(frozen=True)
class TensorSource:
    """Images and labels of the user's own; there is no training split, so defenses that train are out."""

    dataset: Dataset
    digest: str

    def info(self) -> DatasetInfo:
        return self.dataset.info

    def fingerprint(self) -> str:
        return self.digest

    def load(self, offline: bool = False) -> Dataset:
        return self.dataset


def bind_module(module: nn.Module, name: str | None = None) -> Bound:
    """A module as a model; what it computes is part of every key. Raises UsageError for anything else."""
    kind = type(module).__name__
    if isinstance(module, type):
        raise UsageError(f"a model is a reference or an nn.Module, got the class {module.__name__}; write "
                         f"{module.__name__}(...)")  # fmt: skip
    if not isinstance(module, nn.Module):
        raise UsageError(f"a model is a reference or an nn.Module, got {'an' if kind[0] in 'aeiou' else 'a'} {kind}")
    return Bound(name or kind, {"object": kind}, ModelCaps(), ModuleSource(module, behaviour(module)))


def bind_data(data: Any, name: str | None = None, train: Any = None, classes: int | None = None) -> Bound:
    """(images, labels) or an iterable of such batches as a dataset.

    Images are (N, C, H, W), uint8 or float in [0, 1]; labels int (N,). `train` of the same form is for
    defenses that train; `classes` is the class count where not all classes occur. Raises UsageError.
    """
    x, y = _collect(data)
    x_train, y_train = _collect(train) if train is not None else (x[:0], y[:0])
    count = classes if classes is not None else int(max(y.max(initial=0), y_train.max(initial=0))) + 1
    if count < 2 or y.min(initial=0) < 0 or y.max(initial=0) >= count:
        raise UsageError(f"labels must be class numbers 0 to classes - 1, found {y.min()} to {y.max()} of {count}")
    size = x.shape[2], x.shape[3]
    info = DatasetInfo(tuple(map(str, range(count))), x.shape[1], size, BUDGETS, trainable=train is not None,
                       images=len(x))  # fmt: skip
    training, test = (Split(ArrayImages(a), b, np.arange(len(b))) for a, b in ((x_train, y_train), (x, y)))
    digest = hashlib.sha256()
    for array in (x, y, x_train, y_train):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    label = name or "tensors"
    source = TensorSource(Dataset(info, training, test), digest.hexdigest())
    return Bound(label, {"object": label}, DatasetCaps(), source)


def _collect(data: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    pair = isinstance(data, tuple | list) and len(data) == 2 and not isinstance(data[0], tuple | list)
    batches: Iterable[Any] = [data] if pair else data
    images, labels = [], []
    try:
        for batch in batches:
            images.append(torch.as_tensor(batch[0]).detach().cpu())
            labels.append(torch.as_tensor(batch[1]).detach().cpu())
        x, y = torch.cat(images), torch.cat(labels)
    except (TypeError, IndexError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"data must be (images, labels) or batches of them: {error}") from error
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise UsageError(f"images must be (N, C, H, W) with N labels, got {tuple(x.shape)} and {tuple(y.shape)}")
    if y.is_floating_point():
        raise UsageError(f"labels must be whole numbers, got {y.dtype}")
    if x.dtype != torch.uint8:
        x = x.float()
        if not (float(x.min()) >= 0 and float(x.max()) <= 1):
            raise UsageError(
                f"images must hold numbers in [0, 1], found {float(x.min()):g} to {float(x.max()):g}; "
                "leave normalisation to the model"
            )
    return x.numpy(), y.long().numpy()
