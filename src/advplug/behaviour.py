"""A digest of what a module of the user's own computes: weights, parts, attributes, and the code that they run."""

from __future__ import annotations

import dis
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, partial, partialmethod
from numbers import Number
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_BOOKKEEPING = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate__",
                "__annotate_func__", "__annotations_cache__", "__conditional_annotations__", "__orig_bases__",
                "__parameters__", "__firstlineno__", "__static_attributes__", "__slotnames__", "_abc_impl"}  # fmt: skip
_DATA = (bool, Number, str, bytes, Tensor, np.ndarray, tuple, list, dict, set, frozenset, type(None))
_NOISE = re.compile(r" #.*$|___torch_mangle_\d+\.?| object at 0x[0-9a-f]+|\btraining = \w+", re.MULTILINE)
"""What differs between two loads of one scripted module: where code came from, addresses, numbers of types; and the
mode."""
_CODE = (FunctionType, staticmethod, classmethod, property, cached_property, partial, partialmethod)
_NAMED = (BuiltinFunctionType, MethodDescriptorType, np.ufunc, ModuleType)


def behaviour(module: nn.Module) -> str:
    """sha256 over what a module computes: its weights and buffers, its parts, their own attributes and code, and what
    that code uses of the user's own modules. Code of installed packages goes by its name.

    Weights alone do not tell a ReLU from a tanh.
    """
    return _Teller().module(module)


class _Teller:
    """Tells values as text, each object once: from then on by its number, so that circles end."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}
        self._parts: dict[int, tuple[str, nn.Module]] = {}
        self._networks = 0

    def module(self, module: nn.Module) -> str:
        """Of a whole network; its parts are told here, and elsewhere go by their names."""
        from advplug.build import weights_hash

        for name, part in module.named_modules():
            self._parts.setdefault(id(part), (f"{self._networks}.{name}", part))
        self._networks += 1
        state = hashlib.sha256(weights_hash(module).encode())
        kept = module.state_dict().keys()
        for name, part in module.named_modules():
            hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
            state.update(self.told([name, type(part), _own(part), hooks]).encode())
        for name, buffer in module.named_buffers():
            if name not in kept:
                state.update(self.told([name, buffer]).encode())
        return state.hexdigest()

    def told(self, value: Any) -> str:
        """`value` as text that is the same in every process, without addresses."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, bool | int | float | complex | str | bytes | None):
            return repr(value)
        if isinstance(value, torch.dtype | torch.device | Number):
            return f"{kind} {value}"
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return f"{kind} {value.shape} {self.told(value.tolist())}"
        if isinstance(value, Tensor | np.ndarray):
            return _hashed(value)
        if id(value) in self._parts:
            return f"{kind} part {self._parts[id(value)][0]}"
        if isinstance(value, _NAMED):
            return f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        if isinstance(value, FunctionType | type):
            kind += f" {value.__module__}.{value.__qualname__}"
        if not isinstance(value, tuple | frozenset | CodeType):
            if id(value) in self._known:
                return f"{kind} {self._known[id(value)][0]}"
            self._known[id(value)] = len(self._known), value
        if isinstance(value, nn.Module):
            return f"{kind} {self.module(value)}"
        inside = [self.told(v) for v in _inside(value)]
        return f"{kind}({','.join(sorted(inside) if isinstance(value, set | frozenset) else inside)})"


def _hashed(value: Tensor | np.ndarray[Any, Any]) -> str:
    shape, kind = tuple(value.shape), value.dtype
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{kind} {shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"


def _own(part: nn.Module) -> list[Any]:
    """What a part has beside what every module has; of a scripted one its code, which is no attribute of its own."""
    if isinstance(part, torch.jit.ScriptModule):
        return _scripted(part)
    if type(part).__name__ == "OptimizedModule":  # torch.compile's: what it runs is a part of it
        return []
    usual = vars(nn.Module())
    return [{k: v for k, v in vars(part).items() if k not in usual}]


def _scripted(part: torch.jit.ScriptModule) -> list[Any]:
    """All of its methods and plain attributes, and the tensors that are constants in its code."""
    code = _NOISE.sub("", part._c.dump_to_str(True, False, False))
    try:
        return [code, dict(part.code_with_constants[1].const_mapping)]
    except (AttributeError, RuntimeError):  # it has no forward
        return [code]


def _inside(value: Any) -> list[Any]:
    """What an object is made of, as far as it can be seen."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, cached_property):
        return [value.func]
    if isinstance(value, partial | partialmethod):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        if not _is_users(value):
            return []
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *_cells(value), *_used(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, type):
        written = [c for c in value.__mro__ if _is_users(c)]
        return [part for c in written for item in vars(c).items() if _counts(*item) for part in item]
    return _attributes(value)


def _attributes(value: Any) -> list[Any]:
    """Those of an object: none of what is Python's own."""
    kind = type(value)
    if isinstance(value, SimpleNamespace):
        return [part for item in vars(value).items() for part in item]
    if kind.__module__.partition(".")[0] in sys.stdlib_module_names:
        return [value.__wrapped__] if isinstance(getattr(value, "__wrapped__", None), FunctionType) else []
    slots = [n for c in kind.__mro__ for n in _names_of(vars(c).get("__slots__", ())) if hasattr(value, n)]
    held = {n: getattr(value, n) for n in slots} | dict(getattr(value, "__dict__", {}))
    return [*([kind] if _is_users(kind) else []), *(part for item in held.items() for part in item)]


def _names_of(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _cells(function: FunctionType) -> Iterator[Any]:
    """What a function holds of the one around it; a cell that is filled later is empty now."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield None


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute of a class says what it computes: code and data, not what Python itself keeps there."""
    if name in _BOOKKEEPING:
        return False
    wrapped = isinstance(getattr(value, "__wrapped__", None), FunctionType)
    return wrapped or isinstance(value, (*_CODE, *_DATA)) or (isinstance(value, type) and _is_users(value))


def _used(function: FunctionType) -> Iterator[Any]:
    """Functions, classes and data that a function takes from the user's own modules."""
    names, attributes = _looked_up(function.__code__)
    for name in names:
        used = function.__globals__.get(name)
        if isinstance(used, ModuleType):
            yield from _taken(used, attributes, set())
        elif name in function.__globals__ and _matters(used):
            yield name
            yield used


def _taken(module: ModuleType, attributes: list[str], seen: set[str]) -> Iterator[Any]:
    """What code that names these attributes takes from a module of the user's own, and from modules in it."""
    if not _is_users(module) or module.__name__ in seen:
        return
    seen.add(module.__name__)
    held = vars(module)
    for at in (at for at in attributes if at in held):
        if isinstance(held[at], ModuleType):
            yield from _taken(held[at], attributes, seen)
        elif _matters(held[at]):
            yield at
            yield held[at]


def _matters(used: Any) -> bool:
    """Whether what code names is more than its name: data, networks, and code and objects of the user's own."""
    if isinstance(used, FunctionType | type):
        return _is_users(used)
    wrapped = isinstance(getattr(used, "__wrapped__", None), FunctionType)
    own = isinstance(used, nn.Module | SimpleNamespace) or _is_users(type(used))
    return wrapped or own or isinstance(used, (*_CODE, *_DATA))


def _looked_up(code: CodeType) -> tuple[list[str], list[str]]:
    """Names that code looks up outside itself, and all that it names, with those of the functions within it."""
    outside = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    named = list(code.co_names)
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        more, others = _looked_up(inner)
        outside += more
        named += others
    return list(dict.fromkeys(outside)), list(dict.fromkeys(named))


def _is_users(value: Any) -> bool:
    """Whether code is neither Python's own nor of an installed package."""
    name = str(value.__name__ if isinstance(value, ModuleType) else value.__module__)
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name.partition(".")[0] not in sys.stdlib_module_names - {"__main__"} | {"torch"} and (
        "site-packages" not in file and "dist-packages" not in file
    )
