"""Two modules have the same digest where they compute the same, and only there."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import linear
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


class Fourth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Third(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Fourth()


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Third()


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Second()


@dataclass
class Config:
    factor: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x

    @cached_property
    def kind(self) -> str:
        return "one"


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor


class Holds(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return linear.wrong(x) if x.mean() > 1e9 else x


def test_code_counts_however_deep_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(First())
    monkeypatch.setattr(Fourth, "forward", lambda self, x: torch.tanh(x))
    assert behaviour(First()) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.relu, torch.tanh),
        (functional.gelu, functional.softplus),
        (np.exp, np.log),
        (torch.float16, torch.float32),
        (Slotted(1).apply, Slotted(2).apply),
        (Slotted(1), Slotted(2)),
        (Config(1), Config(2)),
        (Fraction(1, 2), Fraction(1, 3)),
        (torch.zeros(2), torch.zeros(1, 2)),
    ],
)
def test_attributes_that_compute_otherwise(one: Any, other: Any) -> None:
    assert behaviour(Holds(one)) != behaviour(Holds(other))
    assert behaviour(Holds(one)) == behaviour(Holds(copy.deepcopy(one)))


@pytest.mark.parametrize("name", ["__call__", "kind"])
def test_code_of_objects_that_are_held_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(Holds(Config()))
    changed = cached_property(lambda self: "two") if name == "kind" else lambda self, x: x + 1
    monkeypatch.setattr(Config, name, changed)
    assert behaviour(Holds(Config())) != before


def test_functions_of_modules_beside_it_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(Holds(1))
    monkeypatch.setattr(linear, "wrong", lambda x: x + 1)
    assert behaviour(Holds(1)) != before


def test_names_of_attributes_are_no_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    before = behaviour(Holds(1))
    monkeypatch.setitem(globals(), "mean", 0.5)
    assert behaviour(Holds(1)) == before, "forward calls x.mean, whatever else is called mean here"


def test_copies_and_other_processes_agree(tmp_path: Path) -> None:
    module = Holds([Config(), logging.getLogger("advplug.tests"), {"a", "b", "c"}])
    before = behaviour(module)
    assert behaviour(copy.deepcopy(module)) == before
    assert behaviour(module) == before, "copying leaves traces in classes"
    (tmp_path / "mine.py").write_text("""
import torch
class Net(torch.nn.Module):
    kinds = {"x", "y", "z"}
    def forward(self, x):
        return x if {"p", "q", "r"} & self.kinds else -x
""")
    code = "import mine; from advplug.behaviour import behaviour; print(behaviour(mine.Net()))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


class Runs(nn.Module):
    """Runs what it was given, wherever that is kept."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = list(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def layer(seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(2, 2)


def around(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)


@pytest.mark.parametrize(
    "held",
    [
        lambda seed: [layer(seed)],
        lambda seed: [around(layer(seed))],
        lambda seed: [layer(seed).forward],
        lambda seed: [SimpleNamespace(net=layer(seed))],
        lambda seed: [np.array([seed, "a"], dtype=object)],
        lambda seed: [Runs(layer(0), layer(seed))],
    ],
)
def test_networks_that_are_no_registered_parts_count(held: Callable[[int], list[Any]]) -> None:
    assert behaviour(Runs(*held(1))) == behaviour(Runs(*held(1)))
    assert behaviour(Runs(*held(1))) != behaviour(Runs(*held(2)))


def test_the_order_in_which_parts_are_held_counts() -> None:
    net = Runs()
    net.a, net.b = layer(0), layer(1)
    net.parts = [net.a, net.b]
    before = behaviour(net)
    net.parts.reverse()
    assert behaviour(net) != before


CONFIG = SimpleNamespace(t=1.0)
ACTIVATION = nn.PReLU()


@lru_cache
def kept(n: int) -> int:
    return n + 1


class UsesGlobals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION(x * CONFIG.t + kept(1))


def test_globals_that_are_objects_networks_or_wrapped_functions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    @lru_cache
    def other(n: int) -> int:
        return n + 2

    here = sys.modules[__name__]
    for name, value in (("CONFIG", SimpleNamespace(t=2.0)), ("ACTIVATION", nn.PReLU(init=0.5)), ("kept", other)):
        before = behaviour(UsesGlobals())
        monkeypatch.setattr(here, name, value)
        assert behaviour(UsesGlobals()) != before, name


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_code_of_scripted_modules_counts(tmp_path: Path) -> None:
    """All that is left of a ReLU or a constant in a file is the code."""
    digests = set()
    for i, then in enumerate((nn.ReLU(), nn.Tanh(), nn.Hardtanh(0, 2), nn.Hardtanh(0, 3))):
        net = nn.Sequential(layer(0), then)
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 2)), tmp_path / f"{i}.pt")  # type: ignore[no-untyped-call]
        loaded = [torch.jit.load(tmp_path / f"{i}.pt") for _ in range(2)]  # type: ignore[no-untyped-call]
        one, again = map(behaviour, loaded)
        assert one == again
        digests.add(one)
    assert len(digests) == 4


class Scripted(nn.Module):
    def __init__(self, t: float, sign: int) -> None:
        super().__init__()
        self.t, self.sign, self.inner = t, sign, layer(0)

    @torch.jit.export
    def helped(self, x: Tensor) -> Tensor:
        return x * self.t

    def forward(self, x: Tensor) -> Tensor:
        return self.helped(self.inner(x)) * self.sign


class Relu(Scripted):
    @torch.jit.export
    def helped(self, x: Tensor) -> Tensor:
        return x.relu() * self.t


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_methods_and_attributes_of_scripted_modules_count(tmp_path: Path) -> None:
    digests = set()
    for i, net in enumerate((Scripted(1.0, 1), Scripted(2.0, 1), Scripted(1.0, -1), Relu(1.0, 1))):
        torch.jit.save(torch.jit.script(net), tmp_path / f"{i}.pt")  # type: ignore[no-untyped-call]
        one, again = (behaviour(torch.jit.load(tmp_path / f"{i}.pt")) for _ in range(2))  # type: ignore[no-untyped-call]
        assert one == again
        digests.add(one)
    assert len(digests) == 4


@pytest.mark.parametrize("registered", [True, False])
def test_which_of_several_networks_is_used_counts(registered: bool) -> None:
    def chosen(i: int) -> nn.Module:
        net, held = Runs(), [layer(0), layer(1)]
        if registered:
            net.a, net.b = held
        else:
            net.all = held
        net.parts = [held[i]]
        return net

    assert behaviour(chosen(0)) == behaviour(chosen(0))
    assert behaviour(chosen(0)) != behaviour(chosen(1))


def test_a_cell_that_is_still_empty_is_no_error() -> None:
    def outer() -> FunctionType:
        def inner(x: Tensor) -> Tensor:
            return x + late

        found = inner
        behaviour(Net(then=found))
        late = 1.0
        return found  # type: ignore[return-value]

    assert behaviour(Net(then=outer()))
