"""Axes to sweeps: which victim meets which attack at which budgets, and which meetings make no sense.

Pure and torch-free: `--dry-run` is this module and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from advplug.budgets import Budget, customary, parse_budget, resolve
from advplug.contracts import (
    Access,
    AttackCaps,
    DatasetInfo,
    DefenseCaps,
    Goal,
    Gradient,
    Norm,
    Targeted,
    Untargeted,
    VictimRef,
)
from advplug.errors import UsageError, did_you_mean
from advplug.keys import SCHEMA, digest
from advplug.params import plain
from advplug.parse import Reference, Stack
from advplug.perturbations import BALLS
from advplug.registry import Entry, Registry

THREAT_KEYS = ("eps", "norm", "target")
"""Keys of an attack reference that describe the threat, not the attack."""
TARGETS = ("next", "random", "least-likely")


@dataclass(frozen=True)
class Bound:
    """A plugin with checked parameters, or an object of the user's own.

    `label` is how it was written, `recipe` everything that its behaviour depends on.
    """

    label: str
    recipe: Mapping[str, Any]
    caps: Any
    value: Any = None
    entry: Entry | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **resolved: Any) -> Any:
        """The thing itself: the user's object, or what the plugin's factory returns."""
        if self.entry is None:
            return self.value
        return self.value if self.value is not None and not resolved else self.entry.make(self.params, **resolved)

    @cached_property
    def needs(self) -> Mapping[str, VictimRef]:
        return self.entry.needs(self.params) if self.entry else {}


def bind(registry: Registry, kind: str, reference: Reference) -> Bound:
    """Looks `reference` up and checks its parameters. Raises UsageError."""
    entry = registry.get(kind, reference.name)
    params = entry.bind(reference)
    recipe = {"name": entry.name, "plugin": str(entry.source), "params": plain(params)}
    value = entry.make(params) if kind in ("dataset", "model") else None
    return Bound(str(reference), recipe, entry.spec.caps_of(params), value, entry, params)


@dataclass(frozen=True)
class VictimPlan:
    """A dataset, a model for it, and the defenses around it, with the seed it is trained under."""

    dataset: Bound
    model: Bound
    defense: tuple[Bound, ...]
    seed: int

    @property
    def defense_label(self) -> str:
        return "+".join(d.label for d in self.defense) or "none"

    @property
    def gradient(self) -> Gradient:
        order = (Gradient.EXACT, Gradient.BPDA, Gradient.NONE)
        return max((d.caps.gradient for d in self.defense), key=order.index, default=Gradient.EXACT)

    @property
    def stochastic(self) -> bool:
        return any(d.caps.stochastic for d in self.defense)

    @property
    def wrapped(self) -> bool:
        return any("wrap" in d.caps.stages for d in self.defense)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return {
            "dataset": {**self.dataset.recipe, "fingerprint": self.dataset.value.fingerprint()},
            "model": {**self.model.recipe, "identity": plain(self.model.value.identity())},
            "defense": [d.recipe for d in self.defense],
            "seed": self.seed,
        }

    @cached_property
    def key(self) -> str:
        return digest(self.recipe)

    @cached_property
    def baseline(self) -> VictimPlan:
        return VictimPlan(self.dataset, self.model, (), self.seed)


@dataclass(frozen=True)
class Refused:
    """Why a sweep makes no sense, and what would work instead."""

    reason: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.instead}" if self.instead else self.reason


@dataclass(frozen=True)
class Sweep:
    """The unit of work: one victim, one attack, all its budgets in one norm, ascending.

    `static` says that images crafted on the undefended baseline are judged too.
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

    @cached_property
    def key(self) -> str:
        return digest(
            {
                "schema": SCHEMA,
                "victim": self.victim.recipe,
                "attack": self.attack.recipe,
                "needs": {name: plan.recipe for name, plan in self.needs.items()},
                "norm": self.norm,
                "budgets": self.budgets,
                "goal": str(self.goal),
                "n": self.limit,
                "static": self.static,
            }
        )

    def cell_key(self, eps: Fraction) -> str:
        """A budget starts from the smaller ones, so larger ones leave its cell as it is."""
        # A minimum-norm attack is run once, whatever the budgets.
        chained = () if self.attack.caps.minimum_norm else tuple(b for b in self.budgets if b <= eps)
        chain = replace(self, budgets=chained)
        return digest({"sweep": chain.key, "eps": eps})

    @property
    def baseline(self) -> Sweep | None:
        """The sweep whose images are judged as static ones."""
        return replace(self, victim=self.victim.baseline, static=False) if self.static else None

    def threat_key(self, eps: Fraction) -> str:
        """Names the (victim, threat) group that the cell belongs to."""
        shape = {
            name: plain(self.attack.params[name]) for name in self.attack.caps.threat if name in self.attack.params
        }
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


def bind_stack(registry: Registry, stack: Stack) -> tuple[Bound, ...]:
    return tuple(bind(registry, "defense", part) for part in stack)


def standard_protocol(victim: VictimPlan) -> tuple[Reference, ...]:
    """The attacks that `eval` runs unless told otherwise: AutoAttack, whose result can be `trusted`; through a
    defense that passes no gradient at all, random search on the scores."""
    return (Reference("square" if victim.gradient is Gradient.NONE else "autoattack"),)


def expand(axes: Axes, registry: Registry) -> list[Sweep]:
    """Every sweep of the matrix, baselines before the defended victims that are compared with them.

    Sweeps of equal key appear once. Raises UsageError for what can be no sweep at all.
    """
    sweeps: dict[str, Sweep] = {}
    for dataset, model, seed in itertools.product(axes.datasets, axes.models, axes.seeds):
        stacks = list(axes.defenses) or [()]
        if axes.baseline and any(stacks):
            stacks.insert(0, ())
        for stack in stacks:
            victim = VictimPlan(dataset, model, stack, seed)
            for sweep in _sweeps_of(victim, axes, registry):
                sweeps.setdefault(sweep.key, sweep)
    return list(sweeps.values())


def _sweeps_of(victim: VictimPlan, axes: Axes, registry: Registry) -> list[Sweep]:
    info: DatasetInfo = victim.dataset.value.info()
    limit = axes.limit if axes.limit is not None else info.evaluate
    found = []
    for reference in axes.attacks or standard_protocol(victim):
        for key in THREAT_KEYS:
            if sum(k == key for k, _ in reference.params) > 1:
                raise UsageError(f"{reference}: {key} is given twice; repeat -a for another")
        attack = bind(registry, "attack", reference.without(*THREAT_KEYS))
        goal = _goal(reference, len(info.classes))
        needs = {name: _need(registry, victim, ref) for name, ref in attack.needs.items()}
        for norm, budgets in _budgets(reference, attack.caps, axes.budgets, info).items():
            refused, notes = judge(victim, attack, norm, goal, info)
            # The baseline's least likely class is another one than the defended victim's.
            static = axes.baseline and bool(victim.defense) and goal != Targeted("least-likely")
            found.append(Sweep(victim, attack, norm, budgets, goal, limit, needs, refused, notes, static))
    return found


def _need(registry: Registry, victim: VictimPlan, reference: VictimRef) -> VictimPlan:
    """A further victim on the same data; the model called `model` is the attacked one itself."""
    own = reference.model == Reference("model")
    model = victim.model if own else bind(registry, "model", reference.model)
    return VictimPlan(victim.dataset, model, bind_stack(registry, reference.defense), victim.seed)


def _goal(reference: Reference, classes: int) -> Goal:
    text = reference.get("target")
    if text is None:
        return Untargeted()
    if text in TARGETS:
        return Targeted(text)
    if text.isdecimal() and int(text) < classes:
        return Targeted(int(text))
    if text.isdecimal():
        raise UsageError(f"{reference}: target {text} is no class; the dataset has classes 0 to {classes - 1}")
    hint = did_you_mean(text, TARGETS)
    raise UsageError(f"{reference}: target takes {', '.join(TARGETS)} or a class number, got '{text}'{hint}")


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


def judge(
    victim: VictimPlan, attack: Bound, norm: Norm, goal: Goal, info: DatasetInfo
) -> tuple[Refused | None, tuple[str, ...]]:
    """The first reason that applies, or None; with notes on what the engine adds by itself."""
    caps: AttackCaps = attack.caps
    refused = (
        _judge_threat(attack, norm, goal, info)
        or _judge_training_set(victim, caps, info)
        or judge_victim(victim, info)
        or _judge_gradient(victim, attack)
    )
    notes = []
    if victim.stochastic and caps.access is Access.GRADIENT:
        notes.append("the victim is randomised: gradients and losses are averaged over fresh draws (EOT)")
    if victim.gradient is Gradient.BPDA and caps.access is Access.GRADIENT:
        notes.append("gradients pass the defense through its declared stand-in (BPDA); run a gradient-free attack too")
    notes += [note for count, note in caps.fewer_classes if len(info.classes) < count]
    if caps.per_batch:
        notes.append("it draws a batch at a time: another --batch-size gives slightly different numbers")
    return refused, tuple(notes)


def _judge_threat(attack: Bound, norm: Norm, goal: Goal, info: DatasetInfo) -> Refused | None:
    caps: AttackCaps = attack.caps
    if norm not in caps.norms:
        return Refused(f"{attack.label} has no {norm} version", f"it works in {', '.join(sorted(caps.norms))}")
    kind = "targeted" if isinstance(goal, Targeted) else "untargeted"
    if kind not in caps.goals:
        return Refused(f"{attack.label} cannot run {kind}", f"it runs {' and '.join(sorted(caps.goals))}")
    if caps.modality != info.modality:
        return Refused(f"{attack.label} attacks {caps.modality} data, this dataset holds {info.modality} data")
    classes = len(info.classes)
    if caps.max_classes is not None and classes > caps.max_classes:
        return Refused(
            f"{attack.label} works with up to {caps.max_classes} classes, the dataset has {classes}",
            "use another attack",
        )
    if caps.channels is not None and info.channels not in caps.channels:
        known = " or ".join(map(str, caps.channels))
        return Refused(f"{attack.label} works on images of {known} channels, these have {info.channels}")
    if classes < caps.min_classes:
        return Refused(
            f"{attack.label} needs at least {caps.min_classes} classes, the dataset has {classes}",
            "use apgd:loss=margin",
        )
    return None


def judge_victim(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    """Why there can be no such victim, whatever attacks it."""
    return _judge_model(victim, info) or _judge_stack(victim, info)


def _judge_model(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    misfit = victim.model.value.misfit(info)
    if misfit is not None:
        return Refused(misfit)
    if not info.trainable and victim.model.value.schedule(info) is not None:
        return Refused(
            f"{victim.model.label} has to be trained, and {victim.dataset.label} holds no training images",
            "use weights: torchvision:NAME@DEFAULT, file:PATH or your own module",
        )
    return None


def _judge_training_set(victim: VictimPlan, caps: AttackCaps, info: DatasetInfo) -> Refused | None:
    if caps.access is Access.TRAINING_SET and victim.model.value.schedule(info) is None:
        return Refused(
            f"a training-set attack needs a model that is trained, {victim.model.label} is only loaded",
            "use a model by name, without weights",
        )
    return None


def _judge_stack(victim: VictimPlan, info: DatasetInfo) -> Refused | None:
    caps: list[tuple[str, DefenseCaps]] = [(d.label, d.caps) for d in victim.defense]
    trains = [(label, c) for label, c in caps if {"data", "objective"} & set(c.stages)]
    if trains and victim.model.value.schedule(info) is None:
        label, first = trains[0]
        other = first.loaded or "a defense that tunes or wraps, such as adv-finetune"
        return Refused(
            f"{label} changes how a model is trained, {victim.model.label} is only loaded",
            f"use a model by name without weights, or {other}",
        )
    if hasattr(victim.model.value, "fit"):
        by_label = [(label, c) for label, c in caps if "objective" in c.stages and c.modality == "image"]
        if by_label:
            label, first = by_label[0]
            return Refused(
                f"{label} trains on class labels, {victim.model.label} is trained in its own way",
                f"use {first.loaded}" if first.loaded else "use a defense that tunes or wraps, such as adv-finetune",
            )
    losses = [label for label, c in caps if "objective" in c.stages]
    if len(losses) > 1:
        return Refused(f"{' and '.join(losses)} each replace the training loss", "a stack holds at most one")
    for kind, which in (("rejects", "detector"), ("certifies", "certifying defense")):
        several = [label for label, c in caps if getattr(c, kind)]
        if len(several) > 1:
            return Refused(f"{' and '.join(several)} are two {which}s", "a stack holds at most one")
    wraps = [(label, c) for label, c in caps if "wrap" in c.stages]
    inside = next((label for label, c in wraps[:-1] if c.certifies), None)
    if inside is not None:
        return Refused(f"{inside} certifies only what is inside it, and {wraps[-1][0]} is not", f"write {inside} last")
    return None


def _judge_gradient(victim: VictimPlan, attack: Bound) -> Refused | None:
    if attack.caps.access is Access.GRADIENT and victim.gradient is Gradient.NONE:
        blocking = next(d.label for d in victim.defense if d.caps.gradient is Gradient.NONE)
        return Refused(
            f"{blocking} passes no gradient, not even through a stand-in, and {attack.label} needs one",
            "use an attack that works on scores or decisions",
        )
    return None
