"""Plans on their way to another machine: as they were written, bound there anew, so that both must mean the same."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ray.cloudpickle import CloudPickler

from advplug.certificates import CertificatePlan
from advplug.matrix import Sweep
from advplug.parse import parse_reference
from advplug.plans import Bound, VictimPlan, bind
from advplug.poisons.plans import PoisonPlan
from advplug.registry import registry
from advplug.work import AuditPlan, Piece, victims_of

_PLANS = (VictimPlan, Sweep, AuditPlan, CertificatePlan, PoisonPlan)


@dataclass
class Bindings:
    """What references mean in this process: bound once, and the user's own objects, by label."""

    objects: Mapping[tuple[str, str], Bound] = field(default_factory=dict)
    bound: dict[tuple[str, str], Bound] = field(default_factory=dict)


_here = Bindings()


def bindings(objects: Mapping[tuple[str, str], Bound]) -> None:
    """Starts anew: files may be others than before."""
    global _here
    _here = Bindings(objects)


def _object(kind: str, label: str) -> Bound:
    return _here.objects[kind, label]


def _reference(kind: str, label: str) -> Bound:
    if (kind, label) not in _here.bound:
        _here.bound[kind, label] = bind(registry(), kind, parse_reference(label))
    return _here.bound[kind, label]


class _Pickler(CloudPickler):  # type: ignore[misc]
    """Plans lose what they remember of their keys, references what they were bound to."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, Bound):
            if item.entry is None:
                return _object, name_of(item)
            return _reference, (item.entry.kind, item.label)
        if isinstance(item, _PLANS):
            return type(item), tuple(getattr(item, f.name) for f in fields(item))
        return super().reducer_override(item)


def pack(item: Any) -> bytes:
    """Anything, plans in it included; `unpack` gives it back, in a process in which `bindings` has been called."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """Raises UsageError for a reference that means nothing here."""
    return pickle.loads(data)  # noqa: S301 - from this run's own driver


def name_of(bound: Bound) -> tuple[str, str]:
    """How one of the user's own objects is called: what it is, and the label that tells it from others."""
    return "dataset" if hasattr(bound.value, "load") else "model", bound.label


def objects_of(pieces: Iterable[Piece]) -> dict[tuple[str, str], Bound]:
    """The user's own models and data in these plans."""
    found: dict[tuple[str, str], Bound] = {}
    for piece in pieces:
        for plan in victims_of(piece):
            for bound in (plan.dataset, plan.model):
                if bound.entry is None:
                    found[name_of(bound)] = bound
    return found
