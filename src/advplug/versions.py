"""The versions that a number depends on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

from advplug import __version__
from advplug.registry import registry


@functools.cache
def versions() -> dict[str, str]:
    """By name: advplug, Python, torch and its kin, and every distribution that brings plugins."""
    found = {"advplug": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy"):
        found[name] = importlib.metadata.version(name)
    for source in registry().sources:
        if source.plugin != "builtin":
            found[source.distribution] = source.version
    return found
