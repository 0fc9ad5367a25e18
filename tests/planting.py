"""Factories registered for one test, so that the conformance kit can be tried on faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from advplug.contracts import Spec
from advplug.registry import Entry, Source, load_target, registry

numbers = itertools.count()
_planted: dict[str, Callable[..., Any]] = {}


def planter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function (kind, caps, factory) that registers the factory under a fresh name, beside everything else."""

    def register(kind: str, caps: Any, factory: Callable[..., Any]) -> str:
        name = f"planted-{next(numbers)}"
        spec = Spec(name, f"planted:{name}", caps, "planted", params=())
        entry = Entry(kind, spec, Source("planted", "planted", "1"))
        known = registry()
        tables = {**known.tables, kind: MappingProxyType({**known.tables[kind], name: entry})}
        grown = replace(known, tables=MappingProxyType(tables))
        _planted[f"planted:{name}"] = factory
        for module in ("attacks", "defenses", "sources", "metrics"):
            monkeypatch.setattr(f"advplug.testing.{module}.registry", lambda: grown)
        return name

    def load(target: str, label: str) -> Any:
        return _planted.get(target) or load_target(target, label)

    monkeypatch.setattr("advplug.registry.load_target", load)
    return register


def breaches(check: Callable[..., Any], name: str, **more: Any) -> str:
    """The text of the failure; empty if there is none."""
    try:
        check(name, **more)
    except AssertionError as error:
        return str(error)
    return ""
