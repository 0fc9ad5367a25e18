"""What a matrix will cost before it is run: images sent through models, from the attacks' parameters. No torch.

The parameters give the most that an attack can take. Attacks stop at each image once it is fooled, so that a forecast
counts STOPS_EARLY of it where they do, which is right within a factor 2 from a quarter of the most up to all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from advplug.builtin.randomised import DECISIONS as VOTES_TAKEN
from advplug.builtin.randomised import together
from advplug.certificates import CertificatePlan
from advplug.contracts import Access, AttackCaps, DatasetInfo, DefenseCaps, Gradient, Minimise, Targeted
from advplug.matrix import Sweep
from advplug.perturbations import LP
from advplug.plans import Bound, VictimPlan

STOPS_EARLY = 0.5
"""The share of an attack's most passes that is taken where images leave once they are fooled."""
UNKNOWN = 100
"""Passes an image that are counted for an attack whose parameters do not tell."""
JUDGED = 3
"""Decisions an image and budget: as crafted, in 8 bits, and images of the undefended model."""
CLEAN = 2
"""Decisions an image that a victim is looked at with before any attack."""
AUDIT_IMAGES, AUDIT_PASSES = 64, 200
"""Images of the quick audit, and the most that it sends each of them forward and backward."""
DECISIONS = 10
"""Fresh decisions that an image is given by a randomised victim."""
DRAWS, VOTES, CERTIFIED, STAND_INS = 20, 4, 1100, 2
"""What is counted for a defense that does not say how often it asks the model."""


@dataclass(frozen=True)
class Cost:
    """Images sent through a victim: by attacks forward and backward, and by decisions. `most` is the upper bound of
    all of them, `known` whether the attack's parameters gave it."""

    forward: int = 0
    backward: int = 0
    decisions: int = 0
    most: int = 0
    known: bool = True

    @property
    def passes(self) -> int:
        return self.forward + self.backward + self.decisions

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.decisions + other.decisions,
            self.most + other.most,
            self.known and other.known,
        )


@dataclass(frozen=True)
class Effort:
    """Passes that one image takes at most at one budget."""

    forward: float
    backward: float
    known: bool = True

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.forward + other.forward, self.backward + other.backward, self.known and other.known)

    def times(self, number: float) -> Effort:
        return Effort(self.forward * number, self.backward * number, self.known)


def cost_of(sweep: Sweep) -> Cost:
    """Everything that a sweep asks of its victim; nothing where it is refused."""
    if sweep.refused is not None:
        return Cost()
    victim, images, budgets = sweep.victim, images_of(sweep), len(sweep.budgets)
    rounds = 1 if sweep.attack.caps.minimum_norm else budgets
    effort = effort_of(sweep.attack, victim, isinstance(sweep.goal, Targeted))
    patient = victim.stochastic or bool(sweep.attack.params.get("keep_going")) or isinstance(sweep.goal, Minimise)
    once = effort.times(images * rounds)
    made = once.times(1.0 if patient or not _leaves(sweep.attack) else STOPS_EARLY)
    most = once
    # Crafted again, to the last step, for whoever is judged on these images, and on a defended model without wraps.
    if victim.wrapped and "keep_going" in sweep.attack.params:
        bare = effort_of(sweep.attack, victim.baseline, isinstance(sweep.goal, Targeted)).times(images * rounds)
        made, most = made + bare, most + bare
    decisions = images * budgets * JUDGED * _decided(victim)
    total = round(most.forward + most.backward) + decisions
    return Cost(round(made.forward), round(made.backward), decisions, total, effort.known)


def lasting(sweep: Sweep) -> Cost:
    """Crafting once more to the last step, of images on which defended victims are judged."""
    if sweep.refused is not None or "keep_going" not in sweep.attack.params or sweep.attack.params["keep_going"]:
        return Cost()
    rounds = images_of(sweep) * len(sweep.budgets)
    effort = effort_of(sweep.attack, sweep.victim, isinstance(sweep.goal, Targeted)).times(rounds)
    forward, backward = round(effort.forward), round(effort.backward)
    decisions = rounds * _decided(sweep.victim)
    return Cost(forward, backward, decisions, forward + backward + decisions, effort.known)


def audit_cost(victim: VictimPlan, level: str, images: int, groups: int) -> Cost:
    """The health checks of a victim's threats."""
    if level == "none":
        return Cost()
    looked = images if level == "full" else min(AUDIT_IMAGES, images)
    most = groups * looked * AUDIT_PASSES * _stand_ins(victim) * (_draws(victim) if victim.stochastic else 1)
    likely = round(most * STOPS_EARLY)
    return Cost(likely - likely // 2, likely // 2, 0, most)


def clean_cost(victim: VictimPlan, images: int) -> Cost:
    """What a victim is asked before any attack."""
    decisions = images * CLEAN * _decided(victim)
    return Cost(0, 0, decisions, decisions)


def certificate_cost(plan: CertificatePlan) -> Cost:
    """The noisy copies of every image."""
    if plan.refused is not None:
        return Cost()
    last = next((d.params for d in reversed(plan.victim.defense) if d.caps.certifies), {})
    copies = last["n"] + last["n0"] if {"n", "n0"} <= set(last) else CERTIFIED
    decisions = counted(plan.limit, plan.victim.dataset) * copies
    return Cost(0, 0, decisions, decisions, {"n", "n0"} <= set(last))


def images_of(sweep: Sweep) -> int:
    return counted(sweep.limit, sweep.victim.dataset)


def counted(limit: int | None, dataset: Bound) -> int:
    """Images that are evaluated: `limit`, or what there is of a smaller test set.

    Of a test set that is used whole and does not say how large it is, it is a guess, which the first run corrects.
    """
    info: DatasetInfo = dataset.value.info()
    if limit is None:
        return info.evaluate or info.images or int(dataset.params.get("n") or 1000)
    return limit if info.images is None else min(limit, info.images)


# --- one image at one budget ---


def effort_of(attack: Bound, victim: VictimPlan, targeted: bool = False) -> Effort:
    """Of one attack on one victim, with the samples that a randomised one takes."""
    params = {**attack.params, "classes": len(victim.dataset.value.info().classes), "stochastic": victim.stochastic}
    made = effort_by(attack.entry.spec.effort if attack.entry else None, params, attack.caps, targeted)
    if attack.caps.access is not Access.GRADIENT:
        return made.times(_votes(victim))  # The draws of an answer are questions, too, and within their number.
    made = made.times(_stand_ins(victim))
    noisy = victim.stochastic or bool(params.get("transforms"))
    return made.times(_draws(victim, _whole(params.get("draws"), 1)) if noisy else 1)


def effort_by(
    own: Callable[[Mapping[str, Any]], tuple[float, float]] | None,
    params: Mapping[str, Any],
    caps: AttackCaps,
    targeted: bool = False,
) -> Effort:
    """By the attack's own word (`Spec.effort`), or by the parameters that attacks share: `steps`, `restarts`,
    `n_targets` or `targets`, `queries`."""
    params, aims = dict(params), 1
    for name in ("n_targets", "targets"):
        if isinstance(params.get(name), int):
            params[name] = aims = 1 if targeted else min(params[name], params["classes"] - 1)
    if own is not None:
        return Effort(*own(params))
    runs = max(1, _whole(params.get("restarts"), 1)) * aims
    if caps.access is Access.GRADIENT and isinstance(params.get("steps"), int):
        return Effort(runs * (params["steps"] + 1), runs * params["steps"])
    if caps.access is not Access.GRADIENT and isinstance(params.get("queries"), int):
        return Effort(runs * params["queries"], 0)
    return Effort(UNKNOWN / 2, UNKNOWN / 2, False)


def _leaves(attack: Bound) -> bool:
    """Whether images leave an attack once they are fooled; floors and one-step attacks have nothing to leave."""
    return bool(attack.params.get("steps", 2) != 1)


def _draws(victim: VictimPlan, asked: int = 1) -> int:
    """Samples that make one gradient where the attack draws `asked` times by itself. A vote draws several copies at
    once, through each of its stand-ins."""
    return max((_samples(d, asked) for d in victim.defense if d.caps.stochastic), default=asked)


def _samples(defense: Bound, asked: int) -> int:
    own = _whole(defense.params.get("draws"), DRAWS)
    if not defense.caps.asks_many:
        return max(asked, own)
    copies = together(own)
    return _gradients(defense.caps) * copies * max(asked, math.ceil(own / copies))


def _stand_ins(victim: VictimPlan) -> int:
    """Through how many gradients a stack is attacked; a vote's are counted with its draws."""
    bpda = (d.caps for d in victim.defense if d.caps.gradient is Gradient.BPDA and not d.caps.asks_many)
    return max(map(_gradients, bpda), default=1)


def _gradients(caps: DefenseCaps) -> int:
    return caps.stand_ins or STAND_INS


def _decided(victim: VictimPlan) -> int:
    """Passes that one decision of the deployed system takes: votes, and fresh draws where it is randomised."""
    votes = any(d.caps.asks_many for d in victim.defense)
    return _votes(victim) * ((VOTES_TAKEN if votes else DECISIONS) if victim.stochastic else 1)


def _votes(victim: VictimPlan) -> int:
    """Passes that one answer takes."""
    return max((_whole(d.params.get("votes"), VOTES) for d in victim.defense if d.caps.asks_many), default=1)


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


# --- a whole matrix ---


@dataclass(frozen=True)
class Forecast:
    """What is still to be done: its cost by victim key, trainings aside, and the attacks that do not tell theirs.

    `unsized` are data that may hold fewer test images than were asked for, and were counted.
    """

    victims: Mapping[str, tuple[VictimPlan, Cost]]
    unknown: tuple[str, ...] = ()
    unsized: tuple[str, ...] = ()

    @property
    def total(self) -> Cost:
        return sum((cost for _, cost in self.victims.values()), Cost())


def forecast(
    sweeps: Sequence[Sweep], proofs: Sequence[CertificatePlan], done: Mapping[str, str], audit: str
) -> Forecast:
    """The cost of what is not stored as `ok` in `done`, a status by key."""
    left = [s for s in sweeps if s.refused is None and any(done.get(s.cell_key(e)) != "ok" for e in s.budgets)]
    wanted = {s.baseline.key for s in left if s.baseline is not None}
    costs: dict[str, tuple[VictimPlan, Cost]] = {}

    def add(victim: VictimPlan, cost: Cost) -> None:
        costs[victim.key] = victim, costs.get(victim.key, (victim, Cost()))[1] + cost

    groups: dict[str, set[str]] = {}
    crafted: set[object] = set()
    for sweep in left:
        if sweep.victim.key not in costs:
            add(sweep.victim, clean_cost(sweep.victim, images_of(sweep)))
        cost = cost_of(sweep) + (lasting(sweep) if sweep.key in wanted else Cost())
        if sweep.needs and sweep.attack.caps.access is Access.DECISION:
            # Crafted elsewhere, once for all victims.
            made = str([sweep.attack.recipe, sweep.norm, sweep.budgets, sweep.victim.dataset.label, sweep.victim.seed])
            cost = replace(cost, forward=0, backward=0, most=cost.decisions) if made in crafted else cost
            crafted.add(made)
        add(sweep.victim, cost)
        if sweep.norm in LP:
            groups.setdefault(sweep.victim.key, set()).update(sweep.threat_key(eps) for eps in sweep.budgets)
    sizes = {s.victim.key: images_of(s) for s in left}
    for key, threats in groups.items():
        add(costs[key][0], audit_cost(costs[key][0], audit, sizes[key], len(threats)))
    for proof in proofs:
        if done.get(proof.key) != "ok":
            add(proof.victim, certificate_cost(proof))
    unknown = dict.fromkeys(s.attack.label for s in left if not cost_of(s).known)
    unsized = dict.fromkeys(s.victim.dataset.label for s in left if _unsized(s))
    return Forecast(costs, tuple(unknown), tuple(unsized))


def _unsized(sweep: Sweep) -> bool:
    """Whether more images were asked for than there may be; what a dataset itself proposes it has."""
    info: DatasetInfo = sweep.victim.dataset.value.info()
    return info.images is None and sweep.limit not in (None, info.evaluate)
