"""Conformance of evasion attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advplug.contracts import (
    Access,
    AttackCaps,
    Ball,
    Batch,
    Crafted,
    Decision,
    EvasionAttack,
    MinimumNorm,
    Perturbation,
    PoisonCaps,
    Strength,
    Targeted,
    Threat,
    Trace,
)
from advplug.judging import IMAGE_TEXT
from advplug.perturbations import BALLS, CUSTOMARY, SETS
from advplug.pipeline import allowed
from advplug.registry import Entry, registry
from advplug.rng import Stream
from advplug.testing.poisons import poison_results
from advplug.testing.problems import (
    LinearProblem,
    fragile,
    fragile_batch,
    linear_problem,
)
from advplug.testing.report import Report, Result, Unchecked, require
from advplug.testing.sources import bound
from advplug.testing.state import demand_unchanged, differences, fingerprint, with_gradients
from advplug.victim import Victim

REACH = 1.25
"""A gradient attack that iterates has to flip an image at this many times its exact radius."""


def attack_results(name: str, params: Mapping[str, Any]) -> list[Result]:
    """One result a check and norm. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("attack", name)
    checked = bound(entry, params)
    caps = entry.spec.caps_of(checked)
    if isinstance(caps, PoisonCaps):
        return poison_results(entry, caps, checked)
    assert isinstance(caps, AttackCaps)
    report = Report()
    report.check("declaration", lambda: _declaration(caps))
    if caps.modality not in ("image", IMAGE_TEXT) or caps.access is Access.TRAINING_SET:
        kind = "training-set" if caps.access is Access.TRAINING_SET else caps.modality
        report.results.append(Result("behaviour", None, f"the kit has no checks for {kind} attacks"))
        return report.results
    for norm in [n for n in SETS if n in caps.norms]:
        case = Case(entry, caps, checked, norm)
        if report.check(f"{norm}: runs", case.runs):
            for label, test in case.checks().items():
                report.check(f"{norm}: {label}", test)
    return report.results


def _declaration(caps: AttackCaps) -> None:
    require(caps.norms, "it declares no norm")
    require(caps.norms <= set(SETS), f"norms must be among {', '.join(SETS)}, it declares {sorted(caps.norms)}")
    balls = caps.norms <= set(BALLS)
    require(balls or not caps.minimum_norm, f"minimum-norm attacks work in {', '.join(BALLS)}")
    goals = {"untargeted", "targeted", "minimise"}
    require(caps.goals and caps.goals <= goals, f"goals must be among {sorted(goals)}, it has {sorted(caps.goals)}")
    require(isinstance(caps.access, Access), "access must be an advplug.contracts.Access")
    require(isinstance(caps.strength, Strength), "strength must be an advplug.contracts.Strength")
    require(caps.min_classes >= 2, "min_classes must be at least 2")


class Elsewhere(NamedTuple):
    """Images, what was made of them, and what was left changed."""

    batch: Batch
    made: Crafted
    changed: list[str]


@dataclass
class Case:
    """One attack in one norm on the linear problem."""

    entry: Entry
    caps: AttackCaps
    params: Mapping[str, Any]
    norm: str

    @cached_property
    def problem(self) -> LinearProblem:
        return linear_problem(self.norm if self.closed else "linf", classes=self._classes, targeted=self._targeted_only)

    @property
    def _classes(self) -> int:
        return min(max(5, self.caps.min_classes), self.caps.max_classes or 5)

    @property
    def _targeted_only(self) -> bool:
        return "untargeted" not in self.caps.goals

    @property
    def closed(self) -> bool:
        """Whether the exact radii of the linear problem are known in this set."""
        return self.norm in BALLS

    def threat(self, problem: LinearProblem, eps: Fraction | None = None) -> Threat:
        goal = problem.threat().goal
        return Threat(self.allowed(self._budget(problem) if eps is None else eps), goal, self.caps.access)

    def _budget(self, problem: LinearProblem) -> Fraction:
        return problem.eps if self.closed else CUSTOMARY[self.norm]

    def allowed(self, eps: Fraction) -> Perturbation:
        if self.caps.minimum_norm:
            return MinimumNorm(self.norm, eps)
        return allowed(self.attack(self.problem.victim()), self.norm, eps)

    def twins(self, victim: Victim) -> dict[str, Victim]:
        return {n: replace(victim) for n in self.entry.needs(self.params)}

    def attack(self, victim: Victim) -> EvasionAttack:
        """A new attack; every victim that it needs is a twin of `victim`."""
        made: EvasionAttack = self.entry.make(self.params, **self.twins(victim))
        return made

    def craft(self, rows: Tensor | None = None, *, seed: int = 0, eps: Fraction | None = None) -> Crafted:
        victim = self.problem.victim()
        attack = self.attack(victim)
        return attack(victim, self.problem.copy(rows), self.threat(self.problem, eps), Stream(seed, "attack"))

    @cached_property
    def main(self) -> Crafted:
        return self.craft()

    def flipped(self, x: Tensor) -> Tensor:
        """What succeeded: wrong answers, or the target for attacks that know no other goal."""
        label, target = self.problem.victim().decide(x).label, self.problem.batch.target
        return label != self.problem.batch.y if target is None else label == target

    def runs(self) -> None:
        crafted, x = self.main, self.problem.batch.x
        require(isinstance(crafted, Crafted), f"it must return Crafted, it returned {type(crafted).__name__}")
        require(isinstance(crafted.x, Tensor), "Crafted.x must be a tensor")
        for what in ("shape", "dtype", "device"):
            want, got = getattr(x, what), getattr(crafted.x, what)
            require(got == want, f"it returned images of {what} {got}, given {want}")
        require(crafted.x.isfinite().all(), "it returned NaN or infinite pixels")

    def checks(self) -> dict[str, Any]:
        return {
            "stays inside the ball": self.inside,
            "flips nothing within the exact radius": self.sound,
            "flips beyond the exact radius": self.strong,
            "eps = 0 returns the input": self.zero,
            "same seed, same images": self.repeatable,
            "does not depend on the batch": self.batching,
            "targeted": self.targeted,
            "leaves inputs and model as they were": self.clean_hands,
            "takes any image size": self.odd_sizes,
            "uses the access it declares": self.access,
            "trace": self.trace,
        }

    def inside(self) -> None:
        problem, x_adv = self.problem, self.main.x
        ball, applied = self.allowed(self._budget(problem)), self.main.applied
        size = ball.measure(problem.batch.x, x_adv, applied)
        worst = f"sizes up to {float(size.max()):.7g} at eps {float(ball.eps):g}"
        span = f"pixels {float(x_adv.min()):.7g} to {float(x_adv.max()):.7g}"
        require(ball.check(problem.batch.x, x_adv, applied).all(), f"it leaves the ball or [0, 1]: {worst}, {span}")

    def sound(self) -> None:
        if not self.closed:
            raise Unchecked(f"no exact radius is known for {self.norm} changes")
        flipped, radius = self.flipped(self.main.x), self.problem.radius
        wrong = flipped & (radius > self.reached(self.main.x) * 1.001)
        require(not wrong.any(), f"{int(wrong.sum())} images flipped that no change of that size can flip")

    def reached(self, x: Tensor) -> Tensor:
        """How far (B,) the attack could have gone: the budget, or where it went by itself."""
        size = Ball(self.norm, self.problem.eps).measure(self.problem.batch.x, x)
        return size if self.caps.minimum_norm else torch.full_like(size, float(self.problem.eps))

    def strong(self) -> None:
        if self.caps.modality == IMAGE_TEXT:
            raise Unchecked("it follows similarities, not answers")
        if self.caps.access is not Access.GRADIENT or self.caps.strength < Strength.ITERATIVE:
            raise Unchecked("only asked of iterative gradient attacks")
        if not self.closed:
            raise Unchecked(f"no exact radius is known for {self.norm} changes")
        self._flips(self.flipped(self.main.x), "flipped")

    def _flips(self, success: Tensor, verb: str) -> None:
        if self.caps.minimum_norm:
            # Attacks that count channel values touch up to as many pixels for each of the fewest as it has channels.
            reach = float(self.problem.batch.x.shape[1]) if self.norm == "l0" else REACH
            far = self.reached(self.main.x) > self.problem.radius * reach
            missed = int((far | ~success).sum())
            require(missed == 0, f"{missed} of {len(far)} images were not {verb} within {reach} times the exact radius")
            return
        within = self.problem.radius * REACH <= float(self.problem.eps)
        missed = int((within & ~success).sum())
        text = f"{missed} of {int(within.sum())} images were not {verb} at {REACH} times the exact radius and more"
        require(missed == 0, text)

    def zero(self) -> None:
        if self.caps.minimum_norm or self.norm == "unrestricted":
            raise Unchecked("it has no budget to set to 0")
        x = self.craft(eps=Fraction(0)).x
        require(torch.equal(x, self.problem.batch.x), "with eps = 0 it changed the images")

    def repeatable(self) -> None:
        again = self.craft().x
        require(torch.equal(again, self.main.x), "two runs with the same seed differ; draw from the stream given")
        if not self.caps.stochastic:
            other = self.craft(seed=1).x
            require(torch.equal(other, self.main.x), "another seed gives other images; declare stochastic=True")

    def batching(self) -> None:
        """The verdicts, image by image, whatever else is in the batch."""
        if self.caps.per_batch:
            raise Unchecked("it declares that its draws are shared by a batch")
        rows = torch.arange(len(self.problem.batch))
        parts = [self.craft(part).x for part in (rows[:3], rows[3:])]
        x = torch.cat(parts)
        differ = int((self.flipped(x) != self.flipped(self.main.x)).sum())
        require(differ == 0, f"{differ} verdicts change with the batch; seed by Batch.index (Stream.per_image)")

    def targeted(self) -> None:
        if "targeted" not in self.caps.goals:
            raise Unchecked("it declares untargeted goals only")
        problem = linear_problem(self.norm if self.closed else "linf", classes=self._classes, targeted=True)
        victim, target = problem.victim(), problem.batch.target
        threat = self.threat(problem)
        made = self.attack(victim)(victim, problem.copy(), threat, Stream(0, "attack"))
        inside = threat.perturbation.check(problem.batch.x, made.x, made.applied)
        require(inside.all(), "targeted, it leaves the ball or [0, 1]")
        assert target is not None  # this problem has one
        if not self.closed or self.caps.minimum_norm:
            return
        hit = victim.decide(made.x).label == target
        require(not (hit & (problem.radius > float(problem.eps) * 1.001)).any(), "targeted, it hit too far")
        answers = self.caps.modality != IMAGE_TEXT
        if answers and self.caps.access is Access.GRADIENT and self.caps.strength >= Strength.ITERATIVE:
            self._flips(hit, "turned into their target")

    @cached_property
    def elsewhere(self) -> Elsewhere:
        """A run on a net with one channel, if it may, and images neither square nor even, and what it left changed."""
        channels = 1 if self.caps.channels is None or 1 in self.caps.channels else self.caps.channels[0]
        module = fragile(channels, classes=self.problem.classes)
        batch = fragile_batch(module, shape=(channels, 9, 7))
        # As a user may hand it over: gradients present, one parameter frozen.
        with_gradients(module, lambda m: m(batch.x).sum())
        next(iter(module.parameters())).requires_grad_(False)
        victim = replace(self.problem.victim(), module=module)
        attack = self.attack(victim)
        kept = {n: getattr(batch, n).clone() for n in ("x", "y", "index", "target")}
        before = fingerprint(module)
        made = attack(victim, batch, self._threat(), Stream(0, "attack"))
        changed = differences(before, fingerprint(module))
        changed += [f"Batch.{n}" for n, value in kept.items() if not torch.equal(getattr(batch, n), value)]
        return Elsewhere(batch, made, changed + ["Batch.x.requires_grad"] * batch.x.requires_grad)

    def clean_hands(self) -> None:
        demand_unchanged(self.elsewhere.changed)

    def _threat(self) -> Threat:
        goal = self.problem.threat().goal if "untargeted" in self.caps.goals else Targeted()
        return Threat(self.allowed(self._budget(self.problem)), goal, self.caps.access)

    def odd_sizes(self) -> None:
        clean, made = self.elsewhere.batch.x, self.elsewhere.made
        x = made.x
        require(x.shape == clean.shape, f"it returned shape {tuple(x.shape)} for {tuple(clean.shape)}")
        require(self._threat().perturbation.check(clean, x, made.applied).all(), "it leaves the ball or [0, 1] there")

    def access(self) -> None:
        if self.caps.access is Access.GRADIENT:
            raise Unchecked("gradient attacks may use everything")
        kind = Blind if self.caps.access is Access.DECISION else NoGradient
        victim = kind(_Opaque(self.problem.module), self.problem.classes, stream=Stream(0, "victim"))
        # The victims that it needs are the attacker's own and stay open.
        twins = {n: self.problem.victim() for n in self.entry.needs(self.params)}
        attack = self.entry.make(self.params, **twins)
        attack(victim, self.problem.copy(), self.threat(self.problem), Stream(0, "attack"))

    def trace(self) -> None:
        trace = self.main.trace
        if trace is None:
            raise Unchecked("it gives none, so checks that need one stay unchecked")
        require(isinstance(trace, Trace), "Crafted.trace must be an advplug.contracts.Trace")
        for name in ("any_iterate", "final_iterate", "steps", "zero_gradient", "nonfinite", "queries"):
            value = getattr(trace, name)
            if value is None:
                continue
            require(tuple(value.shape) == (len(self.main.x),), f"trace.{name} must be (B,), it is {tuple(value.shape)}")
            require(value.device.type == "cpu", f"trace.{name} must be on the CPU")
        if trace.any_iterate is None or trace.final_iterate is None:
            return
        late = trace.final_iterate.bool() & ~trace.any_iterate.bool()
        require(not late.any(), "trace: a success at the last iterate is one at some iterate")


class _Opaque(nn.Module):
    """A model without gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.module(x)
        return logits


class NoGradient(Victim):
    """A victim that answers with scores only."""

    def attacked(self, x: Tensor, view: int = 0) -> Tensor:
        return super().attacked(x, view).detach()


class Blind(NoGradient):
    """A victim that answers with labels only."""

    def attacked(self, x: Tensor, view: int = 0) -> Tensor:
        require(False, "it declares access 'decision' and asked for scores")
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.attacked(x)

    def decide(self, x: Tensor) -> Decision:
        with torch.no_grad():
            label = self.module(x).argmax(1)
        self.passes.forward += len(x)
        return Decision(label, torch.ones_like(label, dtype=torch.bool))
