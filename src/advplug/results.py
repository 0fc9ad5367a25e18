"""The result of a run as one stable, versioned object: what --json prints and the Python API returns."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from advplug.estimate import Estimate
from advplug.keys import SCHEMA

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Status = Literal["ok", "refused", "failed"]
Verdict = Literal["trusted", "upper bound", "not trustworthy"]
Level = Literal["error", "warn"]


@dataclass(frozen=True)
class Flag:
    """A health check that tripped. `error` makes a number untrustworthy, `warn` asks for a look."""

    name: str
    level: Level
    detail: str


@dataclass(frozen=True)
class Passes:
    """Images sent forward and backward by the attack."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Seconds:
    """Wall time by stage. Training and defending are the victim's, repeated in each of its cells, and 0 where the
    weights came from the cache or were only loaded."""

    train: float = 0.0
    defend: float = 0.0
    attack: float = 0.0
    decide: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One victim under one attack at one budget."""

    key: str
    dataset: str
    model: str
    defense: str
    attack: str
    norm: str
    eps: str
    goal: str
    seed: int
    status: Status
    reason: str | None = None
    flags: tuple[Flag, ...] = ()
    metrics: dict[str, Estimate | None] = field(default_factory=dict)
    passes: Passes | None = None
    seconds: Seconds | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreatRow:
    """A (victim, threat) group: the worst case over its attacks, and how far it can be trusted."""

    dataset: str
    model: str
    defense: str
    norm: str
    eps: str
    goal: str
    seed: int
    attacks: tuple[str, ...]
    clean_accuracy: Estimate | None
    worst_case_accuracy: Estimate | None
    difference_to_baseline: Estimate | None
    verdict: Verdict | None
    flags: tuple[Flag, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """What produced the result."""

    versions: dict[str, str]
    seed: int
    device: str
    command: str
    output: str | None = None


@dataclass(frozen=True)
class RunResult:
    """All cells of a run and their threat groups. `schema` is the version of this layout."""

    run: RunInfo
    cells: tuple[Cell, ...]
    threats: tuple[ThreatRow, ...]
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, as `advplug eval --json` prints them."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"schema": data.pop("schema"), **data}

    @property
    def failed(self) -> tuple[Cell, ...]:
        return tuple(c for c in self.cells if c.status == "failed")


def cell_from_json(data: dict[str, Any]) -> Cell:
    """The inverse of `Cell`'s JSON form. Raises pydantic.ValidationError for anything else."""
    return _cells().validate_python(data)


@functools.cache
def _cells() -> TypeAdapter[Cell]:
    from pydantic import TypeAdapter

    return TypeAdapter(Cell)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `RunResult.to_json()`."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(RunResult).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "advplug result", **schema}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
