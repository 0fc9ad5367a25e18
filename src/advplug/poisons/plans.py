"""Attacks on training data: which are planned, and what is reported of them. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from advplug.contracts import DatasetInfo, PoisonCaps, VictimRef
from advplug.health.poisons import Look, examined
from advplug.judging import Refused, judge_poison
from advplug.keys import POISONINGS, SCHEMA, digest
from advplug.matrix import Axes
from advplug.parse import Reference
from advplug.plans import Bound, VictimPlan, bind, bind_stack
from advplug.poisons.evidence import PoisonEvidence, differences
from advplug.registry import Registry
from advplug.results import Poisoning


@dataclass(frozen=True)
class PoisonPlan:
    """A victim whose training set is attacked, judged on `limit` test images."""

    victim: VictimPlan
    limit: int | None
    refused: Refused | None = None

    @cached_property
    def key(self) -> str:
        refused = {"refused": str(self.refused)} if self.refused else {}
        return digest({"poisoning": self.victim.recipe, "n": self.limit, "schema": [SCHEMA, POISONINGS], **refused})

    @property
    def attack(self) -> Bound:
        assert self.victim.poison is not None
        return self.victim.poison

    @cached_property
    def undefended(self) -> PoisonPlan:
        return replace(self, victim=self.victim.baseline, refused=None)

    def identity(self) -> dict[str, Any]:
        """The columns that name it."""
        victim = self.victim
        return {
            "dataset": victim.dataset.label,
            "model": victim.model.label,
            "defense": victim.defense_label,
            "attack": self.attack.label,
            "seed": victim.seed,
        }


def is_poison(registry: Registry, reference: Reference) -> bool:
    """Whether an attack is one on training data. Raises UsageError for an unknown name."""
    return isinstance(registry.get("attack", reference.name).spec.caps, PoisonCaps)


def planned(axes: Axes, attacks: Sequence[Reference], registry: Registry) -> list[PoisonPlan]:
    """Every training set attacked, every defense against it, the undefended model first. Raises UsageError."""
    plans: dict[str, PoisonPlan] = {}
    for dataset, model, seed, reference in itertools.product(axes.datasets, axes.models, axes.seeds, attacks):
        attack = bind(registry, "attack", reference)
        stacks = list(axes.defenses) or [()]
        if axes.baseline and any(stacks):
            stacks.insert(0, ())
        info: DatasetInfo = dataset.value.info()
        limit = axes.limit if axes.limit is not None else info.evaluate
        clean = VictimPlan(dataset, model, (), seed)
        needs = needed(registry, clean, attack)
        for stack in stacks:
            victim = VictimPlan(dataset, model, stack, seed, attack, needs)
            plan = PoisonPlan(victim, limit, judge_poison(victim, attack, info))
            plans.setdefault(plan.key, plan)
    return list(plans.values())


def needed(registry: Registry, clean: VictimPlan, attack: Bound) -> tuple[tuple[str, VictimPlan], ...]:
    """What an attack is made with, by name: victims that are trained on the clean data. Raises UsageError."""
    return tuple((name, _need(registry, clean, ref)) for name, ref in attack.needs.items())


def _need(registry: Registry, clean: VictimPlan, reference: VictimRef) -> VictimPlan:
    """A further victim on the clean data; the model called `model` is the attacked one's clean twin."""
    own = reference.model == Reference("model")
    model = clean.model if own else bind(registry, "model", reference.model)
    return replace(clean, model=model, defense=bind_stack(registry, reference.defense))


def reported(
    plans: Sequence[PoisonPlan], stored: Callable[[str], tuple[Poisoning, PoisonEvidence | None] | None]
) -> tuple[Poisoning, ...]:
    """What is stored of these plans, as this run asked for it, with differences, flags and verdicts."""
    found = []
    for plan in plans:
        kept = stored(plan.key)
        if kept is None:
            continue
        made, evidence = replace(kept[0], **plan.identity()), kept[1]
        if evidence is not None:
            base = stored(plan.undefended.key)
            other = base[1] if base is not None else None
            flags, verdict = examined(Look(evidence, other, bool(plan.victim.defense)))
            against = differences(evidence, other) if other is not None and plan.victim.defense else {}
            made = replace(made, flags=flags, verdict=verdict, differences=against)
        found.append(made)
    return tuple(found)
