"""timm's models: which there are, read from its files since it imports torch."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from advplug.errors import UsageError, did_you_mean

_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
_SET = re.compile(r"in1k|in12k|in2[12]k")


def check_architecture(name: str) -> None:
    """Raises UsageError, with a suggestion, where timm has no such model."""
    if not re.fullmatch(r"\w+", name) or not _has(name):
        hint = did_you_mean(name, architectures()) or "; write one such as resnet18@a1_in1k"
        raise UsageError(f"timm has no model called '{name}'{hint}")


def answers_imagenet(tag: str) -> bool:
    """Whether weights of that tag answer with ImageNet's 1000 classes: named last, as in `fb_in22k_ft_in1k`."""
    sets = _SET.findall(tag)
    return bool(sets) and sets[-1] == "in1k"


@cache
def architectures() -> tuple[str, ...]:
    """All names, in order."""
    return tuple(sorted(name for path in _files() for name in _REGISTERED.findall(path.read_text("utf-8"))))


def _has(name: str) -> bool:
    wanted = f"def {name}(".encode()
    texts = (text for path in _files() if wanted in (text := path.read_bytes()))
    return any(name in _REGISTERED.findall(text.decode()) for text in texts)


def _files() -> list[Path]:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise UsageError("timm is not installed; pip install timm")
    return sorted((Path(spec.origin).parent / "models").glob("*.py"))
