"""advplug: how robust is this vision model, and does this defense help?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["evaluate", "hookimpl"]

if TYPE_CHECKING:
    from advplug.api import evaluate
    from advplug.hooks import hookimpl


def __getattr__(name: str) -> Any:
    # Resolved on first use: the command line answers --help without importing any of it.
    if name == "evaluate":
        from advplug.api import evaluate

        return evaluate
    if name == "hookimpl":
        from advplug.hooks import hookimpl

        return hookimpl
    raise AttributeError(f"module 'advplug' has no attribute '{name}'")
