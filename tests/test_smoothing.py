"""Randomised smoothing: published bounds to the digit, certificates that never exceed the true radius, the cell kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.build import Built
from advplug.builtin.smoothing import smoothing
from advplug.certify import prove
from advplug.contracts import Objective, Wrap
from advplug.data import ArrayImages, Split
from advplug.decisions import Batching
from advplug.defenses.noise import noise_loss, noisy
from advplug.defenses.smoothing import ABSTAINS, certify, is_sure, lower_bound, radius, sample
from advplug.rng import Stream
from advplug.victim import Victim
from linear import Affine, problem

ALPHA = 0.001


def wrap(**params: Any) -> Wrap:
    found = smoothing(train=False, **params)[-1]
    assert isinstance(found, Wrap)
    return found


# --- the statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "reach"), [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_the_radius_where_all_votes_agree(n: int, reach: float) -> None:
    found = radius(n, n, ALPHA, 1.0)
    assert found == pytest.approx(reach, abs=5e-5)
    # The bound of all-agree is in closed form: p ** n = alpha.
    assert lower_bound(n, n, ALPHA) == pytest.approx(ALPHA ** (1 / n), rel=1e-12)
    assert radius(n, n, ALPHA, 0.25) == pytest.approx(0.25 * reach, abs=2e-5)


@pytest.mark.parametrize(("n", "least"), [(100, 66), (1000, 550)])
def test_the_fewest_votes_that_certify(n: int, least: int) -> None:
    assert radius(least, n, ALPHA, 1.0) is not None
    assert radius(least - 1, n, ALPHA, 1.0) is None


@pytest.mark.parametrize(("n", "least"), [(20, 18), (100, 67), (1000, 553)])
def test_the_fewest_votes_that_answer(n: int, least: int) -> None:
    assert is_sure(least, n - least, ALPHA)
    assert not is_sure(least - 1, n - least + 1, ALPHA)


def test_the_lower_bound_is_the_share_that_explains_the_votes_with_probability_alpha() -> None:
    from scipy.stats import binom

    for k, n in ((1, 10), (37, 100), (580, 1000)):
        assert binom.sf(k - 1, n, lower_bound(k, n, ALPHA)) == pytest.approx(ALPHA, rel=1e-9)
    assert lower_bound(0, 10, ALPHA) == 0.0
    assert not is_sure(0, 0, ALPHA)


# --- certificates of a linear victim, whose smoothed version is known -------------------------------


def line(margin: float, sigma: float) -> tuple[Affine, Tensor]:
    """A two-class model and an image at L2 distance `margin` of its boundary."""
    weight = torch.zeros(2, 12, dtype=torch.float64)
    weight[0, :3], weight[1, :3] = 2.0, -2.0
    image = torch.full((3, 2, 2), 0.5, dtype=torch.float64)
    length = float((weight[0] - weight[1]).norm())
    return Affine(weight, torch.tensor([margin * length - 0.5 * 12.0, 0.0], dtype=torch.float64)), image


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.5])
def test_the_votes_are_binomial_with_the_closed_form_probability(margin: float) -> None:
    sigma, n = 0.25, 20_000
    module, image = line(margin, sigma)
    won = sample(module, image, sigma, n, torch.Generator().manual_seed(0), 512)
    p = 0.5 * (1 + math.erf(margin / sigma / math.sqrt(2)))
    assert int(won.sum()) == n
    assert abs(int(won[0]) - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_no_certificate_exceeds_the_true_radius_and_most_come_near_it() -> None:
    p = problem(classes=2, n=48, shape=(3, 4, 4))
    truth = p.distance("l2")
    sigma = 4 * float(truth.median())
    shares = []
    for image, y, true in zip(p.batch.x, p.batch.y, truth.tolist(), strict=True):
        rng = torch.Generator().manual_seed(int(1e6 * true))
        label, reach = certify(p.module, image, sigma, (100, 2000), ALPHA, rng, 256)
        assert label in (int(y), ABSTAINS)
        assert reach <= true
        shares.append(reach / true)
    assert np.median(shares) > 0.6


def test_certificates_do_not_depend_on_the_size_of_a_pass() -> None:
    p = problem(classes=3, n=6)
    found = [
        [
            certify(p.module, x, 0.05, (100, 330), ALPHA, torch.Generator().manual_seed(i), size)
            for i, x in enumerate(p.batch.x)
        ]
        for size in (1, 77, 256)
    ]
    assert found[0] == found[1] == found[2]


def test_a_model_that_answers_nothing_finite_is_not_certified() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), torch.nan)

    found = certify(Broken(), torch.zeros(1, 4, 4), 0.25, (20, 100), ALPHA, torch.Generator(), 64)
    assert found == (ABSTAINS, 0.0)
    victim = Victim(Broken(), 3, (wrap(votes=20),))
    decided = victim.decide(torch.zeros(2, 1, 4, 4))
    assert decided.label.tolist() == [-1, -1]
    assert not decided.accepted.any()


# --- the deployed system ----------------------------------------------------------------------------


def test_noise_is_not_clamped() -> None:
    x = torch.zeros(4, 1, 8, 8)
    made = noisy(x, 0.5, torch.Generator().manual_seed(0))
    assert made.min() < -0.5
    assert float(made.std()) == pytest.approx(0.5, rel=0.1)


def test_it_abstains_where_the_votes_are_close_and_answers_where_they_are_not() -> None:
    sigma = 0.25
    module, image = line(0.02, sigma)
    near = Victim(module, 2, (wrap(sigma=sigma),)).decide(image.expand(20, -1, -1, -1))
    assert near.accepted.sum() <= 2
    module, image = line(0.5, sigma)
    far = Victim(module, 2, (wrap(sigma=sigma),)).decide(image.expand(20, -1, -1, -1))
    assert far.accepted.all()
    assert (far.label == 0).all()


def built(victim: Victim, x: Tensor, y: Tensor) -> Built:
    split = Split(ArrayImages(x.float().numpy()), y.numpy(), np.arange(len(y)) + 7)
    return Built(victim, split, 0, "")


def test_proofs_draw_noise_of_their_own_and_count_their_passes() -> None:
    p = problem(classes=2, n=12)
    module = Affine(p.module.weight.detach().float(), p.module.bias.detach().float())
    victim = Victim(module, 2, (wrap(sigma=0.02, n0=50, n=250),), stream=Stream(3, "victim"))
    x, y = p.batch.x, p.batch.y
    first = prove(built(victim, x, y), Batching(64))
    assert first.passes == 300 * len(y)
    assert victim.passes.forward == first.passes
    victim.decide(x.float())  # what was decided or attacked before changes nothing
    again = prove(built(victim, x, y), Batching(9))
    assert np.array_equal(first.proofs.radius, again.proofs.radius)
    few = prove(
        built(victim, x, y).__class__(victim, built(victim, x, y).split.subset(np.array([3, 5])), 0, ""), Batching(64)
    )
    assert np.array_equal(few.proofs.radius, first.proofs.radius[[3, 5]])
    other = prove(built(replace(victim, stream=Stream(4, "victim")), x, y), Batching(64))
    assert not np.array_equal(first.proofs.radius, other.proofs.radius)
    assert (first.proofs.radius <= p.distance("l2").numpy() + 1e-6).all()


def test_training_adds_noise_of_sigma_drawn_from_the_stream() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 3, requires_grad=True)

    x, y = torch.full((16, 1, 8, 8), 0.5), torch.zeros(16, dtype=torch.long)
    loss = noise_loss(Spy(), x, y, 0.3, Stream(0, "a"))
    noise_loss(Spy(), x, y, 0.3, Stream(0, "a"))
    noise_loss(Spy(), x, y, 0.3, Stream(0, "b"))
    assert float(loss.detach()) == pytest.approx(math.log(3))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert float((seen[0] - x).std()) == pytest.approx(0.3, rel=0.1)
    objective, _ = smoothing(sigma=0.3)
    assert isinstance(objective, Objective)
    assert torch.equal(objective.loss(Spy(), x, y, Stream(0, "a")), loss)
