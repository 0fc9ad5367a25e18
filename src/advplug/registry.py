"""Entry points to read-only tables of plugins, without torch; a broken plugin disables only itself."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import keyword
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pluggy

from advplug import contracts, hooks
from advplug.errors import PluginError, UnknownNameError, UsageError, did_you_mean
from advplug.params import ParamSpec, bind, params_of, plain
from advplug.parse import Reference, VictimRef, is_name

CAPS: dict[str, tuple[type[contracts.Caps], ...]] = {
    "attack": (contracts.AttackCaps, contracts.PoisonCaps),
    "defense": (contracts.DefenseCaps,),
    "model": (contracts.ModelCaps,),
    "dataset": (contracts.DatasetCaps,),
    "metric": (contracts.MetricCaps,),
    "tracker": (contracts.TrackerCaps,),
}

RESERVED = frozenset({"none", "model"})  # the empty stack; the attacked model inside a reference


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
    except (Exception, SystemExit) as error:  # a module may raise anything on import
        raise PluginError(f"{label} cannot be loaded from {target}: {_one_line(error)}") from error


def _as_file(kind: str, name: str) -> str:
    """How the model or dataset is written, where the name is that of a file or folder; otherwise an empty string."""
    suffix = Path(name).suffix
    if kind == "model" and suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        return f"; weights in a file are file:{name}#arch=NAME, or py:MODULE:FACTORY,weights={name}"
    if kind == "model" and (suffix == ".py" or Path(f"{name}.py").is_file()):
        return f"; a network in your own code is py:{name.removesuffix('.py')}:FACTORY"
    if kind == "dataset" and suffix == ".npz":
        return f"; arrays in a file are npz:{name}"
    if kind == "dataset" and Path(name).is_dir():
        return f"; a folder of images is folder:{name}"
    return ""


@dataclass(frozen=True)
class Registry:
    """All registrations, by kind and name; duplicated names are kept apart and refused on use."""

    tables: Mapping[str, Mapping[str, Entry]]
    duplicates: Mapping[tuple[str, str], tuple[Source, ...]]
    broken: tuple[Broken, ...]
    sources: tuple[Source, ...]

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name. Raises UnknownNameError with a suggestion, PluginError for a duplicate."""
        if (kind, name) in self.duplicates:
            raise PluginError(self.duplicate_reason(kind, name))
        table = self.tables[kind]
        if name in table:
            return table[name]
        hint = _as_file(kind, name) or did_you_mean(name, table)
        hint = hint or f"; 'advplug list {kind}s' shows the {len(table)} there are"
        lost = ", ".join(b.source.plugin for b in self.broken)
        lost = lost and f" (plugins that failed to load: {lost}; see advplug doctor)"
        raise UnknownNameError(f"no {kind} is called '{name}'{hint}{lost}")

    def duplicate_reason(self, kind: str, name: str) -> str:
        sources = self.duplicates[kind, name]
        names = sorted({str(s) for s in sources})
        times = "twice" if len(sources) == 2 else f"{len(sources)} times"
        if len(names) == 1:
            return f"{kind} '{name}' is registered {times} by {names[0]}; report this to its authors"
        return (
            f"{kind} '{name}' is registered {times}, by {', '.join(names[:-1])} and {names[-1]}; "
            f"uninstall all but one, or leave one out: ADVPLUG_DISABLE_PLUGINS={sources[-1].plugin}"
        )

    def entries(self, kind: str) -> list[Entry]:
        """Everything of one kind, by name."""
        return sorted(self.tables[kind].values(), key=lambda e: e.name)


@functools.cache
def registry() -> Registry:
    """The process-wide registry: the built-ins and every installed plugin, loaded once."""
    return load(_installed(), disabled=_disabled())


def _disabled() -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get("ADVPLUG_DISABLE_PLUGINS", "").split(","))


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

    core = Source("builtin", "advplug", __version__)
    loaded: list[tuple[Source, Any]] = [(core, builtin)]
    broken: list[Broken] = []
    entries: list[Entry] = []
    good: list[Source] = []
    for source, point in points:
        if source.plugin in disabled:
            continue
        try:
            loaded.append((source, point.load()))
        except (Exception, SystemExit) as error:  # a plugin may raise anything on import
            broken.append(Broken(source, _one_line(error)))
    seen: dict[int, Source] = {}
    for source, plugin in loaded:
        try:
            if id(plugin) in seen:
                raise PluginError(f"it is the same module as the plugin '{seen[id(plugin)].plugin}'")
            entries += _entries(plugin, source)
        except (Exception, SystemExit) as error:  # likewise when its hooks are called
            broken.append(Broken(source, _one_line(error)))
            continue
        seen[id(plugin)] = source
        good.append(source)
    return _tabulate(entries, broken, good)


def _tabulate(entries: list[Entry], broken: list[Broken], good: list[Source]) -> Registry:
    named: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        named.setdefault((entry.kind, entry.name), []).append(entry)
    tables: dict[str, dict[str, Entry]] = {kind: {} for kind in hooks.KINDS}
    for (kind, name), same in named.items():
        if len(same) == 1:
            tables[kind][name] = same[0]
    duplicates = {key: tuple(e.source for e in same) for key, same in named.items() if len(same) > 1}
    frozen = MappingProxyType({kind: MappingProxyType(table) for kind, table in tables.items()})
    return Registry(frozen, MappingProxyType(duplicates), tuple(broken), tuple(good))


def _entries(plugin: Any, source: Source) -> list[Entry]:
    # A manager of its own: a plugin whose hooks pluggy refuses would otherwise spoil the next one's check.
    manager = pluggy.PluginManager(hooks.GROUP)
    manager.add_hookspecs(hooks.Hooks)
    manager.register(plugin)
    manager.check_pending()
    callers = manager.get_hookcallers(plugin)
    if not callers:
        raise PluginError("it implements no hook; the hooks are " + ", ".join(hooks.KINDS.values()))
    entries = []
    for caller in callers:
        kind = next(k for k, hook in hooks.KINDS.items() if hook == caller.name)
        specs = caller.get_hookimpls()[0].function()
        if not isinstance(specs, list | tuple):
            raise PluginError(f"{caller.name} must return a list of Spec, it returned {type(specs).__name__}")
        entries += [Entry(kind, _checked(spec, kind, caller.name), source) for spec in specs]
    return entries


def _checked(spec: Any, kind: str, hook: str) -> contracts.Spec:
    if not isinstance(spec, contracts.Spec) or not isinstance(spec.caps, CAPS[kind]):
        raise PluginError(f"{hook} must return Spec values with {' or '.join(c.__name__ for c in CAPS[kind])}")
    if not is_name(spec.name) or spec.name in RESERVED:
        raise PluginError(f"{hook}: '{spec.name}' is no name; letters, digits and '. _ -' make one")
    module, _, attribute = str(spec.target).partition(":")
    if not module or not attribute:
        raise PluginError(f"{kind} '{spec.name}': target '{spec.target}' is not 'module:factory'")
    return spec


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
