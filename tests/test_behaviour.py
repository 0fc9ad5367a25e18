"""Two modules have the same digest where they compute the same, and only there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advplug.behaviour import behaviour

SHIFT = 0.0


def shifted(x: Tensor) -> Tensor:
    return x - SHIFT


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


class Net(nn.Module):
    scale = 1.0

    def __init__(self, mean: float = 0.0, then: Callable[[Tensor], Tensor] = twice) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.then = then

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return x

    @classmethod
    def after(cls, x: Tensor) -> Tensor:
        return x

    @property
    def factor(self) -> float:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.then(shifted(self.before(x) - self.mean))) * self.scale * self.factor


def other(x: Tensor) -> Tensor:
    return x + 1


class Loop(nn.Module):
    """Its code refers to itself, and its attributes to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}
        self.parts["self"] = self.parts

    def forward(self, x: Tensor) -> Tensor:
        return Loop.forward(self, x) if x.sum() > 1e9 else x


def test_equal_modules_agree() -> None:
    assert behaviour(Net()) == behaviour(Net())
    assert behaviour(Loop()) == behaviour(Loop())
    assert behaviour(nn.Sequential(nn.ReLU())) != behaviour(nn.Sequential(nn.Tanh()))


def test_buffers_that_are_not_stored_count() -> None:
    assert behaviour(Net(mean=0.5)) != behaviour(Net())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 3.0),
        ("before", staticmethod(other)),
        ("after", classmethod(lambda cls, x: x + 1)),
        ("factor", property(lambda self: 2.0)),
        ("added", torch.ones(2)),
    ],
)
def test_what_the_class_holds_counts(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(Net())
    monkeypatch.setattr(Net, name, value, raising=False)
    assert behaviour(Net()) != before


def test_functions_that_it_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(Net())
    assert behaviour(Net(then=thrice)) != before
    monkeypatch.setitem(globals(), "SHIFT", 0.5)
    changed = behaviour(Net())
    assert changed != before, "data that a helper of forward names"
    monkeypatch.setitem(globals(), "shifted", twice)
    assert behaviour(Net()) not in (before, changed)


def test_arguments_of_partial_functions_count() -> None:
    made = [behaviour(Net(then=partial(torch.mul, other=factor))) for factor in (1.0, 2.0)]
    assert made[0] != made[1]


def test_a_cell_that_is_still_empty_is_no_error() -> None:
    def outer() -> FunctionType:
        def inner(x: Tensor) -> Tensor:
            return x + late

        found = inner
        behaviour(Net(then=found))
        late = 1.0
        return found  # type: ignore[return-value]

    assert behaviour(Net(then=outer()))
