"""Certificates: which are planned, what was proven of each image, and the curve that follows. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from advplug.contracts import DatasetInfo, DefenseCaps, Norm
from advplug.estimate import Estimate, rate
from advplug.evidence import Array
from advplug.judging import Refused, judge_victim
from advplug.keys import SCHEMA, digest
from advplug.matrix import Sweep
from advplug.plans import VictimPlan
from advplug.results import Certificate, CertifiedAccuracy
from advplug.stored.columns import packed, unpacked


@dataclass(frozen=True)
class CertificatePlan:
    """The certificate of one victim, whatever attacks it: the budgets in its norm are where it is reported.

    `radii` empty means those that suit the defense.
    """

    victim: VictimPlan
    norm: Norm
    radii: tuple[Fraction, ...]
    limit: int | None
    refused: Refused | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """The radii are no part of it: what is proven of an image answers for each of them."""
        refused = {"refused": str(self.refused)} if self.refused else {}
        return digest({"certificate": self.victim.recipe, "n": self.limit, "schema": SCHEMA, **refused})

    def identity(self) -> dict[str, Any]:
        """The columns that name it."""
        victim = self.victim
        return {
            "dataset": victim.dataset.label,
            "model": victim.model.label,
            "defense": victim.defense_label,
            "norm": self.norm,
            "seed": victim.seed,
        }


def certifying(victim: VictimPlan) -> Norm | None:
    """The norm in which a part of the victim's defense proves its answers, if there is one."""
    caps: Sequence[DefenseCaps] = [d.caps for d in victim.defense]
    return next((c.certifies for c in caps if c.certifies), None)


def planned(sweeps: Sequence[Sweep]) -> list[CertificatePlan]:
    """One plan for each certifying victim of the matrix, in order.

    Where budgets were asked for and none is in the certificate's norm, it is refused.
    """
    victims: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        if certifying(sweep.victim):
            victims.setdefault(sweep.victim.key, []).append(sweep)
    return [_plan(members) for members in victims.values()]


def _plan(members: Sequence[Sweep]) -> CertificatePlan:
    first = members[0]
    norm = certifying(first.victim)
    assert norm is not None
    info: DatasetInfo = first.victim.dataset.value.info()
    radii = tuple(sorted({eps for s in members if s.norm == norm for eps in s.budgets}))
    others = sorted({s.norm for s in members} - {norm})
    notes = (f"it covers changes in {norm}, none in {' or '.join(others)}",) if others else ()
    refused = judge_victim(first.victim, info)
    if refused is None and not radii and any(s.asked for s in members):
        refused = Refused(
            f"it covers changes in {norm}, none in {' or '.join(others)}", f"add budgets, like -e {norm}:0.5"
        )
        notes = ()
    return CertificatePlan(first.victim, norm, radii, first.limit, refused, notes)


@dataclass(frozen=True)
class Proofs:
    """What was proven of `n` images: index, y, label (n,), label -1 where it abstains; radius (n,) in pixel units.

    `error` is the probability with which a proof may be wrong, `radii` are those to report where no budget asks.
    """

    index: Array
    y: Array
    label: Array
    radius: Array
    error: float = 0.0
    radii: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def right(self) -> Array:
        """(n,) bool: answered, and rightly."""
        return np.asarray(self.label == self.y)

    def at(self, radius: float) -> Array:
        """(n,) bool: proven right against every change up to `radius`."""
        return self.right & (self.radius >= radius)

    def to_bytes(self) -> bytes:
        return packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Proofs:
        return unpacked(cls, data)


def reported(
    plan: CertificatePlan, stored: Certificate, proofs: Proofs | None, worst: Mapping[Fraction, Estimate | None]
) -> Certificate:
    """The stored certificate as this run asked for it; `worst` is the worst-case accuracy found by attacks."""
    named: dict[str, Any] = {**plan.identity(), "notes": (*plan.notes, *stored.notes)}
    if proofs is None:
        return replace(stored, **named)
    curve = [
        CertifiedAccuracy(str(radius), _share(proofs.at(float(radius))), worst.get(radius))
        for radius in plan.radii or map(_written, proofs.radii.tolist())
    ]
    return replace(stored, certified_accuracy=tuple(curve), **named)


def measured(proofs: Proofs) -> dict[str, Any]:
    """The figures of a certificate that are no curve."""
    return {
        "clean_accuracy": _share(proofs.right),
        "abstention_rate": _share(proofs.label == -1),
        "average_radius": float(np.where(proofs.right, proofs.radius, 0.0).mean()),
        "failure_probability": proofs.error,
    }


def _share(bits: Array) -> Estimate | None:
    return rate(float(bits.sum()), len(bits))


def _written(radius: float) -> Fraction:
    """The fraction that a number was meant to be: 3/20 for 1.5 times 0.1."""
    return Fraction(radius).limit_denominator(10**6)
