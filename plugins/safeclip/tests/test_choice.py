"""Which pairs are taken for safe: losses, mixtures and their guards, the growing set."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from advplug_clip.contrastive import pair_loss
from advplug_safeclip import mixture
from advplug_safeclip.choice import Round, choose, deviations
from advplug_safeclip.losses import Pool, contrast
from advplug_safeclip.settings import PRESETS, Settings

SMALL, PUBLISHED = PRESETS["small"], PRESETS["published"]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def normal(mean: float, spread: float, amount: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).normal(mean, spread, amount)


# --- losses ----------------------------------------------------------------------------------------


def test_the_loss_of_constant_features_is_ln_b() -> None:
    same = unit(1, 8).expand(16, 8)
    assert float(contrast(same, same, torch.tensor(2.6))) == pytest.approx(math.log(16))


def test_both_directions_make_the_loss_of_training() -> None:
    images, texts, scale = unit(7, 5), unit(7, 5, seed=1), torch.tensor(1.3)
    both = (contrast(images, texts, scale) + contrast(texts, images, scale)) / 2
    torch.testing.assert_close(both, pair_loss(images, texts, scale))


def test_captions_that_read_the_same_are_no_wrong_answers() -> None:
    images, texts, scale = unit(3, 5), unit(3, 5, seed=1), torch.tensor(1.0)
    same = torch.eye(3).bool()
    same[0, 2] = same[2, 0] = True
    rows = [([0, 1], 0), ([0, 1, 2], 1), ([1, 2], 1)]
    each = [functional.cross_entropy(scale.exp() * images[i] @ texts[keys].T, torch.tensor(own))
            for i, (keys, own) in enumerate(rows)]  # fmt: skip
    torch.testing.assert_close(contrast(images, texts, scale, same), torch.stack(each).mean())


def test_a_pool_gives_the_nearest_and_forgets_the_oldest() -> None:
    pool, axes = Pool(3), torch.eye(4)
    features = unit(5, 4).requires_grad_()
    assert pool.nearest(features) is features, "an empty pool leaves each its own neighbour"
    pool.put(axes[:2].clone().requires_grad_())
    near = torch.tensor([[0.2, 0.9, 0.0, 0.1], [0.5, 0.4, 0.8, 0.0]])
    assert torch.equal(pool.nearest(near), axes[[1, 0]])
    pool.put(axes[2:])
    assert pool.features is not None
    assert torch.equal(pool.features, axes[1:])
    assert not pool.features.requires_grad
    assert torch.equal(pool.nearest(near), axes[[1, 2]])
    none = Pool(0)
    none.put(axes)
    assert none.features is None


# --- mixtures --------------------------------------------------------------------------------------


def test_the_posterior_of_the_worst_match_is_not_1() -> None:
    made = mixture.Mixture((0.05, 0.35), (0.05, 0.08), (0.5, 0.5))
    low, high = (np.exp(-0.5 * ((-1 - m) / s) ** 2) / s for m, s in zip(made.means, made.spreads, strict=True))
    assert high / (low + high) == pytest.approx(1), "Bayes' rule alone calls a cosine of -1 safe"
    at = np.linspace(-1, 1, 401)
    posterior = made.posterior(at)
    assert posterior[0] == 0
    assert not posterior[at <= 0.05].any()
    assert (np.diff(posterior) >= 0).all()
    assert posterior[-1] == pytest.approx(1)


def test_the_posterior_does_not_fall_behind_a_narrow_component() -> None:
    made = mixture.Mixture((0.0, 2.0), (1.0, 0.5), (0.1, 0.9))
    at = np.linspace(-4, 8, 601)
    posterior = made.posterior(at)
    assert (np.diff(posterior) >= 0).all()
    # The odds are highest where (x - 0) / 1 = (x - 2) / 0.25.
    peak = 8 / 3
    odds = 0.9 / 0.5 * np.exp(-2 * (peak - 2) ** 2) / (0.1 * np.exp(-0.5 * peak**2))
    assert posterior[-1] == pytest.approx(odds / (1 + odds))
    assert posterior[at < peak].max() < posterior[-1]


def test_two_components_of_800_and_200_are_told_apart() -> None:
    cosines = np.concatenate([normal(0.05, 0.05, 800, 0), normal(0.35, 0.08, 200, 1)])
    made = mixture.free(cosines)
    assert made.problem is None
    assert made.means == pytest.approx((0.05, 0.35), abs=0.02)
    assert made.spreads == pytest.approx((0.05, 0.08), abs=0.02)
    safe = made.posterior(cosines) >= 0.9
    assert safe.mean() == pytest.approx(0.192, abs=0.01)
    assert not safe[:800].any()


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        (np.full(50, 0.3), "all scores are the same"),
        (np.array([0.1, np.nan, 0.2, 0.3]), "a score is no number"),
        (np.array([0.1, 0.2]), "2 scores are too few"),
        (np.array([0.1] * 60 + [9.0]), "fewer than 2 pairs"),
    ],
)
def test_what_cannot_be_fitted_has_a_problem_and_no_safe_pair(scores: np.ndarray, problem: str) -> None:
    made = mixture.free(scores)
    assert made.problem is not None
    assert problem in made.problem
    assert not made.posterior(scores).any()
    assert (mixture.anchored(scores).problem or problem).find(problem) >= 0


def test_one_component_is_known_and_the_other_is_found_among_few_bad_pairs() -> None:
    scores = np.concatenate([normal(3.0, 0.7, 970, 0), normal(0, 1, 30, 1)])
    made = mixture.anchored(scores)
    assert made.problem is None
    assert (made.means[0], made.spreads[0]) == (0, 1)
    assert made.means[1] == pytest.approx(3.0, abs=0.1)
    assert made.weights[1] == pytest.approx(0.97, abs=0.03)
    safe = made.posterior(scores) >= 0.8
    assert safe[:970].mean() > 0.85
    assert safe[970:].mean() < 0.2


def test_pairs_that_match_no_better_than_others_are_no_mixture() -> None:
    made = mixture.anchored(normal(-1.0, 0.5, 400, 0))
    assert made.problem == "images go together with their own captions no better than with others"


def test_deviations_count_from_the_same_captions_other_images() -> None:
    images, texts = unit(40, 6), unit(40, 6, seed=1)
    found = deviations(images, texts, torch.Generator().manual_seed(0))
    wrong = images @ texts.T
    torch.testing.assert_close(found, (wrong.diagonal() - wrong.mean(0)) / wrong.std(0))
    vague = texts.clone()
    vague[0] = images.mean(0) / images.mean(0).norm()
    assert abs(float(deviations(images, vague, torch.Generator())[0])) < 4, "near to all is no match"


# --- the choice ------------------------------------------------------------------------------------


def scores(seed: int = 0) -> np.ndarray:
    return np.concatenate([normal(0.05, 0.05, 800, seed), normal(0.35, 0.08, 200, seed + 1)])


def chosen(found: np.ndarray, settings: Settings, epochs: int) -> list[Round]:
    rounds: list[Round] = []
    for _ in range(epochs):
        rounds.append(choose(found, settings, rounds))
    return rounds


def test_as_published_the_mixture_chooses_once_and_the_share_grows_to_a_cap() -> None:
    settings = replace(PUBLISHED, growth=0.1, cap=0.45)
    rounds = chosen(scores(), settings, 5)
    first = int(rounds[0].safe.sum())
    assert first == rounds[0].facts["by_mixture"] == pytest.approx(192, abs=10)
    assert [r.facts["decided"] for r in rounds] == ["mixture", "growth", "growth", "growth", "growth"]
    assert [int(r.safe.sum()) for r in rounds] == [first, first + 100, first + 200, 450, 450]
    assert all(r.warnings == () for r in rounds)
    order = np.argsort(-scores())
    assert all(r.safe[order[: int(r.safe.sum())]].all() for r in rounds)


def test_the_floor_steps_in_and_says_so() -> None:
    made = choose(scores(), replace(PUBLISHED, floor=0.4), [])
    assert made.facts["decided"] == "floor"
    assert made.safe.sum() == made.facts["chosen"] == 400
    (warning,) = made.warnings
    assert warning.startswith(f"the mixture found {made.facts['by_mixture']} safe pairs at threshold=0.9, fewer than")
    assert warning.endswith("the 400 pairs with the highest scores were taken for safe")


def test_a_mixture_that_collapsed_leaves_the_floor_and_says_why() -> None:
    made = choose(np.full(100, 0.2), SMALL, [])
    assert made.facts["decided"] == "floor"
    assert made.safe.sum() == round(SMALL.floor * 100)
    assert made.facts["means"] == [None, None]
    assert made.warnings[0].startswith("the mixture cannot be used, since all scores are the same; the ")


def test_for_small_data_the_mixture_chooses_in_every_epoch_up_to_the_cap() -> None:
    found = np.concatenate([normal(3.5, 0.6, 970, 0), normal(0, 1, 30, 1)])
    rounds = chosen(found, replace(SMALL, cap=0.9), 2)
    assert [r.facts["decided"] for r in rounds] == ["cap", "cap"]
    assert [r.facts["least"] for r in rounds] == [SMALL.floor, round(SMALL.floor + SMALL.growth, 4)]
    (made,) = chosen(found, replace(SMALL, cap=1.0), 1)
    assert made.facts["decided"] == "mixture"
    assert made.safe[970:].mean() < 0.2 < 0.9 < made.safe[:970].mean()
