"""A digest of what a module of the user's own computes: weights, parts, attributes, and the code that they run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEPTH = 8
"""How far into objects within objects is looked; circles end there."""
_BOOKKEEPING = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__orig_bases__",
                "__parameters__", "__firstlineno__", "__static_attributes__", "_abc_impl"}  # fmt: skip
_DATA = (bool, int, float, complex, str, bytes, Tensor, np.ndarray, tuple, list, dict, set, frozenset, type(None))
_CODE = (FunctionType, staticmethod, classmethod, property, partial)


def behaviour(module: nn.Module) -> str:
    """sha256 over what a module computes: its weights and buffers, its parts, their own attributes and code, and what
    that code uses of the user's own modules.

    Weights alone do not tell a ReLU from a tanh.
    """
    from advplug.build import weights_hash

    usual = vars(nn.Module())
    state, teller = hashlib.sha256(weights_hash(module).encode()), _Teller()
    kept = module.state_dict().keys()
    for name, part in module.named_modules():
        own = {k: v for k, v in vars(part).items() if k not in usual}
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        state.update(teller.told([name, type(part), own, hooks]).encode())
    for name, buffer in module.named_buffers():
        if name not in kept:
            state.update(teller.told([name, buffer]).encode())
    return state.hexdigest()


class _Teller:
    """Tells values as text; code that was told once is named from then on."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}

    def told(self, value: Any, depth: int = 0) -> str:
        """`value` as text that is the same in every process, without addresses."""
        if isinstance(value, bool | int | float | complex | str | bytes | None):
            return repr(value)
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, FunctionType | type):
            kind += f" {value.__module__}.{value.__qualname__}"
            if id(value) in self._known:
                return kind
            self._known[id(value)] = value
        inside = [] if depth > DEPTH else [self.told(v, depth + 1) for v in _inside(value)]
        return f"{kind}({','.join(sorted(inside) if isinstance(value, set | frozenset) else inside)})"


def _inside(value: Any) -> list[Any]:
    """What an object is made of, as far as it can be seen."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, MethodType | staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *_cells(value), *_used(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, type):
        written = [c for c in value.__mro__ if not c.__module__.startswith(("torch.", "builtins"))]
        return [part for c in written for item in vars(c).items() if _counts(*item) for part in item]
    return [] if isinstance(value, nn.Module) else list(getattr(value, "__dict__", {}).values())


def _cells(function: FunctionType) -> Iterator[Any]:
    """What a function holds of the one around it; a cell that is filled later is empty now."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield None


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute of a class says what it computes: code and data, not what Python itself keeps there."""
    return name not in _BOOKKEEPING and isinstance(value, (*_CODE, *_DATA))


def _used(function: FunctionType) -> Iterator[Any]:
    """Functions, classes and data of the user's own modules that a function names."""
    if not _is_users(function):
        return
    for name in _names(function.__code__):
        used = function.__globals__.get(name)
        if isinstance(used, FunctionType | type):
            if _is_users(used):
                yield used
        elif name in function.__globals__ and isinstance(used, (*_CODE, *_DATA)):
            yield name
            yield used


def _names(code: CodeType) -> list[str]:
    """Names that code looks up outside itself, with those of the functions within it."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


def _is_users(value: Any) -> bool:
    """Whether code is neither Python's own nor of an installed package."""
    module = str(value.__module__)
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] not in sys.stdlib_module_names | {"torch"} and (
        "site-packages" not in file and "dist-packages" not in file
    )
