"""Typed parameters, read from a factory's signature: one source for parsing, validation and help.

A factory declares a parameter as `steps: Annotated[int, Param("gradient steps", ge=1)] = 10`.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from advplug.errors import PluginError, UsageError, did_you_mean
from advplug.parse import Reference, Stack, VictimRef, parse_stack, parse_victim

REQUIRED: Any = inspect.Parameter.empty
_KINDS: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    Fraction: "fraction",
    str: "str",
    Path: "path",
    Stack: "stack",
    VictimRef: "victim",
}
_EXPONENT = re.compile(r"[eE]([+-]?\d+)")
_MAX_EXPONENT = 300
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")
TRUE = {"true", "yes", "on", "1"}
FALSE = {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Param:
    """What an annotation cannot say of a parameter: help, bounds, and whether it needs no key.

    A positional parameter is the value that follows the name at once: `folder:PATH`. One that came `later` is no part
    of a recipe as long as it has its default, so that what was stored before there was such a parameter is still found.
    """

    help: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    positional: bool = False
    later: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a plugin: `kind` is bool, int, float, fraction, str, path, floats, stack or victim."""

    name: str
    kind: str
    default: Any = REQUIRED
    info: Param = Param()
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def describe(self) -> dict[str, Any]:
        """A JSON-ready description, as `advplug list --json` prints it."""
        bounds = {k: getattr(self.info, k) for k in ("ge", "gt", "le", "lt") if getattr(self.info, k) is not None}
        return {
            "name": self.name,
            "type": self.kind,
            "required": self.required,
            "default": None if self.required else plain(self.default),
            "choices": list(self.choices),
            "bounds": bounds,
            "help": self.info.help,
        }


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: fractions and references in their exact text form."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return str(value)


def params_of(factory: Callable[..., Any], skip: frozenset[str] = frozenset()) -> tuple[ParamSpec, ...]:
    """The parameters of `factory`, in the order of its signature.

    What the factory returns may be named under TYPE_CHECKING only, so that it imports no torch. Raises
    PluginError where an annotation cannot be read or is of no supported type.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
        annotated = [(p, _annotation(p, factory)) for p in parameters if p.name not in skip]
    except Exception as error:  # an annotation may be any expression, and is evaluated here
        raise PluginError(f"{_where(factory)}: its signature cannot be read: {error}") from error
    return tuple(_param_spec(p, annotation, factory) for p, annotation in annotated)


def _annotation(parameter: inspect.Parameter, factory: Callable[..., Any]) -> Any:
    text = parameter.annotation
    names = vars(sys.modules[factory.__module__])
    return eval(text, names) if isinstance(text, str) else text  # noqa: S307 - the plugin's own code


def _param_spec(parameter: inspect.Parameter, annotation: Any, factory: Callable[..., Any]) -> ParamSpec:
    info, optional = Param(), False
    choices: tuple[str, ...] = ()
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *extra = typing.get_args(annotation)
        info = next((e for e in extra if isinstance(e, Param)), info)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = len(members) < len(typing.get_args(annotation))
        annotation = members[0] if len(members) == 1 else annotation
    if typing.get_origin(annotation) is Literal:
        choices, annotation = tuple(str(c) for c in typing.get_args(annotation)), str
    kind = "floats" if annotation == tuple[float, ...] else _KINDS.get(annotation)
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise PluginError(f"{_where(factory)}: '{parameter}' cannot be given by name")
    if kind is None:
        shown = "no annotation" if annotation is REQUIRED else f"the unsupported type {annotation!r}"
        raise PluginError(f"{_where(factory)}: parameter '{parameter.name}' has {shown}")
    return ParamSpec(parameter.name.rstrip("_"), kind, parameter.default, info, choices, optional)


def _where(factory: Callable[..., Any]) -> str:
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', factory)}"


def bind(specs: tuple[ParamSpec, ...], reference: Reference, what: str) -> dict[str, Any]:
    """Checks and converts the parameters of `reference`; defaults fill what is not given.

    `what` names the thing in errors (`attack 'pgd'`). Raises UsageError for an unknown, missing or
    repeated parameter and for a value of the wrong type or out of bounds.
    """
    known = {s.name: s for s in specs}
    given: dict[str, str] = {}
    for key, text in reference.params:
        if key == "":
            name = next((s.name for s in specs if s.info.positional), None)
            if name is None:
                hint = f"write {reference.name}:KEY=VALUE" if specs else "it takes no parameters"
                raise UsageError(f"{what} takes no bare value, got '{text}'; {hint}")
        else:
            name = key.replace("-", "_") if key.replace("-", "_") in known else key
        if name not in known:
            listing = "; it takes " + (", ".join(known) or "no parameters")
            raise UsageError(f"{what} has no parameter '{key}'{did_you_mean(key, known) or listing}")
        if name in given:
            raise UsageError(f"{what}: parameter '{name}' is given twice")
        given[name] = text
    bound = {}
    for spec in specs:
        if spec.name in given:
            bound[spec.name] = convert(spec, given[spec.name], what)
        elif spec.required:
            form = f"{reference.name}:{spec.name.upper()}" if spec.info.positional else f"{spec.name}=VALUE"
            raise UsageError(f"{what} needs its parameter '{spec.name}': write {form}")
        else:
            bound[spec.name] = spec.default
    return bound


def convert(spec: ParamSpec, text: str, what: str) -> Any:
    """The typed value of `text`, within the bounds of `spec`."""
    if spec.optional and text.lower() in {"none", "null"}:
        return None
    try:
        value = _CONVERTERS[spec.kind](text)
    except (ValueError, ZeroDivisionError, OverflowError):
        wanted = {"int": "a whole number", "float": "a number", "fraction": "a number or fraction",
                  "bool": "true or false", "floats": "numbers separated by ':'"}.get(spec.kind, spec.kind)  # fmt: skip
        raise UsageError(f"{what}: {spec.name} takes {wanted}, got '{text}'") from None
    if spec.choices and value not in spec.choices:
        hint = did_you_mean(value, spec.choices) or f"; choose from {', '.join(spec.choices)}"
        raise UsageError(f"{what}: {spec.name} cannot be '{text}'{hint}")
    _check_bounds(spec, value, text, what)
    return value


def _check_bounds(spec: ParamSpec, value: Any, text: str, what: str) -> None:
    if isinstance(value, str | Path | Stack | VictimRef | bool):
        return
    info = spec.info
    for v in value if isinstance(value, tuple) else (value,):
        for bound, sign, ok in (
            (info.ge, ">=", info.ge is None or v >= info.ge),
            (info.gt, ">", info.gt is None or v > info.gt),
            (info.le, "<=", info.le is None or v <= info.le),
            (info.lt, "<", info.lt is None or v < info.lt),
        ):
            if not ok:
                raise UsageError(f"{what}: {spec.name} must be {sign} {bound:g}, got {text}")


def _number(text: str) -> float:
    value = float(fraction(text)) if "/" in text else float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def fraction(text: str) -> Fraction:
    """`8/255`, `0.1` or `0.5/255`, exactly. Raises ValueError, or ZeroDivisionError for `8/0`."""
    numerator, slash, denominator = text.partition("/")
    if "/" in denominator or any(abs(int(e)) > _MAX_EXPONENT for e in _EXPONENT.findall(text)):
        raise ValueError(text)  # a power of ten that large would be written out digit by digit
    return Fraction(numerator.strip()) / (Fraction(denominator.strip()) if slash else 1)


def path(text: str) -> Path:
    """A path with `~` and variables such as `$ADVPLUG_DATA` filled in. Raises UsageError for one that is not set."""
    unset = next((name for name in _VARIABLE.findall(text) if name not in os.environ), None)
    if unset is not None:
        raise UsageError(
            f"'{text}': the environment variable {unset} is not set; export {unset}=FOLDER, or write the path"
        )
    return Path(os.path.expandvars(text)).expanduser()


def _bool(text: str) -> bool:
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    raise ValueError(text)


_CONVERTERS: dict[str, Callable[[str], Any]] = {
    "bool": _bool,
    "int": int,
    "float": _number,
    "fraction": fraction,
    "str": str,
    "path": path,
    "floats": lambda text: tuple(_number(t) for t in text.replace(";", ":").split(":")),
    "stack": parse_stack,
    "victim": parse_victim,
}
