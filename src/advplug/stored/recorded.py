"""What is written down of a finished cell, and how a store is read again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from advplug import audit as audits
from advplug.assemble import Stored
from advplug.attacks.precision import chosen
from advplug.build import Built
from advplug.certificates import Proofs
from advplug.estimate import Estimate
from advplug.evidence import Array, ranges
from advplug.health import Audit
from advplug.params import plain
from advplug.plans import VictimPlan
from advplug.poisons.evidence import PoisonEvidence
from advplug.results import Certificate, Poisoning
from advplug.store import Store
from advplug.versions import versions


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def checked_values(values: Mapping[str, Any]) -> dict[str, Estimate | None]:
    """A metric's values, which a plugin may have got wrong. Raises ValueError for what no result can hold."""
    for name, value in values.items():
        numbers = (value.value, value.low, value.high, value.spread) if isinstance(value, Estimate) else ()
        plain_numbers = all(n is None or (isinstance(n, float | int) and math.isfinite(n)) for n in numbers)
        if value is not None and not (numbers and plain_numbers and isinstance(value.n, int)):
            raise ValueError(f"{name} is {value!r}, not None or an Estimate of finite numbers")
    return dict(values)


def stored(store: Store, level: str) -> Stored:
    """How to read `store`; a full audit also answers for a quick one."""

    def audit(key: str) -> Audit | None:
        data = (level != "none" or None) and (store.audit(f"full:{key}") or store.audit(f"quick:{key}"))
        return audits.from_bytes(data) if data else None

    def batch_dependent(key: str) -> bool | None:
        data = store.audit(f"batch:{key}") if level != "none" else None
        return None if data is None else data == b"1"

    def certificate(key: str) -> tuple[Certificate, Proofs | None] | None:
        found = store.certificate(key)
        return (found[0], Proofs.from_bytes(found[1]) if found[1] else None) if found else None

    def poisoning(key: str) -> tuple[Poisoning, PoisonEvidence | None] | None:
        found = store.poisoning(key)
        return (found[0], PoisonEvidence.from_bytes(found[1]) if found[1] else None) if found else None

    return Stored(store.cell, store.evidence, audit, batch_dependent, certificate, poisoning)


def provenance(plan: VictimPlan, built: Built, index: Array) -> dict[str, Any]:
    indices = hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()
    return {
        **plain(plan.recipe),
        "images": {"n": len(index), "indices": ranges(index), "indices_sha256": indices},
        "weights_sha256": built.weights_sha256,
        "facts": plain(built.facts),
        "computed": {"device": str(built.victim.device), "passes": chosen(built.victim.module), "versions": versions()},
    }
