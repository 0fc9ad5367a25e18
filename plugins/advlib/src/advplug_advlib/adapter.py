"""Calls adv-lib's functions, as rows of the table, on one batch at a time."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advplug.contracts import Access, Batch, Targeted, Threat
from advplug.errors import CellFailure, UsageError
from advplug.vision import import_torchvision
from advplug.wrapping import AsModule, Wrapped
from advplug_advlib.table import ROWS, Row


def __getattr__(name: str) -> Callable[..., Wrapped]:
    """The factory of the row called `name`, with `_` for `-`: parameters to attack."""
    for row in ROWS:
        if row.name.replace("-", "_") == name:
            return functools.partial(make, row)
    raise AttributeError(name)


def make(row: Row, /, **values: Any) -> Wrapped:
    """The attack of a row. Raises UsageError where adv-lib cannot be imported."""
    library()
    return Wrapped(f"adv.{row.name}", Call(row, values), Access.GRADIENT)


@functools.cache
def library() -> Any:
    """`adv_lib.attacks`. Raises UsageError where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # distutils and others, on import
            import_torchvision()
            return importlib.import_module("adv_lib.attacks")
    except ImportError as error:
        raise UsageError(
            f"adv-lib cannot be imported ({error}); PIP_CONSTRAINT=constraints.txt pip install adv-lib, where "
            "constraints.txt says setuptools<81, installs it with visdom and distutils, which it imports"
        ) from error


@dataclass(frozen=True)
class Call:
    """One row with its parameters' values, as `advplug.wrapping` calls it."""

    row: Row
    values: Mapping[str, Any]

    def __call__(self, module: AsModule, part: Batch, threat: Threat) -> Tensor:
        """Images like `part.x`, the clean ones where it failed. Raises CellFailure for too few classes."""
        row, targeted = self.row, isinstance(threat.goal, Targeted)
        self._demand_classes(module.classes, targeted)
        labels = part.target if targeted else part.y
        function: Callable[..., Tensor] = functools.reduce(getattr, row.function.split("."), library())
        given = self._arguments(module.classes, threat, targeted)
        if "targeted" in row.goals:
            given["targeted"] = targeted
        with _fmn() if row.name == "fmn" else nullcontext():
            # Logits in the images' precision: the library mixes both in tensors of its own.
            return function(lambda x: module(x).to(x.dtype), part.x.clone(), labels, **given)

    def _arguments(self, classes: int, threat: Threat, targeted: bool) -> dict[str, Any]:
        row = self.row
        given = dict(row.extra.get(threat.norm, {}))
        for option in row.options:
            value = self.values[option.spec.name]
            if value is not None or option.keyword not in given:
                given[option.keyword] = value
            if option.spec.name == "loss" and value == "auto":
                given[option.keyword] = "dlr" if classes >= self._dlr_needs(targeted) else "ce"
        if row.norm:
            given[row.norm] = row.order[threat.norm]
        if row.eps:
            given[row.eps] = threat.eps
        if row.name == "fab":
            given["targeted_restarts"] = given["restarts"] is not None
        for keyword in ("restarts", "num_targets"):
            if self.values.get("targets") is not None and keyword in given and row.name in ("fab", "apgd-t"):
                given[keyword] = min(given[keyword], classes - 1)
        return given

    def _dlr_needs(self, targeted: bool) -> int:
        """How many classes the difference of logits ratio needs; 0 for attacks without it."""
        return self.row.dlr[targeted] if self.row.dlr else 0

    def _demand_classes(self, classes: int, targeted: bool) -> None:
        needed = self._dlr_needs(targeted)
        if self.values.get("loss", "dlr") != "dlr" or classes >= needed:
            return
        instead = "use loss=ce" if "loss" in self.values else "use adv.pdgd or adv.fmn"
        raise CellFailure(
            f"adv.{self.row.name}: the difference of logits ratio needs {needed} classes here, the model has "
            f"{classes}; {instead}"
        )


BEYOND = 0.01
"""By which share FMN's radii are stretched (DeepFool overshoots by 0.02)."""


@contextmanager
def _fmn() -> Iterator[None]:
    """FMN's projections, without two faults of theirs.

    In L0, one changed value that is enough for every image of the batch makes it index an empty tensor: a radius of 0
    is taken for 1, which is what it does itself while any image needs more. In the other norms the radius of an image
    not yet fooled is estimated to end on the boundary itself, and where the logits are linear nearby it may never be
    crossed: with adv-lib's own projections 4 of 16 handwritten digits are fooled in L2, with these 16, as by DDN. A
    success still counts by its own size, and radii still shrink after it.
    """
    home: Any = importlib.import_module("adv_lib.attacks.fast_minimum_norm")
    l0, names = home.l0_projection_, ("l1_projection_", "l2_projection_", "linf_projection_")
    originals = {name: getattr(home, name) for name in names}
    home.l0_projection_ = lambda δ, ε: l0(δ=δ, ε=ε.clamp(min=1))
    for name, original in originals.items():
        setattr(home, name, functools.partial(_stretched, original))
    try:
        yield
    finally:
        home.l0_projection_ = l0
        for name, original in originals.items():
            setattr(home, name, original)


def _stretched(projection: Callable[..., Tensor], δ: Tensor, ε: Tensor) -> Tensor:
    return projection(δ=δ, ε=ε * (1 + BEYOND))
