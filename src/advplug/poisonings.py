"""Attacks on training data: which are planned, what was observed, the figures that follow and their flags. No torch."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from advplug.builtin.metrics import share
from advplug.contracts import DatasetInfo, PoisonCaps, VictimRef
from advplug.estimate import Estimate, paired_difference, paired_p_value
from advplug.evidence import Array
from advplug.health.facts import INAPPLICABLE, PASSED, UNCHECKED, Outcome
from advplug.health.victims import chance
from advplug.judging import Refused, judge_poison
from advplug.keys import SCHEMA, digest
from advplug.matrix import Axes
from advplug.parse import Reference
from advplug.plans import Bound, VictimPlan, bind, bind_stack
from advplug.registry import Registry
from advplug.results import Flag, Level, Poisoning, Verdict

TAKEN = 0.05
"""Level of the exact paired test that an attack took: five targets of five reach it."""
REACHES = 0.1
"""Share of a trigger that has to reach the first layer with weights."""


@dataclass(frozen=True)
class PoisonPlan:
    """A victim whose training set is attacked, judged on `limit` test images."""

    victim: VictimPlan
    limit: int | None
    refused: Refused | None = None

    @cached_property
    def key(self) -> str:
        refused = {"refused": str(self.refused)} if self.refused else {}
        return digest({"poisoning": self.victim.recipe, "n": self.limit, "schema": SCHEMA, **refused})

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


@dataclass(frozen=True)
class PoisonEvidence:
    """What a poisoned victim answers, and what the same model does that was trained on the clean data.

    `n` images, `d` fresh decisions of each; answers are classes, -1 where there is none:
    index, y (n,): position and true class; wanted (n,): what the trigger asks for; clean, triggered (n, d): answers
    without and with the trigger; reference_clean, reference_triggered (n,): those of the clean model. For `k` targets
    likewise: target_index, target_y, target_wanted, target_reference (k,), target (k, d). Without a trigger or
    targets their columns are empty. `reaches`: the share of the trigger that reaches the first layer with weights,
    NaN where that could not be seen. `poisons` of `rows` training images were added or changed.
    """

    index: Array
    y: Array
    wanted: Array
    clean: Array
    triggered: Array
    reference_clean: Array
    reference_triggered: Array
    target_index: Array
    target_y: Array
    target_wanted: Array
    target: Array
    target_reference: Array
    reaches: float
    poisons: int
    rows: int

    @property
    def backdoor(self) -> bool:
        return self.triggered.size > 0

    @property
    def aims(self) -> bool:
        return self.target.size > 0

    @property
    def gains(self) -> Array:
        """(n,) bool: images that are not of the class wanted already."""
        return np.asarray(self.wanted != self.y)

    def to_bytes(self) -> bytes:
        """A compressed, pickle-free archive."""
        buffer = io.BytesIO()
        columns: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez_compressed(buffer, **columns)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> PoisonEvidence:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            values: dict[str, Any] = {k: archive[k] for k in archive.files}
        single = {"reaches": float(values["reaches"]), "poisons": int(values["poisons"]), "rows": int(values["rows"])}
        return cls(**{**values, **single})


def measured(e: PoisonEvidence) -> dict[str, Estimate | None]:
    """The figures. Success of a trigger is over the images whose true class is not the one wanted."""
    y = e.y[:, None]
    values = {
        "clean_accuracy": share(e.clean == y),
        "clean_model_accuracy": share((e.reference_clean == e.y)[:, None]),
        "attack_success_rate": None,
        "clean_model_success_rate": None,
        "triggered_accuracy": None,
        "poison_success_rate": None,
        "clean_model_poison_success_rate": None,
    }
    if e.backdoor:
        gains, wanted = e.gains, e.wanted[e.gains, None]
        values["attack_success_rate"] = share(e.triggered[gains] == wanted)
        values["clean_model_success_rate"] = share(e.reference_triggered[gains, None] == wanted)
        values["triggered_accuracy"] = share(e.triggered == y)
    if e.aims:
        wanted = e.target_wanted[:, None]
        values["poison_success_rate"] = share(e.target == wanted)
        values["clean_model_poison_success_rate"] = share(e.target_reference[:, None] == wanted)
    return values


def differences(e: PoisonEvidence, undefended: PoisonEvidence) -> dict[str, Estimate | None]:
    """Defended minus undefended, over the same images: clean accuracy, and success of the trigger or the targets."""
    found: dict[str, Estimate | None] = {"clean_accuracy": None}
    if np.array_equal(e.index, undefended.index):
        found["clean_accuracy"] = _paired(e.clean == e.y[:, None], undefended.clean == undefended.y[:, None])
        if e.backdoor and undefended.backdoor:
            rows, wanted = e.gains, e.wanted[e.gains, None]
            found["attack_success_rate"] = _paired(e.triggered[rows] == wanted, undefended.triggered[rows] == wanted)
    if e.aims and np.array_equal(e.target_index, undefended.target_index):
        wanted = e.target_wanted[:, None]
        found["poison_success_rate"] = _paired(e.target == wanted, undefended.target == wanted)
    return found


def _paired(ours: Array, theirs: Array) -> Estimate | None:
    return paired_difference(ours.mean(axis=1), theirs.mean(axis=1))


# --- flags -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a check sees: a victim's evidence and that of the undefended one on the same poisons, where there is any."""

    own: PoisonEvidence
    undefended: PoisonEvidence | None
    defended: bool


def did_not_take(look: Look) -> Outcome:
    """The undefended model does not do what the poison asks for more often than the clean model does.

    Exact paired test (McNemar, one-sided) at level 0.05, over the triggered images and over the targets, each part
    for itself. What does not work without a defense says nothing of one.
    """
    e = look.undefended
    if e is None:
        return UNCHECKED
    failed = []
    if e.backdoor:
        rows = e.gains
        hit = e.triggered[rows] == e.wanted[rows, None]
        failed += _not_above(hit, e.reference_triggered[rows] == e.wanted[rows], "triggered images")
    if e.aims:
        hit = e.target == e.target_wanted[:, None]
        failed += _not_above(hit, e.target_reference == e.target_wanted, "targets")
    return Outcome("tripped", "; ".join(failed)) if failed else PASSED


def _not_above(hit: Array, reference: Array, what: str) -> list[str]:
    """(m, d) bits of the poisoned and (m,) of the clean model; a sentence where the first are not more."""
    most = 2 * hit.sum(axis=1) > hit.shape[1]
    p = paired_p_value(int((most & ~reference).sum()), int((reference & ~most).sum()))
    if p < TAKEN:
        return []
    return [
        f"without a defense {most.sum()} of {len(most)} {what} are taken for what was asked, "
        f"by the clean model {reference.sum()} (p = {p:.2g})"
    ]


def trigger_destroyed(look: Look) -> Outcome:
    """Less than a tenth of the trigger reaches the first layer with weights.

    Measured on the first images: the change that the trigger makes to that layer's input, in units of the input's own
    spread, against the same of the pixels. A trigger that resizing, cropping or filtering removes is none; what holds
    against it may fall to one that survives.
    """
    if not look.own.backdoor:
        return INAPPLICABLE
    reaches = look.own.reaches
    if not np.isfinite(reaches):
        return UNCHECKED
    if reaches >= REACHES:
        return PASSED
    return Outcome("tripped", f"{100 * reaches:.1f} % of the trigger reaches the first layer with weights")


def near_chance(look: Look) -> Outcome:
    """The lower bound of clean accuracy lies under c + 0.2 (1 - c), with c the largest class's share."""
    return chance(look.own.y, look.own.clean == look.own.y[:, None])


def defense_adds_nothing(look: Look) -> Outcome:
    """The 95 % interval of the paired difference of success to the undefended model holds 0 or lies above it."""
    if not look.defended:
        return INAPPLICABLE
    if look.undefended is None:
        return UNCHECKED
    found = differences(look.own, look.undefended)
    told = []
    for name, what in (("attack_success_rate", "triggered images"), ("poison_success_rate", "targets")):
        d = found.get(name)
        if d is not None and d.high is not None and d.low is not None and d.high >= 0:
            interval = f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            told.append(f"no lower success is shown on {what}: {interval}")
    return Outcome("tripped", "; ".join(told)) if told else PASSED


@dataclass(frozen=True)
class Check:
    """A check with its fixed level and what to do about it."""

    run: Callable[[Look], Outcome]
    level: Level
    advice: str


CHECKS: Mapping[str, Check] = {
    "attack-did-not-take": Check(
        did_not_take,
        "error",
        "raise the number of poisons or make the trigger plainer: no defense can be judged on this",
    ),
    "trigger-destroyed": Check(
        trigger_destroyed, "error", "use a trigger that survives what is done to the pixels, larger or elsewhere"
    ),
    "near-chance": Check(near_chance, "error", "train the model: what a guess is taken for means nothing"),
    "defense-adds-nothing": Check(defense_adds_nothing, "info", "more images narrow the interval"),
}
"""Every check of attacks on training data, by name. A tripped `error` makes the verdict `not trustworthy`."""


def examined(look: Look) -> tuple[tuple[Flag, ...], Verdict]:
    """The flags, and the verdict: of an undefended model it may be `trusted`, of a defended one at best an `upper
    bound` of what it holds, since the poison was made without knowing the defense."""
    outcomes = {name: check.run(look) for name, check in CHECKS.items()}
    flags = tuple(Flag(n, CHECKS[n].level, o.detail) for n, o in outcomes.items() if o.state == "tripped")
    if any(flag.level == "error" for flag in flags):
        return flags, "not trustworthy"
    unchecked = any(o.state == "unchecked" for o in outcomes.values())
    return flags, "upper bound" if look.defended or unchecked else "trusted"


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
