"""The architectures and weights that the installed open_clip knows, read from its files, since it imports torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from advplug.errors import UsageError, did_you_mean


def check_architecture(name: str) -> None:
    """Raises UsageError, with a suggestion, where open_clip has no such architecture."""
    if name not in architectures():
        hint = did_you_mean(name, architectures()) or "; write one such as ViT-B-32"
        raise UsageError(f"open_clip has no architecture called '{name}'{hint}")


def check_tag(architecture: str, tag: str) -> str:
    """The tag as open_clip writes it. Raises UsageError, with a suggestion, where it has no such weights."""
    known = tags(architecture)
    clean = tag.lower().replace("-", "_")
    if clean in known:
        return clean
    others = f"it has {', '.join(known)}, " if known else "it has none, "
    hint = did_you_mean(clean, known) or f"; {others}or write {architecture}@random or {architecture}@FILE"
    raise UsageError(f"open_clip has no weights of {architecture} tagged '{tag}'{hint}")


@cache
def architectures() -> tuple[str, ...]:
    """All names, in order."""
    return tuple(sorted(path.stem for path in (_folder() / "model_configs").glob("*.json")))


def tags(architecture: str) -> tuple[str, ...]:
    """The tags of its pretrained weights."""
    return _tags().get(architecture, ())


@cache
def _tags() -> dict[str, tuple[str, ...]]:
    """By architecture, from `_PRETRAINED = {"NAME": _TAGS, ...}` and `_TAGS = dict(TAG=..., ...)` in pretrained.py.

    Weights trained with QuickGELU are weights of NAME-quickgelu too.
    """
    tables: dict[str, ast.Call] = {}
    found: dict[str, ast.Call] = {}
    for node in ast.parse((_folder() / "pretrained.py").read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        if isinstance(node.value, ast.Call):
            tables[node.targets[0].id] = node.value
        elif isinstance(node.value, ast.Dict) and node.targets[0].id == "_PRETRAINED":
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                table = tables[value.id] if isinstance(value, ast.Name) else value
                if isinstance(key, ast.Constant) and isinstance(table, ast.Call):
                    found[str(key.value)] = table
    named = {name: {k.arg: k.value for k in table.keywords if k.arg} for name, table in found.items()}
    quick = {f"{name}-quickgelu": {t: v for t, v in table.items() if _quick(v)} for name, table in named.items()}
    return {name: tuple(table) for name, table in {**named, **quick}.items() if table}


def _quick(settings: ast.expr) -> bool:
    given = settings.keywords if isinstance(settings, ast.Call) else []
    return any(k.arg == "quick_gelu" and isinstance(k.value, ast.Constant) and bool(k.value.value) for k in given)


def _folder() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UsageError("open_clip is not installed; pip install open_clip_torch")
    return Path(spec.origin).parent
