"""Detectors: the score and its threshold, and attacks that have to get past it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug.attacks.engine import GradientAttack
from advplug.attacks.losses import LOSSES, undetected
from advplug.builtin.detectors import feature_squeezing
from advplug.contracts import Batch, Calibrated, DatasetInfo, DefenseCaps, Gradient, Schedule, Targeted, Wrap
from advplug.data import ArrayImages, Split
from advplug.defenses.filters import median
from advplug.defenses.squeezing import PRESETS, preset_for, score, threshold_at
from advplug.errors import CellFailure, UsageError
from advplug.rng import Stream
from advplug.testing import check_defense
from advplug.train import Training
from advplug.victim import Victim
from cli_tools import CNN, QUICK, TINY, evaluate, run
from linear import Affine, stream, threat
from planting import breaches

INFO = DatasetInfo(tuple("012"), 1, (8, 8), {})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Three classes of grey images, smooth enough for squeezed images to answer nearly alike."""

    def __init__(self) -> None:
        super().__init__()
        weight = 6 * torch.randn(3, 64, generator=generator(), dtype=torch.float64) / 8
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (x.double().flatten(1) - 0.5) @ self.weight.T
        return logits


def training(n: int = 200) -> Training:
    pixels = torch.rand(n, 1, 8, 8, generator=generator(1)).numpy()
    data = Split(ArrayImages(pixels), np.arange(n) % 3, np.arange(n))
    return Training(data, INFO, Schedule(), torch.device("cpu"), Stream(0, "test"))


def calibrated(**params: Any) -> Calibrated:
    [stage] = feature_squeezing(**params)
    assert isinstance(stage, Calibrated)
    return stage


# --- the score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"squeezers": "mnist"}, {"threshold": 1.0}, {"fpr": 0.2, "images": 90}])
def test_it_conforms(params: dict[str, Any]) -> None:
    assert {r.ok for r in check_defense("feature-squeezing", clean_drop=0.3, **params)} <= {True, None}


def test_the_score_is_the_largest_distance_of_probabilities() -> None:
    net, x = Net(), torch.rand(5, 1, 8, 8, generator=generator(2), dtype=torch.float64)

    def p(images: Tensor) -> np.ndarray[Any, Any]:
        z = np.exp(net(images).detach().numpy())
        return z / z.sum(1, keepdims=True)

    squeezed = (torch.from_numpy(np.rint(x.numpy())), median(x, 2))
    wanted = np.max([np.abs(p(x) - p(s)).sum(1) for s in squeezed], axis=0)
    assert np.allclose(score(net, x, PRESETS["mnist"]).detach().numpy(), wanted)


def test_the_scores_gradient_passes_squeezers_by_the_identity() -> None:
    net = Net()
    x = torch.rand(2, 1, 8, 8, generator=generator(3), dtype=torch.float64).requires_grad_()
    one_bit = {"bit-1": PRESETS["mnist"]["bit-1"]}
    (gradient,) = torch.autograd.grad(score(net, x, one_bit).sum(), x)
    free, squeezed = x.detach().clone().requires_grad_(), x.detach().round().requires_grad_()
    ((net(free).softmax(1) - net(squeezed).softmax(1)).abs().sum()).backward()  # type: ignore[no-untyped-call]
    assert free.grad is not None
    assert squeezed.grad is not None
    assert torch.allclose(gradient, free.grad + squeezed.grad)


def test_presets_are_the_papers() -> None:
    assert {name: list(s) for name, s in PRESETS.items()} == {
        "mnist": ["bit-1", "median-2x2"],
        "cifar": ["bit-5", "median-2x2", "nlm-13-3-2"],
        "imagenet": ["bit-5", "median-2x2", "nlm-11-3-4"],
    }
    sizes = {(1, (28, 28)): "mnist", (1, (224, 224)): "mnist", (3, (32, 32)): "cifar", (3, (224, 224)): "imagenet"}
    assert {k: preset_for(replace(INFO, channels=k[0], size=k[1])) for k in sizes} == sizes


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("n", [20, 97, 1000])
def test_the_threshold_is_the_smallest_that_keeps_the_rate(fpr: float, n: int) -> None:
    scores = torch.rand(n, generator=generator(n))
    found = threshold_at(scores, fpr)
    assert (scores > found).sum() <= fpr * n
    below = scores.double()[scores.double() < found].max()
    assert (scores > below).sum() > fpr * n - 1e-9
    with pytest.raises(CellFailure, match="not finite"):
        threshold_at(torch.tensor([0.0, torch.nan]), fpr)


def test_it_is_measured_on_training_images() -> None:
    net, data = Net(), training()
    stage = calibrated(fpr=0.1, images=150)
    figures = stage.measure(net, data)
    assert figures["preset"] == "mnist"
    assert figures["calibration_images"] == 150
    wrap = stage.wrap(figures)
    assert wrap.rejection is not None
    assert wrap.gradient is Gradient.BPDA
    rejected = ~Victim(net, 3, (wrap,)).decide(data.data.batch(np.arange(200)).x).accepted
    assert 0 < rejected.double().mean() < 0.2
    assert figures == stage.measure(net, data)


def test_an_explicit_threshold_needs_no_images_and_takes_no_rate() -> None:
    empty = training()
    empty.data = empty.data.subset(np.arange(0))
    stage = calibrated(threshold=0.7)
    assert stage.measure(Net(), empty)["threshold"] == 0.7
    with pytest.raises(UsageError, match="give one, as feature-squeezing:threshold=1"):
        calibrated().measure(Net(), empty)
    with pytest.raises(UsageError, match="not both"):
        feature_squeezing(threshold=1.0, fpr=0.1)


# --- where it stands in a victim -------------------------------------------------------------------


def watching(rejection: Any) -> Wrap:
    return Wrap(lambda inner, x, rng: inner(x), rejection=rejection)


def test_it_sees_what_reaches_it_and_the_model_is_asked_once() -> None:
    asked: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        asked.append(x)
        return x.flatten(1)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    def beyond(inner: Any, x: Tensor, rng: Any) -> Tensor:
        return inner(x).sum(1) - 2.5

    x = torch.tensor([[0.5, 0.5], [0.75, 0.75]]).view(2, 1, 1, 2)
    doubled = Wrap(lambda inner, images, rng: inner(2 * images))
    outside = Victim(Module(), 2, (watching(beyond), doubled))
    assert outside.decide(x).accepted.tolist() == [True, False]
    assert len(asked) == 1
    inside = Victim(Module(), 2, (doubled, watching(beyond)))
    assert inside.decide(x).accepted.tolist() == [True, False]
    assert Victim(Module(), 2, (doubled, watching(lambda inner, v, rng: v.flatten(1).sum(1) - 2.5))).decide(
        x
    ).accepted.tolist() == [True, True]
    logits, rejection = outside.attacked_detector(x)
    assert rejection is not None
    assert rejection.tolist() == [-0.5, 0.5]
    assert torch.equal(logits, 2 * x.flatten(1))
    assert outside.passes.forward == 4
    assert Victim(Module(), 2, (doubled,)).attacked_detector(x)[1] is None


def test_a_defense_that_asks_the_detector_several_times_is_named() -> None:
    voting = Wrap(lambda inner, x, rng: inner(x) + inner(x.flip(3)))
    victim = Victim(nn.Flatten(), 4, (watching(lambda inner, x, rng: inner(x).sum(1)), voting))
    with pytest.raises(CellFailure, match="write the detector last"):
        victim.decide(torch.rand(2, 1, 2, 2))


def test_what_it_says_beside_accepts_counts_too() -> None:
    wrap = replace(watching(lambda inner, x, rng: x.flatten(1)[:, 0] - 0.5), accepts=lambda x, z: z[:, 1] < 0.5)
    x = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9]]).view(3, 1, 1, 2)
    assert Victim(nn.Flatten(), 2, (wrap,)).decide(x).accepted.tolist() == [True, False, False]


# --- attacks ---------------------------------------------------------------------------------------


HALF = 24


def guarded() -> tuple[Victim, Batch]:
    """Two classes by a linear model, and a detector that watches half of the pixels: the other half is enough.

    Moving all pixels against the label lifts those watched by eps beyond what is allowed. What the others give
    alone crosses the boundary by a fifth.
    """
    weight = torch.zeros(2, 2 * HALF, dtype=torch.float64)
    weight[1] = 1.0
    margin = torch.linspace(0.5, 1.0, 10, dtype=torch.float64) * 0.1 * HALF / 1.2
    module = Affine(weight, torch.tensor([0.5 * 2 * HALF, 0.0], dtype=torch.float64))
    x = 0.5 - (margin / (2 * HALF)).view(-1, 1, 1, 1).expand(-1, 1, 2, HALF)

    def beyond(inner: Any, images: Tensor, rng: Any) -> Tensor:
        return images[:, :, 0].flatten(1).sum(1) - 0.5 * HALF - 0.02 * HALF

    batch = Batch(x.contiguous(), torch.zeros(10, dtype=torch.long), torch.arange(10))
    return Victim(module, 2, (watching(beyond),)), batch


@pytest.mark.parametrize("rule", ["steepest", "momentum", "adaptive"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("keep_going", [False, True])
def test_the_adaptive_attack_gets_through_where_the_naive_one_is_caught(
    rule: Literal["steepest", "momentum", "adaptive"], loss: str, keep_going: bool
) -> None:
    victim, batch = guarded()
    assert victim.decide(batch.x).accepted.all()
    attack = GradientAttack(rule=rule, steps=40, start="clean", loss=loss, keep_going=keep_going)
    blind = replace(attack, keep_going=True)(victim.bare, batch, threat(0.1), stream())
    caught = victim.decide(blind.x)
    assert (caught.label == 1).all()
    assert not caught.accepted.any()
    adaptive = attack(victim, batch, threat(0.1), stream())
    answer = victim.decide(adaptive.x)
    assert (answer.label == 1).all()
    assert answer.accepted.all()
    assert adaptive.trace is not None
    assert adaptive.trace.any_iterate is not None
    assert adaptive.trace.any_iterate.all()


def test_targets_are_reached_unnoticed_too() -> None:
    victim, batch = guarded()
    batch = replace(batch, target=torch.ones(10, dtype=torch.long))
    made = GradientAttack(steps=40, start="clean")(victim, batch, threat(0.1, goal=Targeted("next")), stream())
    assert victim.decide(made.x).fooled(batch.y, batch.target).all()


def test_an_image_that_is_caught_is_no_success() -> None:
    victim, batch = guarded()
    always = Victim(victim.module, 2, (watching(lambda inner, x, rng: torch.ones(len(x)) + 0 * x.flatten(1).sum(1)),))
    made = GradientAttack(steps=3, start="clean")(always, batch, threat(0.1), stream())
    assert made.trace is not None
    assert made.trace.any_iterate is not None
    assert not made.trace.any_iterate.any()


# --- through the command line ----------------------------------------------------------------------


def test_it_is_calibrated_once_and_its_rate_is_reported(tmp_path: Path) -> None:
    arguments = ("-m", CNN, "-a", "fgsm", "-d", "feature-squeezing:fpr=0.2", *QUICK)
    first = evaluate(*arguments, output=tmp_path / "one")
    cells = {c["defense"]: c for c in first["cells"]}
    facts = cells["feature-squeezing:fpr=0.2"]["provenance"]["facts"]["feature-squeezing:fpr=0.2"]
    assert facts["preset"] == "mnist"
    assert facts["fpr"] == 0.2
    assert facts["calibration_images"] == 40
    metrics = cells["feature-squeezing:fpr=0.2"]["metrics"]
    assert 0 <= metrics["clean_rejection_rate"]["value"] <= 1
    assert metrics["clean_rejection_rate"]["n"] == 20
    assert metrics["clean_accuracy"]["value"] <= 1 - metrics["clean_rejection_rate"]["value"]
    assert cells["none"]["metrics"]["clean_rejection_rate"] is None
    assert cells["feature-squeezing:fpr=0.2"]["seconds"]["defend"] > 0
    again = evaluate(*arguments, output=tmp_path / "two")
    cached = next(c for c in again["cells"] if c["defense"] != "none")
    assert cached["seconds"]["defend"] == 0
    assert cached["provenance"]["facts"] == {"feature-squeezing:fpr=0.2": facts}


def test_two_detectors_are_refused_and_a_second_threshold_is_a_usage_error(tmp_path: Path) -> None:
    result = evaluate("-m", CNN, "-a", "fgsm", "-d", "feature-squeezing+feature-squeezing:threshold=1", *QUICK,
                      output=tmp_path / "one")  # fmt: skip
    refused = next(c for c in result["cells"] if c["defense"] != "none")
    assert refused["status"] == "refused"
    assert "two detectors" in refused["reason"]
    ran = run("eval", "-m", CNN, "--dataset", TINY, "-a", "fgsm", "-d", "feature-squeezing:fpr=0.1,threshold=1",
              "-o", tmp_path / "two")  # fmt: skip
    assert ran.code == 2
    assert "give threshold, or fpr and images to find it, not both" in ran.err


def test_it_stacks_outside_and_inside_another_input_defense(tmp_path: Path) -> None:
    result = evaluate("-m", CNN, "-a", "pgd:steps=2", "-d", "bit-depth+feature-squeezing",
                      "-d", "feature-squeezing+bit-depth", *QUICK, output=tmp_path / "out")  # fmt: skip
    cells = [c for c in result["cells"] if c["defense"] != "none"]
    assert [c["status"] for c in cells] == ["ok", "ok"]
    facts = [c["provenance"]["facts"]["feature-squeezing"] for c in cells]
    # Outside, the threshold belongs to the model that rounds its images.
    assert facts[0]["threshold"] != facts[1]["threshold"]


def test_data_without_training_images_ask_for_a_threshold() -> None:
    x, y = torch.rand(12, 1, 8, 8, generator=generator()), torch.arange(12) % 3
    asked = {"dataset": (x, y), "eps": "1/10", "audit": "none"}
    without = advplug.evaluate(Net(), "fgsm", "feature-squeezing", **asked)  # type: ignore[arg-type]
    assert [c.status for c in without.cells] == ["ok", "refused"]
    assert "threshold=1" in str(without.cells[1].reason)
    given = advplug.evaluate(Net(), "fgsm", "feature-squeezing:threshold=1", **asked)  # type: ignore[arg-type]
    assert not given.failed


# --- what the kit finds ----------------------------------------------------------------------------


def test_the_kit_finds_detectors_that_do_not_keep_their_word(plant: Any) -> None:
    caps = DefenseCaps(("wrap",), rejects=True)
    sound = watching(lambda inner, x, rng: inner(x).softmax(1).amax(1) - 2)
    assert breaches(check_defense, plant("defense", caps, lambda: (sound,))) == ""
    for rejection, found in (
        (lambda inner, x, rng: inner(x), "rejection must give a finite number an image"),
        (lambda inner, x, rng: inner(x.round()).softmax(1).amax(1) - 2, "its gradient vanishes for 100%"),
        (lambda inner, x, rng: inner(x).softmax(1).amax(1) + 2, "it costs"),
        (lambda inner, x, rng: inner(x).sum(1) / 1e3 - 2 + x.requires_grad, "its value changes where gradients"),
    ):
        assert found in breaches(check_defense, plant("defense", caps, lambda r=rejection: (watching(r),)))
    unfit = Calibrated(lambda inner, training: {"a": (1, 2)}, lambda figures: sound)
    assert "figures that JSON can hold" in breaches(check_defense, plant("defense", caps, lambda: (unfit,)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_wrong_comes_first_then_unnoticed(name: str, targeted: bool) -> None:
    logits = 3 * torch.randn(400, 6, generator=generator(), dtype=torch.float64)
    logits[:5] = 0  # nothing is further from right and wrong than this
    y, target = torch.zeros(400, dtype=torch.long), torch.ones(400, dtype=torch.long)
    hit = logits.argmax(1) == 1 if targeted else logits.argmax(1) != 0
    loss = LOSSES[name](logits, y, target if targeted else None)
    rejection = 50 * torch.randn(400, generator=generator(1), dtype=torch.float64)
    made = undetected(loss, rejection, hit)
    assert torch.equal(made[~hit].argsort(stable=True), loss[~hit].argsort(stable=True))
    assert made[hit].min() > made[~hit].max()
    order = rejection[hit].argsort()
    assert (made[hit][order].diff() < 0).all()


def test_the_loss_has_a_gradient_however_clearly_an_image_is_rejected() -> None:
    rejection = torch.tensor([-1e4, -0.5, 0.0, 2.0, 1e5], requires_grad=True)
    made = undetected(torch.zeros(5), rejection, torch.ones(5, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(made.sum(), rejection)
    assert (gradient < 0).all()
