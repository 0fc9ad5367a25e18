"""What is registered, as text and as JSON, for `list` and `info`. Imports no torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from advplug import hooks
from advplug.contracts import AttackCaps, Caps, PoisonCaps
from advplug.params import ParamSpec
from advplug.perturbations import SETS
from advplug.registry import Entry, Registry


def listing(known: Registry, kind: str | None) -> str:
    """A line a plugin: of one kind, or of all of them."""
    parts = []
    for each in [kind] if kind else list(hooks.KINDS):
        entries = known.entries(each)
        width = max((len(e.name) for e in entries), default=0)
        lines = [f"  {e.name:<{width}}  {e.spec.summary}{_origin(e)}" for e in entries]
        parts.append("\n".join([f"{each}s ({len(entries)})", *lines]))
    return "\n\n".join(parts)


def _origin(entry: Entry) -> str:
    return "" if entry.source.plugin == "builtin" else f"  [{entry.source}]"


def listing_json(known: Registry, kind: str | None) -> str:
    """A list of objects with name, kind, summary, paper, plugin, caps and params."""
    kinds = [kind] if kind else list(hooks.KINDS)
    return json.dumps([e.describe() for each in kinds for e in known.entries(each)], indent=2)


def attacks_markdown(known: Registry) -> str:
    """A Markdown table of all attacks on images: name, backend, norms, access, goals, paper."""

    def columns(caps: Caps) -> tuple[str, ...] | None:
        if not isinstance(caps, AttackCaps):
            return None
        norms = ", ".join(n for n in SETS if n in caps.norms) + (" (smallest change)" if caps.minimum_norm else "")
        return norms, str(caps.access), ", ".join(sorted(caps.goals))

    return _markdown(known, ("norms", "access", "goals"), columns)


def poisons_markdown(known: Registry) -> str:
    """A Markdown table of all attacks on training sets: name, backend, models, labels, paper."""
    kinds = {"image": "classifiers", "image-text": "CLIP models"}

    def columns(caps: Caps) -> tuple[str, ...] | None:
        if not isinstance(caps, PoisonCaps):
            return None
        models = " and ".join(kinds[m] for m in sorted(caps.modalities))
        return models, "stay true" if caps.clean_label else "may change"

    return _markdown(known, ("poisons the data of", "labels"), columns)


def _markdown(known: Registry, headings: Sequence[str], columns: Callable[[Caps], tuple[str, ...] | None]) -> str:
    """The attacks for which `columns` gives something, in the columns of these headings."""
    header = ("attack", "from", *headings, "what it is", "paper")
    rows = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for entry in known.entries("attack"):
        own = columns(entry.spec.caps)
        if own is not None:
            told = (text.replace("|", "\\|") for text in (entry.spec.summary, entry.spec.paper))
            rows.append(f"| {' | '.join((f'`{entry.name}`', entry.source.distribution, *own, *told))} |")
    return "\n".join(rows)


def description_json(entry: Entry) -> str:
    return json.dumps(entry.describe(), indent=2)


def description(entry: Entry) -> str:
    """Everything a user has to know of one plugin."""
    lines = [f"{entry.name}: {entry.spec.summary}", f"  {entry.kind} from {entry.source}"]
    if entry.spec.paper:
        lines.append(f"  paper: {entry.spec.paper}")
    caps = entry.describe()["caps"]
    lines += [f"  {name.replace('_', ' ')}: {_shown(value)}" for name, value in caps.items() if value not in (None, [])]
    params = entry.params()
    if isinstance(entry.spec.caps, AttackCaps):
        lines.append(
            "  any attack may say its threat, for example eps=8/255, norm=linf, target=next|random|least-likely|CLASS"
        )
    lines.append("")
    lines += ["parameters:"] if params else ["no parameters"]
    for p in params:
        lines += _parameter(p)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parameter(p: ParamSpec) -> list[str]:
    told = p.describe()
    kind = " | ".join(p.choices) if p.choices else p.kind
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = " and ".join(f"{signs[k]} {v:g}" for k, v in told["bounds"].items())
    default = "required" if p.required else f"default {told['default']}"
    head = f"  {p.name}  ({', '.join(x for x in (kind, bounds, default) if x)})"
    return [head, *textwrap.wrap(p.info.help, 92, initial_indent="      ", subsequent_indent="      ")]


def cache_listing() -> str:
    """A line a cached artifact: label, size, when it was made."""
    from advplug.artifacts import Artifacts

    entries = Artifacts().ls()
    lines = [f"{e.label}  {e.bytes / 1e6:.1f} MB  {e.made}" for e in entries]
    return "\n".join(lines) if lines else "the cache is empty"
