"""Entry points to read-only tables of plugins. Nothing here imports torch; a broken plugin disables only itself."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import keyword
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pluggy

from advplug import contracts, hooks
from advplug.errors import PluginError, UnknownNameError, UsageError, did_you_mean
from advplug.params import ParamSpec, bind, params_of, plain
from advplug.parse import Reference, VictimRef

CAPS = {
    "attack": contracts.AttackCaps,
    "defense": contracts.DefenseCaps,
    "model": contracts.ModelCaps,
    "dataset": contracts.DatasetCaps,
    "metric": contracts.MetricCaps,
}


@dataclass(frozen=True)
class Source:
    """The plugin that a registration comes from: entry-point name, distribution and version."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.distribution else self.plugin


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be used, and why, in one line."""

    source: Source
    reason: str


@dataclass(frozen=True)
class Entry:
    """A spec with where it comes from."""

    kind: str
    spec: contracts.Spec
    source: Source

    @property
    def name(self) -> str:
        return self.spec.name

    def params(self) -> tuple[ParamSpec, ...]:
        """The typed parameters, read from the factory's signature where the spec states none."""
        if self.spec.params is not None:
            return self.spec.params
        implied = frozenset(self.spec.needs({})) if self.spec.needs else frozenset()
        return _params(self.spec.target, self.label, implied)

    @property
    def label(self) -> str:
        return f"{self.kind} '{self.name}'"

    def bind(self, reference: Reference) -> dict[str, Any]:
        """The checked parameters of `reference`, defaults filled in. Raises UsageError."""
        return bind(self.params(), reference, self.label)

    def needs(self, bound: Mapping[str, Any]) -> dict[str, VictimRef]:
        """The further victims this thing has to be given, by keyword."""
        wanted = {k: v for k, v in bound.items() if isinstance(v, VictimRef)}
        if self.spec.needs is not None:
            wanted |= self.spec.needs(bound)
        return wanted

    def make(self, bound: Mapping[str, Any], **resolved: Any) -> Any:
        """Calls the factory. `resolved` stand in for the victims named by `needs`."""
        arguments = {**bound, **resolved}
        factory = load_target(self.spec.target, self.label)
        return factory(**{k + "_" if keyword.iskeyword(k) else k: v for k, v in arguments.items()})

    def describe(self) -> dict[str, Any]:
        """A JSON-ready description."""
        caps = {
            name: sorted(value) if isinstance(value, frozenset) else plain(value)
            for name, value in vars(self.spec.caps).items()
        }
        if isinstance(self.spec.caps, contracts.AttackCaps):
            caps["strength"] = self.spec.caps.strength.name.lower().replace("_", "-")
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.spec.summary,
            "paper": self.spec.paper,
            "plugin": str(self.source),
            "caps": caps,
            "params": [p.describe() for p in self.params()],
        }


@functools.cache
def _params(target: str, label: str, implied: frozenset[str]) -> tuple[ParamSpec, ...]:
    return params_of(load_target(target, label), skip=implied)


def load_target(target: str, label: str) -> Any:
    """Imports `module:attribute`. Raises PluginError where that fails."""
    module, _, attribute = target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{label} cannot be loaded from {target}: {error}") from error


@dataclass(frozen=True)
class Registry:
    """All registrations, by kind and name; duplicated names are kept apart and refused on use."""

    tables: Mapping[str, Mapping[str, Entry]]
    duplicates: Mapping[tuple[str, str], tuple[Source, ...]]
    broken: tuple[Broken, ...]
    sources: tuple[Source, ...]

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name. Raises UnknownNameError with a suggestion, or PluginError for a duplicate."""
        if (kind, name) in self.duplicates:
            raise PluginError(self.duplicate_reason(kind, name))
        table = self.tables[kind]
        if name in table:
            return table[name]
        hint = did_you_mean(name, table) or f"; 'advplug list {kind}s' shows the {len(table)} there are"
        lost = f" (plugins that failed to load: {', '.join(b.source.plugin for b in self.broken)}; see advplug doctor)"
        raise UnknownNameError(f"no {kind} is called '{name}'{hint}{lost if self.broken else ''}")

    def duplicate_reason(self, kind: str, name: str) -> str:
        sources = self.duplicates[kind, name]
        return (
            f"{kind} '{name}' is registered twice, by {' and '.join(map(str, sources))}; uninstall one of them or "
            f"set ADVPLUG_DISABLE_PLUGINS={sources[-1].plugin}"
        )

    def entries(self, kind: str) -> list[Entry]:
        """Everything of one kind, by name."""
        return sorted(self.tables[kind].values(), key=lambda e: e.name)


@functools.cache
def registry() -> Registry:
    """The process-wide registry: the built-ins and every installed plugin, loaded once."""
    return load(_installed(), disabled=frozenset(os.environ.get("ADVPLUG_DISABLE_PLUGINS", "").split(",")))


def _installed() -> list[tuple[Source, Any]]:
    """(source, entry point) of every distribution that declares the group, in a fixed order."""
    found = {}
    for distribution in importlib.metadata.distributions():
        for point in distribution.entry_points:
            if point.group == hooks.GROUP:
                source = Source(point.name, distribution.metadata["Name"], distribution.version)
                found[source] = point
    return sorted(found.items(), key=lambda item: (item[0].distribution, item[0].plugin))


def load(points: list[tuple[Source, Any]], disabled: frozenset[str] = frozenset()) -> Registry:
    """Loads `points` after the built-ins; what fails is kept in `broken` with its reason."""
    from advplug import __version__, builtin

    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks.Hooks)
    core = Source("builtin", "advplug", __version__)
    loaded: list[tuple[Source, Any]] = [(core, builtin)]
    broken: list[Broken] = []
    for source, point in points:
        if source.plugin in disabled:
            continue
        try:
            loaded.append((source, point.load()))
        except Exception as error:  # a plugin may raise anything on import
            broken.append(Broken(source, _one_line(error)))
    tables: dict[str, dict[str, Entry]] = {kind: {} for kind in hooks.KINDS}
    duplicates: dict[tuple[str, str], tuple[Source, ...]] = {}
    good = []
    for source, plugin in loaded:
        try:
            manager.register(plugin, name=f"{source.distribution}:{source.plugin}")
            manager.check_pending()
            entries = _entries(manager, plugin, source)
        except Exception as error:  # likewise when its hooks are called
            broken.append(Broken(source, _one_line(error)))
            continue
        good.append(source)
        for entry in entries:
            first = tables[entry.kind].setdefault(entry.name, entry)
            if first is not entry:
                duplicates[entry.kind, entry.name] = (
                    *duplicates.get((entry.kind, entry.name), (first.source,)),
                    source,
                )
    frozen = MappingProxyType({kind: MappingProxyType(table) for kind, table in tables.items()})
    return Registry(frozen, MappingProxyType(duplicates), tuple(broken), tuple(good))


def _entries(manager: pluggy.PluginManager, plugin: Any, source: Source) -> list[Entry]:
    entries = []
    for caller in manager.get_hookcallers(plugin) or ():
        kind = next((k for k, hook in hooks.KINDS.items() if hook == caller.name), None)
        implementation = next(i for i in caller.get_hookimpls() if i.plugin is plugin)
        for spec in implementation.function() if kind else ():
            if not isinstance(spec, contracts.Spec) or not isinstance(spec.caps, CAPS[str(kind)]):
                raise PluginError(f"{caller.name} must return Spec values with {CAPS[str(kind)].__name__}")
            if ":" not in spec.target or not Reference(spec.name).name:
                raise PluginError(f"{kind} '{spec.name}': target '{spec.target}' is not 'module:factory'")
            entries.append(Entry(str(kind), spec, source))
    return entries


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reject_unknown_kind(kind: str) -> str:
    """`attacks` or `attack` to `attack`. Raises UsageError for anything else."""
    single = kind.removesuffix("s")
    if single not in hooks.KINDS:
        known = [k + "s" for k in hooks.KINDS]
        raise UsageError(f"'{kind}' is no kind of plugin{did_you_mean(kind, known)}; kinds: {', '.join(known)}")
    return single
