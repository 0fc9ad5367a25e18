"""The conformance kit on defenses: each planted fault trips its own check, and the sound twin passes all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.contracts import (
    DefenseCaps,
    Gradient,
    Objective,
    Sift,
    Sifted,
    TrainingData,
    Tune,
    Tuned,
    Wrap,
)
from advplug.data import Split
from advplug.testing import check_defense
from planting import breaches


def plain(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x)


def rounds(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner((x * 15).round() / 15)


def straight(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + ((x * 15).round() / 15 - x).detach())


def half_detached(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(0.5 * x + 0.5 * x.detach())


def noisy(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + 0.01 * torch.randn(x.shape, generator=rng, dtype=x.dtype))


def globally_noisy(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x + 0.01 * torch.randn_like(x))


def inverts(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(1 - x)


def in_place(inner: Any, x: Tensor, rng: Any) -> Tensor:
    x.data.mul_(0.9)
    return inner(x)


def batch_mean(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x - 0.1 * x.mean(0, keepdim=True))


def two_columns(inner: Any, x: Tensor, rng: Any) -> Tensor:
    return inner(x)[:, :2]


WRAP = DefenseCaps(("wrap",))
NOISY = DefenseCaps(("wrap",), stochastic=True)
BPDA = DefenseCaps(("wrap",), gradient=Gradient.BPDA)
WRAP_FAULTS: list[tuple[tuple[Any, ...], DefenseCaps, str]] = [
    ((Wrap(rounds),), WRAP, "wrap: gradient as declared: the gradient vanishes for 100% of the images"),
    ((Wrap(half_detached),), WRAP, "wrap: gradient as declared: finite differences agree for 0% of the images"),
    ((Wrap(straight),), WRAP, "wrap: gradient as declared: finite differences agree for"),
    ((Wrap(rounds, Gradient.BPDA),), BPDA, "wrap: gradient as declared: the gradient vanishes"),
    ((Wrap(noisy),), WRAP, "wrap: randomness as declared: stochastic=False, but the output changes"),
    ((Wrap(plain, stochastic=True),), NOISY, "stochastic=True, but the output does not change"),
    ((Wrap(globally_noisy, stochastic=True),), NOISY, "the same generator state gives other logits"),
    ((Wrap(globally_noisy, stochastic=True),), NOISY, "wrap: logits: it leaves changed: the global random state"),
    ((Wrap(inverts),), WRAP, "wrap: clean accuracy: it costs"),
    ((Wrap(plain, accepts=lambda x, z: z[:, 0] > 1e9),), replace(WRAP, rejects=True), "wrap: clean accuracy: it costs"),
    ((Wrap(plain, accepts=lambda x, z: z[:, 0]),), replace(WRAP, rejects=True), "wrap: accepts"),
    ((Wrap(in_place),), WRAP, "wrap: logits: it changes its input in place"),
    ((Wrap(batch_mean),), WRAP, "wrap: answers image by image: logits change"),
    ((Wrap(two_columns),), WRAP, "wrap: logits: logits must be (32, 6), they are (32, 2)"),
    ((Wrap(plain),), NOISY, "declaration: its caps say stochastic=True"),
    ((Wrap(plain),), BPDA, "declaration: its caps say gradient=bpda, its wraps say exact"),
    ((Wrap(plain),), replace(WRAP, rejects=True), "declaration: its caps say rejects=True"),
    ((Wrap(plain),), DefenseCaps(("tune",)), "declaration: its caps declare the stages ('tune',)"),
    (("wrap",), WRAP, "factory: str is no stage"),
    ((), WRAP, "factory: a factory must return a tuple of stages"),
]


@pytest.mark.parametrize(
    ("stages", "caps"),
    [
        ((Wrap(plain),), WRAP),
        ((Wrap(noisy, stochastic=True, draws=4),), NOISY),
        ((Wrap(rounds, Gradient.BPDA, (straight,)),), BPDA),
        ((Wrap(plain, accepts=lambda x, z: z[:, 0] < 1e9),), replace(WRAP, rejects=True)),
        ((Wrap(plain), Wrap(rounds, Gradient.BPDA, (straight,))), replace(BPDA, stages=("wrap", "wrap"))),
    ],
)
def test_sound_wraps_pass(stages: Any, caps: DefenseCaps, plant: Callable[..., str]) -> None:
    assert breaches(check_defense, plant("defense", caps, lambda: stages)) == ""


@pytest.mark.parametrize(("stages", "caps", "found"), WRAP_FAULTS)
def test_faults_of_wraps_are_found(stages: Any, caps: DefenseCaps, found: str, plant: Callable[..., str]) -> None:
    assert found in breaches(check_defense, plant("defense", caps, lambda: stages))


def smooth(model: Any, x: Tensor, y: Tensor, rng: Any) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)


def train_in_eval(model: Any, x: Tensor, y: Tensor, rng: Any) -> Tensor:
    return smooth(model.eval(), x, y, rng)


def thin(split: Split, rng: Any) -> Split:
    return split.subset(np.arange(0, len(split), 2))


def shuffled(split: Split, rng: Any) -> Split:
    return split.subset(np.random.permutation(len(split)))


def relabels(split: Split, rng: Any) -> Split:
    split.labels[:] = 0
    return split


def same(model: Any, training: Any) -> Tuned:
    return Tuned(model)


def fits(model: Any, training: Any) -> Tuned:
    return Tuned(training.fit(model))


def wrong_head(model: Any, training: Any) -> Tuned:
    with training.stream.as_global():
        return Tuned(nn.Sequential(model, nn.Linear(10, 3)))


def reseeds(model: Any, training: Any) -> Tuned:
    torch.manual_seed(0)
    return Tuned(model)


def widened(model: Any, training: Any) -> Tuned:
    with training.stream.as_global():
        return Tuned(nn.Sequential(model, nn.Linear(10, 10)), {"shape": torch.tensor([10])})


def confident(trained: Any, training: Any) -> Sifted:
    batch = training.data.batch(np.arange(len(training.data)))
    with torch.no_grad():
        scores = trained()(batch.x).softmax(1).max(1).values
    return Sifted((scores >= scores.median()).numpy(), {"median": scores.median().item()})


DRAWS = np.random.default_rng(0)
STAGE_FAULTS: list[tuple[Any, str, str]] = [
    (Objective(lambda m, x, y, r: smooth(m, x, y, r).detach()), "objective", "objective: raised RuntimeError"),
    (Objective(lambda m, x, y, r: m(x)), "objective", "objective: loss must be a scalar tensor"),
    (Objective(lambda m, x, y, r: smooth(m, x, y, r) / 0), "objective", "objective: the loss is inf"),
    (Objective(train_in_eval), "objective", "objective: it leaves the model in another mode"),
    (TrainingData(shuffled), "data", "data: it leaves changed: the global random state of NumPy"),
    (TrainingData(relabels), "data", "data: it changes the labels in place"),
    (TrainingData(lambda s, r: s.subset(np.arange(1))), "data", "data: 1 images are left"),
    (TrainingData(lambda s, r: None), "data", "data: it must return a Split, it returned NoneType"),
    (Sift(lambda m, t: Split), "data", "sift: it must return Sifted, it returned type"),
    (Sift(lambda m, t: Sifted(np.ones(3, bool))), "data", "sift: kept must be (128,) bool, it is (3,) bool"),
    (Sift(lambda m, t: Sifted(np.zeros(len(t.data), bool))), "data", "sift: 0 images are left"),
    (Sift(lambda m, t: Sifted(DRAWS.random(len(t.data)) < 0.5)), "data", "sift: the same stream keeps other images"),
    (Sift(lambda m, t: Sifted(np.ones(len(t.data), bool), {"x": t})), "data", "sift: its facts must be figures"),
    (Tune(lambda m, t: m), "tune", "tune: it must return Tuned"),
    (Tune(wrong_head), "tune", "tune: the tuned model's logits have another shape"),
    (Tune(reseeds), "tune", "tune: it changes the original model or the process"),
    (Tune(widened), "tune", "tune: structure without rebuild cannot be restored"),
    (Tune(lambda m, t: Tuned(nn.Sequential(m))), "tune", "tune: raised RuntimeError"),
]  # fmt: skip


SOUND: list[tuple[Any, str]] = [
    (Objective(smooth), "objective"),
    (TrainingData(thin), "data"),
    (Sift(confident), "data"),
    (Tune(same), "tune"),
    (Tune(fits), "tune"),
]


@pytest.mark.parametrize(("stage", "kind"), SOUND)
def test_sound_training_stages_pass(stage: Any, kind: str, plant: Callable[..., str]) -> None:
    assert breaches(check_defense, plant("defense", DefenseCaps((kind,)), lambda: (stage,))) == ""


@pytest.mark.parametrize(("stage", "kind", "found"), STAGE_FAULTS)
def test_faults_of_training_stages_are_found(stage: Any, kind: str, found: str, plant: Callable[..., str]) -> None:
    assert found in breaches(check_defense, plant("defense", DefenseCaps((kind,)), lambda: (stage,)))
