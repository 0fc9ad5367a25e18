"""ART's input and output defenses: equal to ART, gradients as declared, and broken by attacks that adapt."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.builtin.gradient import pgd
from advplug.contracts import Ball, Batch, Gradient, Threat, Wrap
from advplug.params import fraction
from advplug.rng import Stream
from advplug.testing import check_defense
from advplug.testing.defenses import digits, ridge
from advplug.victim import Victim
from advplug_art import defenses
from advplug_art.defense_stages import FLOOR, running_median
from advplug_art.defense_table import DEFENSES, LEFT_OUT
from advplug_art.poison_defense_table import POISON_DEFENSES


def images(channels: int = 3, side: int = 12, n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels_behind(wrap: Wrap, x: Tensor, seed: int = 0) -> Tensor:
    """What the model gets to see."""
    seen: list[Tensor] = []

    def inner(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :3]

    wrap.forward(inner, x, generator(seed))
    return seen[0]


def answer(wrap: Wrap, logits: Tensor, seed: int = 0) -> Tensor:
    """What is answered in place of these logits."""
    return wrap.forward(lambda x: logits, torch.zeros(len(logits), 1, 1, 1), generator(seed))


@pytest.mark.parametrize("name", [spec.name for spec in DEFENSES])
def test_each_keeps_the_contract(name: str) -> None:
    fewer = {"max_iter": 2} if name == "art.total-var-min" else {}  # an optimisation for each image takes its time
    check_defense(name, **fewer)


# --- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_is_arts(channels: int) -> None:
    from art.defences.preprocessor import JpegCompression

    x = images(channels)
    (wrap,) = defenses.jpeg(quality=30)
    last = JpegCompression((0, 1), 30, channels_first=False)(x.permute(0, 2, 3, 1).numpy())[0]
    assert torch.equal(pixels_behind(wrap, x), torch.from_numpy(last).permute(0, 3, 1, 2))
    assert not torch.equal(pixels_behind(wrap, x), x)


def test_jpeg_takes_pixels_that_rounding_left_outside() -> None:
    (wrap,) = defenses.jpeg()
    x = images()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1e-7, 1 + 1e-7
    assert torch.equal(pixels_behind(wrap, x), pixels_behind(wrap, x.clamp(0, 1)))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_feature_squeezing_is_arts_and_rounds_to_levels(bits: int) -> None:
    from art.defences.preprocessor import FeatureSqueezing

    x = images()
    (wrap,) = defenses.feature_squeezing(bits)
    seen = pixels_behind(wrap, x)
    assert torch.equal(seen, torch.from_numpy(FeatureSqueezing((0, 1), bits)(x.numpy())[0]).to(x))
    levels = 2**bits - 1
    assert torch.allclose(seen, (x * levels).round() / levels, atol=1e-7)
    assert seen.dtype == x.dtype


@pytest.mark.parametrize(("window", "side"), [(1, 6), (2, 6), (3, 6), (4, 7), (5, 2)])
def test_the_differentiable_median_is_arts(window: int, side: int) -> None:
    from art.defences.preprocessor import SpatialSmoothing

    x = images(2, side)
    art = torch.from_numpy(SpatialSmoothing(window, channels_first=True, clip_values=(0, 1))(x.numpy())[0])
    (wrap,) = defenses.spatial_smoothing(window)
    assert torch.equal(running_median(x, window), art)
    assert torch.equal(pixels_behind(wrap, x), art)
    for stand_in in wrap.surrogates:
        torch.testing.assert_close(stand_in(lambda seen: seen, x, torch.Generator()), art, rtol=0, atol=1e-7)


def test_the_median_is_attacked_along_the_identity_the_mean_and_the_pixel_that_was_picked() -> None:
    (wrap,) = defenses.spatial_smoothing(3)
    x = torch.arange(9.0).view(1, 1, 3, 3).div(10).requires_grad_()
    middle = torch.zeros(1, 1, 3, 3)
    middle[0, 0, 1, 1] = 1
    for stand_in, expected in zip(wrap.surrogates, (middle, torch.full((1, 1, 3, 3), 1 / 9), middle), strict=True):
        seen = stand_in(lambda seen: seen, x, torch.Generator())
        torch.testing.assert_close(torch.autograd.grad(seen[0, 0, 1, 1], x)[0], expected)
    # The corner's window, mirrored, holds its value four times: the median is its neighbour's.
    (picked,) = torch.autograd.grad(wrap.surrogates[2](lambda seen: seen, x, torch.Generator())[0, 0, 0, 0], x)
    assert picked[0, 0, 0, 1] == 1
    assert picked.sum() == 1


def test_total_variation_is_minimised_and_nothing_happens_without_weight() -> None:
    def variation(x: Tensor) -> Tensor:
        return x.diff(dim=2).abs().flatten(1).sum(1) + x.diff(dim=3).abs().flatten(1).sum(1)

    x = images(2, 8)
    (wrap,) = defenses.total_var_min()
    (idle,) = defenses.total_var_min(lamb=0.0)
    assert torch.allclose(pixels_behind(idle, x), x, atol=1e-6)
    assert (variation(pixels_behind(wrap, x)) < 0.8 * variation(x)).all()


def test_total_var_min_works_on_image_planes() -> None:
    """Rows of one value have no variation along them; a filter over the wrong axes would mix channels."""
    x = torch.zeros(1, 3, 6, 6)
    x[:, 0], x[:, 2] = 0.25, 0.75
    (wrap,) = defenses.total_var_min()
    assert torch.allclose(pixels_behind(wrap, x), x, atol=1e-6)


def test_noise_has_the_size_asked_for() -> None:
    (wrap,) = defenses.gaussian_augmentation(sigma=0.05)
    x = torch.full((50, 3, 12, 12), 0.5)
    noise = pixels_behind(wrap, x) - 0.5
    assert abs(float(noise.std()) - 0.05) < 0.001
    assert abs(float(noise.mean())) < 0.002
    assert not torch.equal(noise[0], noise[1])
    loud = pixels_behind(defenses.gaussian_augmentation(sigma=2.0)[0], x)
    assert float(loud.min()) == 0
    assert float(loud.max()) == 1


@pytest.mark.parametrize("make", [defenses.total_var_min, defenses.gaussian_augmentation])
def test_draws_follow_the_generator_and_leave_numpy_alone(make: Callable[[], tuple[Wrap]]) -> None:
    (wrap,) = make()
    x = images(1, 6)
    np.random.seed(3)
    before = np.random.get_state()
    first = pixels_behind(wrap, x, seed=1)
    after = np.random.get_state()
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    np.random.seed(4)
    assert torch.equal(first, pixels_behind(wrap, x, seed=1))
    assert not torch.equal(first, pixels_behind(wrap, x, seed=2))


# --- answers ---------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.5], [0.2, 0.1, 0.3]])


def test_each_row_has_its_own_label() -> None:
    (wrap,) = defenses.class_labels()
    probabilities = answer(wrap, LOGITS).exp()
    assert torch.allclose(probabilities, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), atol=2 * FLOOR)


@pytest.mark.parametrize("decimals", [1, 3])
def test_rounded_probabilities(decimals: int) -> None:
    (wrap,) = defenses.rounded(decimals)
    wanted = (LOGITS.softmax(1) * 10**decimals).round() / 10**decimals
    assert torch.allclose(answer(wrap, LOGITS).exp(), wanted.clamp_min(FLOOR), atol=1e-6)


def test_softmax_of_the_answer_is_arts_reverse_sigmoid() -> None:
    from art.defences.postprocessor import ReverseSigmoid

    (wrap,) = defenses.reverse_sigmoid(beta=0.7, gamma=0.2)
    p = LOGITS.double().softmax(1)
    distorted = p - 0.7 * (torch.sigmoid(0.2 * torch.logit(p)) - 0.5)
    got = answer(wrap, LOGITS.double()).softmax(1)
    assert torch.allclose(got, distorted / distorted.sum(1, keepdim=True), atol=1e-9)
    assert torch.allclose(got, torch.from_numpy(ReverseSigmoid(0.7, 0.2)(p.numpy())), atol=1e-12)


def test_saturated_probabilities_stay_finite() -> None:
    (wrap,) = defenses.reverse_sigmoid()
    scores = answer(wrap, torch.tensor([[80.0, 0.0, -80.0]]))
    assert scores.isfinite().all()
    assert scores.argmax(1).item() == 0


def test_output_noise_is_clipped_and_normalised() -> None:
    (wrap,) = defenses.gaussian_noise(0.1)
    logits = LOGITS[:1].expand(4000, 3)
    p = answer(wrap, logits).exp()
    assert torch.allclose(p.sum(1), torch.ones(4000), atol=1e-5)
    spread = p.log()[:, 0].sub(p.log()[:, 1]).exp()  # normalisation cancels
    own = LOGITS[0].softmax(0)
    assert abs(float(spread.median()) - float(own[0] / own[1])) < 0.1
    drowned = answer(defenses.gaussian_noise(5.0)[0], logits[:200])
    assert drowned.isfinite().all()


def test_unsure_answers_are_rejected() -> None:
    (wrap,) = defenses.high_confidence(cutoff=0.6)
    victim = Victim(nn.Identity(), 3, (wrap, *defenses.rounded()))
    decision = victim.decide(LOGITS)
    assert decision.accepted.tolist() == [True, True, False]
    assert decision.label.tolist()[:2] == [0, 1]
    few = Victim(nn.Identity(), 3, defenses.high_confidence(cutoff=0.3))
    assert few.decide(LOGITS).accepted.all()


@pytest.mark.parametrize("name", ["class_labels", "gaussian_noise", "high_confidence", "reverse_sigmoid", "rounded"])
def test_a_model_that_fails_is_not_covered_up(name: str) -> None:
    wraps = getattr(defenses, name)()
    logits = LOGITS.clone()
    logits[1, 0] = torch.nan
    assert Victim(nn.Identity(), 3, wraps).decide(logits).label.tolist()[1] == -1
    assert answer(wraps[0], logits)[[0, 2]].isfinite().all()


# --- attacks ---------------------------------------------------------------------------------------


def robust(victim: Victim, judge: Victim, eps: str, n: int = 64) -> float:
    """Share of digits that `judge` still gets right after PGD on `victim`."""
    batch = digits().test.batch(np.arange(n))
    part = Batch(batch.x, batch.y, batch.index)
    crafted = pgd(steps=20)(victim, part, Threat(Ball("linf", fraction(eps))), Stream(0, "test"))
    decision = judge.decide(crafted.x)
    return float((decision.accepted & (decision.label == batch.y)).double().mean())


def behind(*wraps: Wrap) -> Victim:
    return Victim(ridge(), 10, wraps)


def test_an_attack_through_the_stand_in_beats_the_static_one_on_squeezed_pixels() -> None:
    defended = behind(*defenses.feature_squeezing(bit_depth=2))
    static, adaptive = robust(behind(), defended, "1/10"), robust(defended, defended, "1/10")
    assert adaptive < static - 0.2


@pytest.mark.parametrize("name", ["rounded", "class_labels"])
def test_answers_without_gradient_only_stop_attacks_that_do_not_adapt(name: str) -> None:
    (wrap,) = getattr(defenses, name)()
    defended, naive = behind(wrap), behind(Wrap(wrap.forward, Gradient.EXACT))
    blind, adaptive = robust(naive, defended, "1/20"), robust(defended, defended, "1/20")
    assert adaptive < blind - 0.3
    assert adaptive == robust(behind(), behind(), "1/20")


def test_a_stack_of_both_kinds_is_attacked_through_both() -> None:
    wraps = (*defenses.jpeg(), *defenses.rounded())
    victim = behind(*wraps)
    x = digits().test.batch(np.arange(4)).x.requires_grad_()
    (gradient,) = torch.autograd.grad(victim.attacked(x)[:, 3].sum(), x)
    weight = ridge()[1].weight[3].detach()  # type: ignore[index, union-attr]
    assert torch.allclose(gradient.flatten(1), weight.expand(4, -1).float(), atol=1e-5)
    assert robust(victim, victim, "1/5") < 0.1


# --- the table -------------------------------------------------------------------------------------


def test_every_class_of_art_is_offered_or_left_out_with_a_reason() -> None:
    import art.defences.postprocessor as post
    import art.defences.preprocessor as pre

    classes = {n for module in (pre, post) for n, value in vars(module).items() if inspect.isclass(value)}
    offered = {
        "ClassLabels", "FeatureSqueezing", "GaussianAugmentation", "GaussianNoise", "HighConfidence",
        "JpegCompression", "ReverseSigmoid", "Rounded", "SpatialSmoothing", "TotalVarMin",
    }  # fmt: skip
    assert offered.isdisjoint(LEFT_OUT)
    assert len(offered) == len(DEFENSES)
    assert classes - offered == set(LEFT_OUT) & classes
    assert all(LEFT_OUT.values())


def test_defenses_are_listed_without_torch_or_art() -> None:
    code = (
        "import json, sys\n"
        "from advplug.registry import registry\n"
        "found = [e.describe()['name'] for e in registry().entries('defense') if e.name.startswith('art.')]\n"
        "print(json.dumps([found, [m for m in ('torch', 'art') if m in sys.modules]]))"
    )
    environment = {**os.environ, "ADVPLUG_DISABLE_PLUGINS": "torchattacks,autoattack,advlib"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [sorted(spec.name for spec in (*DEFENSES, *POISON_DEFENSES)), []]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight cache that these tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["art.feature-squeezing", "art.jpeg+art.rounded", "art.high-confidence"])
def test_they_run_on_the_command_line(defense: str, trained: Path, tmp_path: Path) -> None:
    code = "import sys; from advplug.cli import main; sys.exit(main())"
    words = ["eval", "--model", "cnn", "--defense", defense, "--attack", "pgd:steps=5", "-n", "40", "--json"]
    environment = {**os.environ, "ADVPLUG_CACHE": str(trained)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert {c["status"] for c in cells} == {"ok"}
    assert {c["defense"] for c in cells} == {"none", defense}
