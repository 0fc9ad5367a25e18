"""How a launcher started this process: alone or with others, in which precision. Imports no torch.

`accelerate launch` and `torchrun` tell it in environment variables, `accelerate launch` the precision, too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from advplug.errors import UsageError

ACCELERATE = "accelerate"
_PLAIN, _BF16 = "no", "bf16"
TRAINED_BY = "trained_by"


@dataclass(frozen=True)
class Launch:
    """`processes` train together, in `precision`: no (float32) or bf16."""

    processes: int = 1
    precision: str = _PLAIN


_asked: ContextVar[Launch | None] = ContextVar("launch", default=None)


def launched() -> Launch:
    """What the launcher says. Raises UsageError for a precision that is not supported."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or _PLAIN
    if precision not in (_PLAIN, _BF16):
        raise UsageError(f"networks are trained in float32 or bf16, not in {precision}; use --mixed_precision bf16")
    return Launch(_processes(), precision)


def _processes() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    # Schedulers set single variables of these, launchers all.
    together = text.isdecimal() and {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
    return int(text) if together else 1


@contextmanager
def asked_for(train_with: str | None) -> Iterator[None]:
    """Inside, networks are trained as asked for. Raises UsageError where that cannot be."""
    if train_with is None:
        if _processes() > 1:
            raise UsageError(
                f"a launcher started {_processes()} processes of this; add --train-with accelerate to train with all "
                "of them, or start it once"
            )
        yield
        return
    if train_with != ACCELERATE:
        raise UsageError(f"training can be spread with {ACCELERATE}, not with '{train_with}'")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("Accelerate is not installed; pip install 'advplug[accelerate]', or leave --train-with out")
    token = _asked.set(launched())
    try:
        yield
    finally:
        _asked.reset(token)


def helps() -> bool:
    """Whether this process only helps to train, and leaves all else to the main one."""
    found = _asked.get()
    return found is not None and found.processes > 1 and os.environ.get("RANK") != "0"


def asked() -> Launch | None:
    """How networks are to be trained; None for as always."""
    return _asked.get()


def recipe() -> dict[str, Any]:
    """What trained weights depend on of it; empty where they are those of a plain run."""
    found = _asked.get()
    return {} if found is None or found == Launch() else {TRAINED_BY: asdict(found)}


def without(recipe: Any) -> Any:
    """The recipe of a plain run: what is drawn while training does not depend on who trains."""
    if isinstance(recipe, Mapping):
        return {name: without(value) for name, value in recipe.items() if name != TRAINED_BY}
    return [without(value) for value in recipe] if isinstance(recipe, list | tuple) else recipe
