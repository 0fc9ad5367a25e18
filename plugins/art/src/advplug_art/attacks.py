"""The one adapter for all attacks of ART: a row of the tables becomes an attack of advplug.

`advplug_art.attacks:NAME` is the factory of the row of that name.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advplug.contracts import Access, Batch, MinimumNorm, Targeted, Threat
from advplug.errors import CellFailure
from advplug.vision import import_torchvision
from advplug.wrapping import AsModule, Wrapped
from advplug_art.attack_table import ROWS
from advplug_art.estimators import Array, Handle, black_box, classifier
from advplug_art.rows import Row, Setting

_NOISY = r"(art|kornia|numba|scipy|tqdm)(\.|$)"
"""Modules whose warnings are not about the user's model."""


def __getattr__(name: str) -> Callable[..., Wrapped]:
    row = ROWS.get(name.replace("_", "-"))
    if row is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return functools.partial(build, row)


def build(row: Row, /, **params: Any) -> Wrapped:
    """The attack of a row, with these parameters."""
    return Wrapped(
        f"art.{row.name}",
        Call(row, params),
        row.access,
        probabilities=row.probabilities,
        one_by_one=row.one_by_one,
        queries=params.get("queries"),
    )


@dataclass(frozen=True)
class Call:
    """Hands images to ART and takes back what it makes of them, as advplug.wrapping.Call says."""

    row: Row
    params: Mapping[str, Any]

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        """Raises CellFailure where ART's attack needs a package that is not installed."""
        if self._nothing_allowed(threat):
            return part.x
        if self.row.needs and find_spec(self.row.needs) is None:
            raise CellFailure(
                f"art.{self.row.name} needs the package {self.row.needs}: pip install 'advplug-art[{self.row.name}]'"
            )
        setting = self._setting(module, part, threat)
        with quiet():
            attack = load(self.row.maker)(self._estimator(module, part, threat), **self.row.keywords(setting))
            made = attack.generate(self._pixels(part.x), labels(part, module.classes, setting.targeted))
        images = torch.from_numpy(np.asarray(made, dtype=np.float32))
        return images.permute(0, 3, 1, 2) if self._last else images

    @property
    def _last(self) -> bool:
        return self.row.asks == "answers-last"

    def _nothing_allowed(self, threat: Threat) -> bool:
        if isinstance(threat.perturbation, MinimumNorm):
            return False
        return threat.eps < 1 if threat.norm == "l0" else threat.eps <= 0

    def _setting(self, module: AsModule, part: Batch, threat: Threat) -> Setting:
        _, channels, height, width = part.x.shape
        targeted = isinstance(threat.goal, Targeted) and part.target is not None
        shape = (channels, height, width)
        size = max(1, module.batch_size)
        return Setting(self.params, threat.norm, threat.eps, shape, module.classes, size, targeted)

    def _estimator(self, module: AsModule, part: Batch, threat: Threat) -> Any:
        shape = tuple(part.x.shape[1:])
        if self.row.access is Access.GRADIENT:
            return classifier(Handle(module), shape, module.classes)
        clean, eps = part.x.detach().float().cpu(), threat.eps

        def nearest(x: Tensor) -> Tensor:
            return x.clamp(clean - eps, clean + eps).clamp(0, 1) if self.row.in_ball else x.clamp(0, 1)

        return black_box(module, shape, nearest, self.row.clip, not self._last)

    def _pixels(self, x: Tensor) -> Array:
        # A copy: some of ART's attacks write into what they are given.
        images = x.detach().float().cpu().clone()
        return np.ascontiguousarray((images.permute(0, 2, 3, 1) if self._last else images).numpy())


def labels(part: Batch, classes: int, targeted: bool) -> Array:
    """The targets, or the true labels, as rows with a single 1: float32 (B, K)."""
    wanted = part.target if targeted else part.y
    assert wanted is not None  # targeted says so
    hot: Array = torch.nn.functional.one_hot(wanted.cpu(), classes).float().numpy()
    return hot


def load(maker: str) -> Any:
    """What "module:attribute" names."""
    # Some of ART's modules import torchvision, whose wheels do not load beside every torch build.
    import_torchvision()
    module, _, attribute = maker.partition(":")
    return getattr(importlib.import_module(module), attribute)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what ART warns of and logs about its own code; the user's model may still warn."""
    log = logging.getLogger("art")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=_NOISY)
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
