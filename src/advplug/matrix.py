"""Axes to sweeps: which victim meets which attack at which budgets, and which meetings make no sense.

Pure and torch-free: `--dry-run` is this module and nothing else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from advplug.budgets import Budget, customary, parse_budget, resolve
from advplug.contracts import AttackCaps, DatasetInfo, Goal, Gradient, Minimise, Norm, Targeted, Untargeted, VictimRef
from advplug.errors import UsageError, did_you_mean
from advplug.judging import RETRIEVAL, Refused, judge
from advplug.keys import CELLS, RANDOMISED, SCHEMA, digest
from advplug.params import plain
from advplug.parse import Reference
from advplug.perturbations import BALLS
from advplug.plans import Bound, VictimPlan, bind, bind_stack
from advplug.registry import Registry

THREAT_KEYS = ("eps", "norm", "target")
"""Keys of an attack reference that describe the threat, not the attack."""
TARGETS = ("next", "random", "least-likely")


@dataclass(frozen=True)
class Sweep:
    """The unit of work: one victim, one attack, all its budgets in one norm, ascending.

    `static` says that images crafted on the undefended baseline are judged too, `asked` that the budgets are not
    merely the customary ones. `crafted_at` are the baseline's budgets where it is attacked at more than these.
    """

    victim: VictimPlan
    attack: Bound
    norm: Norm
    budgets: tuple[Fraction, ...]
    goal: Goal
    limit: int | None
    needs: Mapping[str, VictimPlan]
    refused: Refused | None = None
    notes: tuple[str, ...] = ()
    static: bool = False
    asked: bool = False
    crafted_at: tuple[Fraction, ...] = ()

    @cached_property
    def key(self) -> str:
        wider = self.crafted_at not in ((), self.budgets)
        drawn = any(plan.stochastic for plan in (self.victim, *self.needs.values()))
        return digest(
            {
                "schema": SCHEMA,
                "cells": CELLS,
                "victim": self.victim.recipe,
                "attack": self.attack.recipe,
                "needs": {name: plan.recipe for name, plan in self.needs.items()},
                "norm": self.norm,
                "budgets": self.budgets,
                "goal": str(self.goal),
                "n": self.limit,
                "static": self.static,
                **({"crafted_at": self.crafted_at} if wider else {}),
                **({"randomised": RANDOMISED} if drawn else {}),
            }
        )

    def cell_key(self, eps: Fraction) -> str:
        """A budget starts from the smaller ones, so larger ones leave its cell as it is."""
        # A minimum-norm attack is run once, and may search no further than the largest budget.
        once = self.attack.caps.minimum_norm
        chained, crafted = (budgets[-1:] if once else tuple(b for b in budgets if b <= eps)
                            for budgets in (self.budgets, self.crafted_at))  # fmt: skip
        chain = replace(self, budgets=chained, crafted_at=crafted)
        return digest({"sweep": chain.key, "eps": eps})

    @property
    def baseline(self) -> Sweep | None:
        """The sweep whose images are judged as static ones."""
        if not self.static:
            return None
        budgets = self.crafted_at or self.budgets
        return replace(self, victim=self.victim.baseline, static=False, budgets=budgets, crafted_at=())

    @property
    def shape(self) -> str:
        """What may be changed, beside norm and budget, as `shift=0,angle=30,scale=0`; of most attacks nothing."""
        return ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._shape.items())

    @property
    def _shape(self) -> dict[str, object]:
        return {name: plain(self.attack.params[name]) for name in self.attack.caps.threat if name in self.attack.params}

    def threat_key(self, eps: Fraction) -> str:
        """Names the (victim, threat) group that the cell belongs to."""
        shape = self._shape
        return digest({"victim": self.victim.recipe, "norm": self.norm, "eps": eps, "goal": str(self.goal),
                       "n": self.limit, "schema": SCHEMA, **({"shape": shape} if shape else {})})  # fmt: skip


@dataclass(frozen=True)
class Axes:
    """What is to be crossed. `attacks` empty means the standard protocol; `budgets` empty the customary one."""

    datasets: tuple[Bound, ...]
    models: tuple[Bound, ...]
    defenses: tuple[tuple[Bound, ...], ...] = ((),)
    attacks: tuple[Reference, ...] = ()
    budgets: tuple[Budget, ...] = ()
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    baseline: bool = True


def standard_protocol(victim: VictimPlan) -> tuple[Reference, ...]:
    """The attacks that `eval` runs unless told otherwise: AutoAttack, whose result can be `trusted`; through a
    defense that passes no gradient at all, random search on the scores."""
    return (Reference("square" if victim.gradient is Gradient.NONE else "autoattack"),)


def expand(axes: Axes, registry: Registry) -> list[Sweep]:
    """Every sweep of the matrix, baselines before the defended victims that are compared with them.

    No cell is there twice. Raises UsageError for what can be no sweep at all.
    """
    sweeps: dict[str, Sweep] = {}
    for dataset, model, seed in itertools.product(axes.datasets, axes.models, axes.seeds):
        stacks = list(axes.defenses) or [()]
        if axes.baseline and any(stacks):
            stacks.insert(0, ())
        for stack in stacks:
            victim = VictimPlan(dataset, model, stack, seed)
            # The undefended model meets whatever its defended versions do, or nothing could be compared.
            plans = [victim] if stack else [VictimPlan(dataset, model, s, seed) for s in stacks]
            attacks = axes.attacks or tuple(dict.fromkeys(a for plan in plans for a in standard_protocol(plan)))
            for sweep in _sweeps_of(victim, attacks, axes, registry):
                sweeps.setdefault(sweep.key, sweep)
    return joined(list(sweeps.values()))


def joined(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The sweeps with those of one victim and attack made one that share a budget, so that no cell is there twice.

    Static attacks take their images from a sweep of the undefended model that has all of their budgets.
    """
    found: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        alike = found.setdefault(like(sweep, sweep.victim, sweep.static), [])
        for other in [s for s in alike if set(s.budgets) & set(sweep.budgets)]:
            alike.remove(other)
            budgets = tuple(sorted({*other.budgets, *sweep.budgets}))
            sweep = replace(other, budgets=budgets, asked=other.asked or sweep.asked)
        alike.append(sweep)

    def placed(sweep: Sweep) -> Sweep:
        bases = found.get(like(sweep, sweep.victim.baseline, False), ()) if sweep.static else ()
        wider = next((base.budgets for base in bases if set(base.budgets) > set(sweep.budgets)), ())
        return replace(sweep, crafted_at=wider)

    return [placed(sweep) for alike in found.values() for sweep in alike]


def like(sweep: Sweep, victim: VictimPlan, static: bool) -> str:
    """What sweeps that differ in their budgets have in common, of this victim."""
    return replace(sweep, victim=victim, static=static, budgets=(), crafted_at=()).key


def _sweeps_of(victim: VictimPlan, attacks: Sequence[Reference], axes: Axes, registry: Registry) -> list[Sweep]:
    info: DatasetInfo = victim.dataset.value.info()
    limit = axes.limit if axes.limit is not None else info.evaluate
    found = []
    for reference in attacks:
        for key in THREAT_KEYS:
            if sum(k == key for k, _ in reference.params) > 1:
                raise UsageError(f"{reference}: {key} is given twice; repeat -a for another")
        attack = bind(registry, "attack", reference.without(*THREAT_KEYS))
        goal = _goal(reference, attack.caps, info, victim.model.caps.task)
        needs = {name: _need(registry, victim, ref) for name, ref in attack.needs.items()}
        for norm, budgets in _budgets(reference, attack.caps, axes.budgets, info).items():
            refused, notes = judge(victim, attack, norm, goal, info)
            # The baseline's least likely class is another one than the defended victim's.
            static = axes.baseline and bool(victim.defense) and goal != Targeted("least-likely")
            asked = bool(axes.budgets) or reference.get("eps") is not None
            found.append(Sweep(victim, attack, norm, budgets, goal, limit, needs, refused, notes, static, asked))
    return found


def _need(registry: Registry, victim: VictimPlan, reference: VictimRef) -> VictimPlan:
    """A further victim on the same data; the model called `model` is the attacked one itself."""
    own = reference.model == Reference("model")
    model = victim.model if own else bind(registry, "model", reference.model)
    return VictimPlan(victim.dataset, model, bind_stack(registry, reference.defense), victim.seed)


def _goal(reference: Reference, caps: AttackCaps, info: DatasetInfo, task: str) -> Goal:
    text, classes = reference.get("target"), len(info.classes)
    if text is None:
        return Untargeted() if "untargeted" in caps.goals or "minimise" not in caps.goals else Minimise()
    if text in TARGETS or task == RETRIEVAL:
        return Targeted(text)
    if text.isdecimal() and int(text) < classes:
        return Targeted(int(text))
    if text.isdecimal():
        raise UsageError(f"{reference}: target {text} is no class; the dataset has classes 0 to {classes - 1}")
    named = [i for i, name in enumerate(info.classes) if _says(text, name)]
    if len(named) == 1:
        return Targeted(named[0])
    hint = did_you_mean(text, (*TARGETS, *info.classes))
    raise UsageError(
        f"{reference}: target takes {', '.join(TARGETS)}, a class number or the name of one, got '{text}'{hint}"
    )


def _says(text: str, name: str) -> bool:
    """Whether a class's name is the text, or a word of it: 'an image of a car' says 'car'."""
    words, wanted = (re.findall(r"\w+", t.lower().replace("_", " ")) for t in (text, name))
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _budgets(
    reference: Reference, caps: AttackCaps, axis: Sequence[Budget], info: DatasetInfo
) -> dict[Norm, tuple[Fraction, ...]]:
    """Budgets by norm, ascending, each once; an eps inside the reference takes it out of the axis."""
    explicit, own = reference.get("norm"), reference.get("eps")
    if explicit is not None:
        explicit = str(parse_budget(f"{explicit}:1").norm)
    if own is not None and explicit is not None and ":" not in own:
        own = f"{explicit}:{own}"
    wanted = [parse_budget(own)] if own is not None else list(axis)
    if own is None and not (set(BALLS) - {"l0"}) & ({explicit} if explicit else caps.norms):
        wanted = [b for b in wanted if b.norm is not None]  # a bare radius is no number of pixels, no share of a range
    if not wanted:
        supported = frozenset({explicit}) if explicit else caps.norms
        wanted = [customary(info.budgets, supported, explicit)]
    grouped: dict[Norm, set[Fraction]] = {}
    for budget in wanted:
        if explicit and budget.norm and budget.norm != explicit:
            if own is None:  # another norm's point of the axis is not for this attack
                continue
            raise UsageError(f"{reference}: norm={explicit} contradicts eps={own}")
        norm, eps = resolve(budget, caps.norms, explicit)
        grouped.setdefault(norm, set()).add(eps)
    if not grouped:
        raise UsageError(f"{reference}: no budget of the -e axis is in {explicit}; add one, like -e {explicit}:0.5")
    return {norm: tuple(sorted(values)) for norm, values in grouped.items()}
