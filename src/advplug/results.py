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
Level = Literal["error", "warn", "info"]


@dataclass(frozen=True)
class Flag:
    """A health check that tripped. `error` makes a number untrustworthy, `warn` at best an upper bound; `info` leaves
    the verdict alone."""

    name: str
    level: Level
    detail: str


@dataclass(frozen=True)
class Passes:
    """Images sent forward and backward by the attack; `model` are those that passed through the module itself, which
    a voting defense asks many times an image."""

    forward: int = 0
    backward: int = 0
    model: int = 0


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
    """One victim under one attack at one budget; `draws` is how many fresh decisions each image was given. `shape` is
    what the changes that are allowed depend on beside norm and budget, as `shift=0,angle=30,scale=0`; often nothing."""

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
    draws: int | None = None
    passes: Passes | None = None
    seconds: Seconds | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    shape: str = ""


@dataclass(frozen=True)
class AuditCost:
    """What the audit of a group looked at: `quick` or `full`, images, and images sent forward and backward."""

    level: str
    images: int
    forward: int
    backward: int


@dataclass(frozen=True)
class ThreatRow:
    """A (victim, threat) group: the worst case over its attacks, and how far it can be trusted.

    Where similarities of images and their own texts are minimised there is no accuracy but `worst_case_similarity`;
    the difference is one of similarities, and `recovery` is the share of what the attacks take from the undefended
    model that the defense keeps: (defended - undefended) / (undefended clean - undefended), `static_recovery` that
    under images crafted on the undefended model.
    """

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
    audit: AuditCost | None = None
    clean_similarity: Estimate | None = None
    worst_case_similarity: Estimate | None = None
    recovery: float | None = None
    static_recovery: float | None = None
    shape: str = ""


@dataclass(frozen=True)
class CertifiedAccuracy:
    """At one radius, as text like a budget: the share of images that no change up to it can break, by proof, beside
    the worst case that attacks found there, where any were run."""

    radius: str
    certified_accuracy: Estimate | None
    worst_case_accuracy: Estimate | None


@dataclass(frozen=True)
class Certificate:
    """What is proven of one victim, in one norm.

    `clean_accuracy` is over images answered and right, `abstention_rate` over those not answered, `average_radius`
    over all images, 0 for those not proven right, in pixel units. `failure_probability` is that of each image's proof.
    """

    key: str
    dataset: str
    model: str
    defense: str
    norm: str
    seed: int
    status: Status
    reason: str | None = None
    clean_accuracy: Estimate | None = None
    abstention_rate: Estimate | None = None
    average_radius: float | None = None
    failure_probability: float | None = None
    certified_accuracy: tuple[CertifiedAccuracy, ...] = ()
    passes: Passes | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Poisoning:
    """One victim whose training set was attacked.

    `metrics` are clean_accuracy, attack_success_rate (triggered images whose true class is not the one wanted),
    triggered_accuracy (on true classes), poison_success_rate (of the targets), and what the same model trained on
    clean data does on the same images: clean_model_accuracy, clean_model_success_rate,
    clean_model_poison_success_rate. `differences` are paired, to the undefended model. `poisons` of `training_images`
    were added or changed.
    """

    key: str
    dataset: str
    model: str
    defense: str
    attack: str
    seed: int
    status: Status
    reason: str | None = None
    metrics: dict[str, Estimate | None] = field(default_factory=dict)
    differences: dict[str, Estimate | None] = field(default_factory=dict)
    poisons: int | None = None
    training_images: int | None = None
    verdict: Verdict | None = None
    flags: tuple[Flag, ...] = ()
    draws: int | None = None
    seconds: Seconds | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeakCheck:
    """None of `evaluation` images of a dataset were found among its `train` images, all of them; a run that finds one
    ends there. `unchecked` says what could not be compared."""

    dataset: str
    train: int
    evaluation: int
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """What produced the result. `seeds` are all that were asked for, `seed` is the first of them. `passes` and
    `seconds` are what the last run spent: images sent through models forward and backward, trainings aside, and wall
    time. `names` are what a matrix file calls references, by the reference; `leakage` is what was compared first, where
    that was asked for."""

    versions: dict[str, str]
    seed: int
    device: str
    command: str
    output: str | None = None
    seeds: tuple[int, ...] = ()
    passes: int = 0
    seconds: float = 0.0
    names: dict[str, str] = field(default_factory=dict)
    leakage: tuple[LeakCheck, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """All cells of a run, their threat groups, certificates and attacks on training data.

    `schema` is the version of this layout.
    """

    run: RunInfo
    cells: tuple[Cell, ...]
    threats: tuple[ThreatRow, ...]
    certificates: tuple[Certificate, ...] = ()
    poisonings: tuple[Poisoning, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, as `advplug eval --json` prints them."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"schema": data.pop("schema"), **data}

    @property
    def done(self) -> tuple[Cell | Certificate | Poisoning, ...]:
        """Whatever has a status."""
        return (*self.cells, *self.certificates, *self.poisonings)

    @property
    def failed(self) -> tuple[Cell | Certificate | Poisoning, ...]:
        return tuple(c for c in self.done if c.status == "failed")


def cell_from_json(data: dict[str, Any]) -> Cell:
    """The inverse of `Cell`'s JSON form. Raises pydantic.ValidationError for anything else."""
    made: Cell = _adapter(Cell).validate_python(data)
    return made


def certificate_from_json(data: dict[str, Any]) -> Certificate:
    """The inverse of `Certificate`'s JSON form. Raises pydantic.ValidationError for anything else."""
    made: Certificate = _adapter(Certificate).validate_python(data)
    return made


def poisoning_from_json(data: dict[str, Any]) -> Poisoning:
    """The inverse of `Poisoning`'s JSON form. Raises pydantic.ValidationError for anything else."""
    made: Poisoning = _adapter(Poisoning).validate_python(data)
    return made


def threat_from_json(data: dict[str, Any]) -> ThreatRow:
    """The inverse of `ThreatRow`'s JSON form. Raises pydantic.ValidationError for anything else."""
    made: ThreatRow = _adapter(ThreatRow).validate_python(data)
    return made


def run_from_json(data: dict[str, Any]) -> RunInfo:
    """The inverse of `RunInfo`'s JSON form. Raises pydantic.ValidationError for anything else."""
    made: RunInfo = _adapter(RunInfo).validate_python(data)
    return made


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


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
