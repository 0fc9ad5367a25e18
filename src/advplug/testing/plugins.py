"""Conformance of a whole plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from advplug.errors import PluginError, UsageError, did_you_mean
from advplug.parse import Reference
from advplug.registry import Entry, Registry, Source, registry
from advplug.testing.report import Result

_LIST = """
import json, sys
from advplug.registry import registry
found = registry()
for kind in found.tables:
    for entry in found.entries(kind):
        if entry.source.plugin == sys.argv[1]:
            entry.describe()
heavy = [m for m in ("torch", "torchvision", "sklearn") if m in sys.modules]
print(json.dumps(heavy))
"""


def plugin_results(name: str) -> list[Result]:
    """Loading, listing without torch, and every registration with default parameters. Raises UsageError."""
    found = registry()
    source, reason = _find(found, name)
    if reason is not None:
        return [Result(f"{name}: loads", False, reason)]
    results = [Result(f"{name}: loads", True), _lists_without_torch(found, source)]
    clashes = [found.duplicate_reason(*key) for key, sources in found.duplicates.items() if source in sources]
    results += [Result(f"{name}: names", False, clash) for clash in clashes]
    entries = [e for kind in found.tables for e in found.entries(kind) if e.source == source]
    for entry in entries:
        results += [r._replace(name=f"{entry.label}: {r.name}") for r in entry_results(entry)]
    return results


def entry_results(entry: Entry) -> list[Result]:
    """The checks of one registration, with default parameters; what needs parameters stays unchecked."""
    try:
        required = [p.name for p in entry.params() if p.required and p.kind != "victim"]
    except UsageError as error:
        return [Result("parameters", False, str(error))]
    silent = [p.name for p in entry.params() if not p.info.help]
    results = [Result("parameters", not silent, f"no help for {', '.join(silent)}" if silent else "")]
    if required:
        call = f"advplug.testing.check_{entry.kind}('{entry.name}', {required[0]}=...)"
        return [*results, Result("behaviour", None, f"it needs {', '.join(required)}; call {call}")]
    if entry.kind == "tracker":
        call = f"advplug.testing.check_tracker('{entry.name}', ...)"
        return [*results, Result("behaviour", None, f"it keeps what it gets; call {call} with a place for tests")]
    # The kit puts victims of its own in the place of those that a reference names.
    victims = {p.name: "cnn" for p in entry.params() if p.required}
    if entry.kind != "attack" and not victims:
        try:
            entry.make(entry.bind(Reference(entry.name)))
        except PluginError:
            pass  # a check below says it
        except UsageError as error:
            return [*results, Result("behaviour", None, f"not with default parameters: {error}")]
    return results + _behaviour(entry, victims)


def _behaviour(entry: Entry, params: dict[str, str]) -> list[Result]:
    # Torch is imported here: a plugin that is unknown or broken is called so at once.
    from advplug.testing import attacks, defenses, metrics, sources

    checks: dict[str, Callable[[], list[Result]]] = {
        "attack": lambda: attacks.attack_results(entry.name, params),
        "defense": lambda: defenses.defense_results(entry.name, params, on="cnn", clean_drop=0.1),
        "model": lambda: sources.model_results(entry.name, params, on="digits"),
        "dataset": lambda: sources.dataset_results(entry.name, params),
        "metric": lambda: metrics.metric_results(entry.name, params),
    }
    return checks[entry.kind]()


def _find(found: Registry, name: str) -> tuple[Source, str | None]:
    """The plugin's source, and why it is broken if it is."""
    for lost in found.broken:
        if name in (lost.source.plugin, lost.source.distribution):
            return lost.source, lost.reason
    for source in found.sources:
        if name in (source.plugin, source.distribution):
            return source, None
    known = [s.plugin for s in (*found.sources, *(b.source for b in found.broken))]
    raise UsageError(
        f"no installed plugin is called '{name}'{did_you_mean(name, known)}; installed: {', '.join(known)}"
    )


def _lists_without_torch(found: Registry, source: Source) -> Result:
    """In a fresh process, with the other plugins left out, so that the culprit is known."""
    others = {s.plugin for s in (*found.sources, *(b.source for b in found.broken))} - {source.plugin, "builtin"}
    environment: dict[str, Any] = {**os.environ, "ADVPLUG_DISABLE_PLUGINS": ",".join(sorted(others))}
    ran = subprocess.run(  # noqa: S603 - this interpreter, our own code
        [sys.executable, "-c", _LIST, source.plugin], capture_output=True, text=True, env=environment, check=False
    )
    label = f"{source.plugin}: lists without torch"
    if ran.returncode:
        return Result(label, False, (ran.stderr.strip().splitlines() or ["listing failed"])[-1])
    heavy = json.loads(ran.stdout.strip().splitlines()[-1])
    text = f"listing imports {', '.join(heavy)}: import it inside the factories, or in a module that they import"
    return Result(label, not heavy, text if heavy else "")
