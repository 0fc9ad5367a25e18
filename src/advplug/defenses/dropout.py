"""Dropout that stays on when a model is judged: found where it is called, put in where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from advplug.errors import UsageError, did_you_mean

FUNCTIONAL = frozenset(
    {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
     functional.alpha_dropout, functional.feature_alpha_dropout}
)  # fmt: skip
NATIVE = frozenset({torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout})
USUAL = 0.3
"""The rate of dropout that is put in, unless given: less than the usual half, as the model was not trained with it."""


class Active(TorchFunctionMode):
    """Inside, every dropout of a rate above 0 drops, whatever mode its module is in; `calls` counts them.

    It is caught where it is called, so that modules and plain functions behave alike. `rate` replaces their own.
    Attention weights, whose dropout is part of a fused operation, are left alone.
    """

    def __init__(self, rate: float | None = None) -> None:
        super().__init__()
        self.rate, self.calls = rate, 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in FUNCTIONAL and given.get("p", 0) > 0:
            self.calls += 1
            given |= {"training": True, "inplace": False, "p": self.rate or given["p"]}
        elif func in NATIVE and len(args) == 3 and args[1] > 0:
            self.calls += 1
            args = (args[0], self.rate or args[1], True)
        return func(*args, **given)


def drop(inner: Callable[[Tensor], Tensor], x: Tensor, rate: float | None, rng: torch.Generator) -> Tensor:
    """`inner(x)` with its dropout on, drawn from `rng`; the global generators stay as they are."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    with _without_draws(x):
        torch.manual_seed(seed)
        with _eager(), Active(rate):
            return inner(x)


def _eager() -> AbstractContextManager[Any]:
    """Compiled models know nothing of `Active`: inside, they run as they were written."""
    # Nothing is compiled before this module is there, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class Drop:
    """A hook that drops from what a module is given; off in evaluation mode, like any dropout."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (functional.dropout(args[0], self.rate, module.training), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: functional.dropout(kwargs[first], self.rate, module.training)}


def put_in(model: nn.Module, names: Iterable[str], rate: float) -> None:
    """Dropout in front of the modules of these names, in place; weights and their names stay as they are."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise UsageError(f"dropout: the model has no layer '{name}'{did_you_mean(name, known)}")
        known[name].register_forward_pre_hook(Drop(rate), with_kwargs=True)


def place(model: nn.Module, x: Tensor, names: Sequence[str], rate: float) -> tuple[tuple[str, ...], int]:
    """Puts dropout in front of `names`, or, where the model has none at all, in front of its last linear layer.

    `x` (B, C, H, W) is passed to see what is called. Returns the names of the layers and how many calls of dropout a
    pass has then. Raises UsageError where a layer is unknown or never called, or none can be found.
    """
    with _without_draws(x):
        return _placed(model, x, names, rate)


def _without_draws(x: Tensor) -> AbstractContextManager[Any]:
    """The global generators are afterwards as they were."""
    return torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else [])


def _placed(model: nn.Module, x: Tensor, names: Sequence[str], rate: float) -> tuple[tuple[str, ...], int]:
    with torch.no_grad():
        model(x)  # What is computed once and kept, such as features of texts, is no part of an answer.
    with _called(model) as called, Active() as found, torch.no_grad():
        model(x)
    known = dict(model.named_modules())
    missing = [name for name in names if name in known and name not in called]
    if missing:
        raise UsageError(f"dropout: the layer '{missing[0]}' is not called by itself when the model runs")
    chosen = tuple(names)
    if not names and not found.calls:
        linear = [name for name in called if isinstance(known[name], nn.Linear)]
        if not linear:
            raise UsageError("dropout: the model has neither dropout nor a linear layer; say where with layers=")
        chosen = (linear[-1],)
    put_in(model, chosen, rate)
    with Active() as found, torch.no_grad():
        model(x)
    if not found.calls:
        raise UsageError(f"dropout: nothing is dropped in front of {', '.join(chosen)} when the model answers")
    return chosen, found.calls


@contextmanager
def _called(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are called inside, in the order of their last call."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            if name in names:
                names.remove(name)
            names.append(name)

        return note

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
