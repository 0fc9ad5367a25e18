"""Conformance of defenses, stage by stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advplug.contracts import (
    Calibrated,
    DatasetInfo,
    Defense,
    DefenseCaps,
    Fit,
    Gradient,
    Objective,
    Schedule,
    Sift,
    TrainingData,
    Tune,
    Wrap,
)
from advplug.data import ArrayImages, Split
from advplug.errors import AdvplugError
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing.problems import DUAL, linear_problem
from advplug.testing.report import Report, Result, Unchecked, require
from advplug.testing.sources import bound
from advplug.testing.stages import data_checks, digits, objective_checks, sift_checks, training_of, trains
from advplug.testing.state import unchanged
from advplug.train import Training
from advplug.victim import Victim

STAGES: dict[type, str] = {
    TrainingData: "data",
    Sift: "data",
    Objective: "objective",
    Fit: "objective",
    Tune: "tune",
    Wrap: "wrap",
    Calibrated: "wrap",
}
"""The stages and what `DefenseCaps.stages` calls them."""
SAMPLES = 32
"""Images whose directional derivative is compared; nine in ten must agree within 1 %."""

SURENESS = 12.0
"""Logits for each unit of the regression's indicators, 0 or 1: mean confidence 0.92, accuracy 0.93."""


def defense_results(name: str, params: Mapping[str, Any], on: str, clean_drop: float) -> list[Result]:
    """One result a check and stage. Raises UsageError for an unknown name or a bad parameter."""
    entry = registry().get("defense", name)
    checked = bound(entry, params)
    caps: DefenseCaps = entry.spec.caps_of(checked)  # type: ignore[assignment]
    report = Report()
    made: list[Defense] = []
    needs = entry.needs(checked)
    if needs:
        report.results.append(
            Result("behaviour", None, f"it needs other victims: {', '.join(map(str, needs.values()))}")
        )
        return report.results
    if not report.check("factory", lambda: made.append(_made(entry.make(checked)))):
        return report.results
    stages = made[0]
    cases = {id(s): WrapCase(s, _tunes_before(s, stages)) for s in stages if isinstance(s, Wrap | Calibrated)}
    report.check("declaration", lambda: _declaration(stages, tuple(c.wrap for c in cases.values()), caps))
    makers: dict[type, Callable[[Any], dict[str, Callable[[], None]]]] = {
        Wrap: lambda stage: _wrap_checks(cases[id(stage)], clean_drop),
        Calibrated: lambda stage: _wrap_checks(cases[id(stage)], clean_drop),
        Objective: objective_checks,
        Fit: lambda stage: {"fit": lambda: trains(stage.apply, None, on)},
        TrainingData: data_checks,
        Sift: lambda stage: sift_checks(stage, on),
        Tune: lambda stage: {"tune": lambda: trains(stage.apply, stage.rebuild, on)},
    }
    for stage in stages:
        for label, test in makers[type(stage)](stage).items():
            report.check(label, test)
    return report.results


def _made(stages: Any) -> Defense:
    require(isinstance(stages, tuple) and stages, "a factory must return a tuple of stages, like (Wrap(...),)")
    for stage in stages:
        known = ", ".join(c.__name__ for c in STAGES)
        require(type(stage) in STAGES, f"{type(stage).__name__} is no stage; stages are {known}")
    return tuple(stages)


def _declaration(stages: Defense, wraps: tuple[Wrap, ...], caps: DefenseCaps) -> None:
    have = tuple(STAGES[type(stage)] for stage in stages)
    require(sorted(have) == sorted(caps.stages), f"its caps declare the stages {caps.stages}, it returned {have}")
    victim = Victim(nn.Identity(), 2, wraps)
    require(victim.gradient is caps.gradient, f"its caps say gradient={caps.gradient}, its wraps say {victim.gradient}")
    require(victim.stochastic is caps.stochastic, f"its caps say stochastic={caps.stochastic}, its wraps do not")
    told = f"its caps say rejects={caps.rejects}, its wraps say {victim.rejects}"
    require(victim.rejects is caps.rejects, told)
    norms = [w.certifier.norm for w in wraps if w.certifier is not None]
    require(
        norms == [caps.certifies] * bool(caps.certifies), f"its caps say certifies={caps.certifies}, it has {norms}"
    )


# --- wraps -----------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A small float64 net without kinks, so that finite differences tell the truth."""

    def __init__(self) -> None:
        super().__init__()
        with Stream(0, "smooth").as_global():
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 6))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.double() - 0.5)
        return logits


def _tunes_before(wrap: Wrap | Calibrated, stages: Defense) -> tuple[Tune, ...]:
    return tuple(s for s in stages[: stages.index(wrap)] if isinstance(s, Tune))


def _tuned(module: nn.Module, tunes: tuple[Tune, ...], training: Training) -> nn.Module:
    """The module that a wrap stands around: what the tunes before it make, or as it is where one does not take it."""
    with training.stream.as_global():
        for tune in tunes:
            try:
                module = tune.apply(copy.deepcopy(module), training).model.eval()
            except AdvplugError:
                return module
    return module


def _fitted(stage: Wrap | Calibrated, module: nn.Module, training: Training) -> Wrap:
    """The wrap itself, measured on the module and the training data where it has to be."""
    if isinstance(stage, Wrap):
        return stage
    with torch.no_grad(), training.stream.as_global():
        figures = stage.measure(module, training)
    require(json.loads(json.dumps(figures)) == figures, "what a wrap is made from must be figures that JSON can hold")
    return stage.wrap(figures)


@dataclass
class WrapCase:
    """One wrap around `Smooth`, as the defense's `tunes` before it leave that, with images away from 0 and 1."""

    stage: Wrap | Calibrated
    tunes: tuple[Tune, ...] = ()

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = 0.1 + 0.8 * torch.rand(SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64)
        labels = np.arange(SAMPLES) % 6
        data = Split(ArrayImages(self.x.float().numpy()), labels, np.arange(SAMPLES))
        info = DatasetInfo(tuple("012345"), 3, (16, 16), {})
        self.training = Training(data, info, Schedule(epochs=1), torch.device("cpu"), Stream(0, "tune"))
        self.module = _tuned(Smooth(), self.tunes, self.training)
        self.side = torch.randn(SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64)

    @cached_property
    def wrap(self) -> Wrap:
        return _fitted(self.stage, self.module, self.training)

    def call(self, forward: Callable[..., Tensor], x: Tensor, seed: int = 0) -> Tensor:
        return forward(self.module, x, torch.Generator().manual_seed(seed))

    @property
    def attacked(self) -> tuple[Callable[..., Tensor], ...]:
        """What an attacker differentiates."""
        return self.wrap.surrogates or (self.wrap.forward,)

    def loss(self, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        logits = self.call(forward, x).double()
        rows = torch.arange(len(x)) % logits.shape[1]
        return -logits.log_softmax(1)[torch.arange(len(x)), rows]

    def gradient(self, forward: Callable[..., Tensor]) -> Tensor:
        leaf = self.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(forward, leaf).sum(), leaf)
        return gradient


def _wrap_checks(case: WrapCase, clean_drop: float) -> dict[str, Callable[[], None]]:
    return {
        "wrap: logits": lambda: _wrap_logits(case),
        "wrap: gradient as declared": lambda: _wrap_gradient(case),
        "wrap: randomness as declared": lambda: _wrap_randomness(case),
        "wrap: answers image by image": lambda: _wrap_image_by_image(case),
        "wrap: accepts": lambda: _wrap_accepts(case),
        "wrap: rejection": lambda: _wrap_rejection(case),
        "wrap: clean accuracy": lambda: _wrap_accuracy(case, clean_drop),
        "wrap: certificates": lambda: _wrap_certificates(case),
    }


def _wrap_logits(case: WrapCase) -> None:
    kept, x = case.x.clone(), case.x.clone()
    want = tuple(case.module(x).shape)
    for forward in (case.wrap.forward, *case.wrap.surrogates):
        with unchanged(case.module):
            logits = case.call(forward, x)
        require(isinstance(logits, Tensor), "forward and surrogates must return logits")
        require(tuple(logits.shape) == want, f"logits must be {want}, they are {tuple(logits.shape)}")
        require(logits.isfinite().all(), "logits must be finite")
        require(torch.equal(x, kept), "it changes its input in place")


def _wrap_gradient(case: WrapCase) -> None:
    if case.wrap.gradient is Gradient.NONE:
        raise Unchecked("it declares that no gradient passes")
    for forward in case.attacked:
        gradient = case.gradient(forward)
        require(gradient.isfinite().all(), "gradients must be finite")
        nonzero = (gradient.flatten(1).abs().sum(1) > 0).double().mean()
        require(nonzero == 1, f"the gradient vanishes for {float(1 - nonzero):.0%} of the images")
    if case.wrap.gradient is Gradient.EXACT:
        share = _agreement(case)
        require(share >= 0.9, f"finite differences agree for {share:.0%} of the images; declare BPDA and a surrogate")


def _agreement(case: WrapCase) -> float:
    """The share of images where the directional derivative of the true forward is what autograd says."""
    step, forward = 1e-5, case.wrap.forward
    with torch.no_grad():
        numeric = (case.loss(forward, case.x + step * case.side) - case.loss(forward, case.x - step * case.side)) / (
            2 * step
        )
    exact = (case.gradient(forward) * case.side).flatten(1).sum(1)
    scale = torch.maximum(exact.abs(), numeric.abs()).clamp_min(1e-6)
    return float(((numeric - exact).abs() / scale < 1e-2).double().mean())


def _wrap_randomness(case: WrapCase) -> None:
    with torch.no_grad():
        first, again = case.call(case.wrap.forward, case.x), case.call(case.wrap.forward, case.x)
        other = case.call(case.wrap.forward, case.x, seed=1)
    require(torch.equal(first, again), "the same generator state gives other logits; draw from the generator given")
    differs = not torch.equal(first, other)
    found = "changes" if differs else "does not change"
    require(differs is case.wrap.stochastic, f"stochastic={case.wrap.stochastic}, but the output {found} with the draw")
    require(case.wrap.draws >= 1, "draws must be at least 1")


def _wrap_image_by_image(case: WrapCase) -> None:
    if case.wrap.stochastic:
        raise Unchecked("draws differ from call to call")
    with torch.no_grad():
        together = case.call(case.wrap.forward, case.x[:4])
        alone = torch.cat([case.call(case.wrap.forward, case.x[i : i + 1]) for i in range(4)])
    require(torch.allclose(together, alone, rtol=1e-4, atol=1e-6), "logits change with the rest of the batch")


def _wrap_accepts(case: WrapCase) -> None:
    if case.wrap.accepts is None:
        raise Unchecked("it rejects nothing")
    accepted = case.wrap.accepts(case.x, case.call(case.wrap.forward, case.x))
    require(accepted.dtype == torch.bool and accepted.shape == (len(case.x),), "accepts must give bool (B,)")


def _wrap_rejection(case: WrapCase) -> None:
    rejection = case.wrap.rejection
    if rejection is None:
        raise Unchecked("it has no score of its own to reject by")
    leaf = case.x.clone().requires_grad_()
    score = case.call(rejection, leaf)
    require(
        score.shape == (len(leaf),) and score.isfinite().all(), "rejection must give a finite number an image, (B,)"
    )
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    alive = (gradient.flatten(1).abs().sum(1) > 0).double().mean()
    require(gradient.isfinite().all() and alive == 1, f"its gradient vanishes for {float(1 - alive):.0%} of the images")
    with torch.no_grad():
        require(torch.allclose(score, case.call(rejection, case.x)), "its value changes where gradients are recorded")


def _wrap_accuracy(case: WrapCase, clean_drop: float) -> None:
    dataset = digits()
    module = ridge()
    training = training_of(dataset, None)
    tuned = _tuned(module, case.tunes, training) if case.tunes else module
    wrap = _fitted(case.stage, tuned, training)
    batch = dataset.test.batch(np.arange(min(256, len(dataset.test))))

    def accuracy(module: nn.Module, *wraps: Wrap) -> float:
        decision = Victim(module, len(dataset.info.classes), wraps).decide(batch.x)
        return float(((decision.label == batch.y) & decision.accepted).double().mean())

    drop = accuracy(module) - accuracy(tuned, wrap)
    costs = f"it costs {drop:.1%} of clean accuracy on digits, {clean_drop:.1%} is the bound given"
    require(drop <= clean_drop, f"{costs}; milder defaults cost less, and clean_drop= of check_defense allows more")


def _wrap_certificates(case: WrapCase) -> None:
    """Two classes and a linear model: the true radius is known, and no certificate may exceed it."""
    certifier = case.wrap.certifier
    if certifier is None:
        raise Unchecked("it certifies nothing")
    require(certifier.norm in DUAL, f"certificates are in {', '.join(DUAL)}, this one is in {certifier.norm}")
    problem = linear_problem(certifier.norm, images=8, classes=2)
    for image, y, radius in zip(problem.batch.x, problem.batch.y, problem.radius, strict=True):
        found, again = (
            certifier.certify(problem.module, image, torch.Generator().manual_seed(0), size) for size in (64, 7)
        )
        require(found == again, "the size of a pass changes the certificate")
        require(found.label in (-1, int(y)), f"it certifies class {found.label} for an image of class {int(y)}")
        told = f"it certifies a radius of {found.radius:.4f} where a change of {float(radius):.4f} breaks the image"
        require(found.radius <= float(radius) * (1 + 1e-6), told)
        require(found.label != -1 or found.radius == 0, "an image without certificate has a radius")


@cache
def ridge() -> nn.Module:
    """A linear classifier of digits by ridge regression: real images, solved in closed form.

    Its softmax is about as sure as it is right, so that defenses of probabilities find what they expect.
    """
    dataset = digits()
    batch = dataset.train.batch(np.arange(len(dataset.train)))
    x = batch.x.flatten(1).double() - 0.5
    wanted = nn.functional.one_hot(batch.y, len(dataset.info.classes)).double()
    mean = wanted.mean(0)
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ (wanted - mean))
    linear = nn.Linear(*weight.shape)
    with torch.no_grad():
        linear.weight.copy_(SURENESS * weight.T)
        linear.bias.copy_(SURENESS * (mean - 0.5 * weight.sum(0)))
    return nn.Sequential(nn.Flatten(), linear).eval()
