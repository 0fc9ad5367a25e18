"""Changed scores: what is answered, and that only attackers who climb by scores are troubled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from advplug.attacks.engine import GradientAttack
from advplug.attacks.square import Square
from advplug.builtin import scores
from advplug.contracts import Access, Ball, Threat, Wrap
from advplug.defenses.scores import FLOOR, LEAD, first, noisy, rounded
from advplug.testing import check_defense
from advplug.victim import Victim
from linear import problem, stream, threat


def logits(n: int = 200, classes: int = 6) -> Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("score-noise", {}),
        ("score-noise", {"keep_label": False, "on": "logits"}),
        ("score-round", {}),
        ("score-round", {"decimals": 0}),
    ],
)
def test_it_conforms(name: str, params: dict[str, Any]) -> None:
    assert {r.ok for r in check_defense(name, **params)} <= {True, None}


@pytest.mark.parametrize("decimals", [0, 1, 2, 4])
def test_probabilities_are_rounded_and_the_answer_stays(decimals: int) -> None:
    z = logits()
    made, p = rounded(z, decimals), z.softmax(1)
    assert torch.equal(made.argmax(1), z.argmax(1))
    said = made.exp()
    # Relative to one another the answered scores are the rounded probabilities, the label a hair above a tie.
    wanted = (p * 10**decimals).round() / 10**decimals
    total = wanted.sum(1, keepdim=True)
    known = (total > 0).squeeze(1)
    assert torch.allclose(said[known], (wanted / total)[known], atol=2e-5)
    assert (~known).any() == (decimals == 0)


def test_ties_go_to_the_label() -> None:
    z = torch.tensor([[0.0, 0.001, 0.0005]])
    made = rounded(z, 1)
    assert made.argmax(1).item() == 1
    assert torch.allclose(made.softmax(1), torch.full((1, 3), 1 / 3), atol=1e-5)


def test_scores_do_not_move_until_a_probability_has() -> None:
    z = torch.tensor([[3.0, 0.0, -1.0], [3.001, 0.0, -1.0]])
    one, two = rounded(z, 2)
    assert torch.equal(one, two)


def test_noise_has_its_standard_deviation_and_no_bias() -> None:
    z = torch.tensor([[1.0, 0.5, 0.0, -0.5]], dtype=torch.float64).expand(40_000, 4)
    made = noisy(z, 0.3, "logits", False, generator())
    assert torch.allclose((made - z).std(0), torch.full((4,), 0.3, dtype=torch.float64), atol=0.005)
    assert torch.allclose(made.mean(0), z[0], atol=0.006)
    said = noisy(z, 0.01, "probabilities", False, generator()).exp()
    assert torch.allclose(said.mean(0), z[0].softmax(0), atol=1e-3)
    assert torch.allclose(said.sum(1), torch.ones(40_000, dtype=torch.float64))


@pytest.mark.parametrize("on", ["probabilities", "logits"])
def test_kept_labels_are_kept_and_others_are_not(on: str) -> None:
    z = logits()
    assert torch.equal(noisy(z, 1.0, on, True, generator()).argmax(1), z.argmax(1))
    assert not torch.equal(noisy(z, 1.0, on, False, generator()).argmax(1), z.argmax(1))


def test_changing_places_keeps_the_values() -> None:
    s = logits(50)
    label = torch.arange(50) % 6
    made = first(s, label)
    assert torch.equal(made.argmax(1), label)
    assert torch.allclose(made.sort(1).values, s.sort(1).values, atol=2 * LEAD)


def test_rows_that_are_no_numbers_stay_so() -> None:
    z = logits(3)
    z[1, 2] = torch.nan
    for made in (rounded(z, 1), noisy(z, 0.1, "probabilities", True, generator())):
        assert made[1].isnan().any()
        assert made[[0, 2]].isfinite().all()
    assert rounded(torch.tensor([[200.0, 0.0]]), 3).isfinite().all()
    assert FLOOR > 0


# --- who is troubled -------------------------------------------------------------------------------


def wraps() -> dict[str, tuple[Wrap, ...]]:
    [rounding], [noise] = scores.score_round(1), scores.score_noise(0.05)
    assert isinstance(rounding, Wrap)
    assert isinstance(noise, Wrap)
    return {"none": (), "round": (rounding,), "noise": (noise,)}


@pytest.mark.parametrize("name", ["round", "noise"])
def test_an_attacker_with_the_weights_is_not(name: str) -> None:
    p = problem(n=12)
    attack = GradientAttack(steps=20, start="clean")
    eps = float(p.distance("linf").max()) * 1.1
    victim = p.victim(wraps()[name])
    made = attack(victim, p.batch, threat(eps), stream())
    assert (victim.decide(made.x).label != p.batch.y).all()


def test_random_search_by_scores_is_and_by_decisions_is_not() -> None:
    """A step of the search gains less than rounding shows; noise hides the gain. Decisions do not change."""
    p = problem(n=16, shape=(3, 8, 8))
    # Ten times as steep, so that probabilities are near 0 and 1 as a trained model's are.
    with torch.no_grad():
        p.module.weight.mul_(10)
        p.module.bias.mul_(10)
    eps = float(p.distance("linf").max()) * 2
    ball = Threat(Ball("linf", threat(eps).perturbation.eps), access=Access.SCORE)
    broken = {}
    for name, around in wraps().items():
        victim = p.victim(around)
        made = Square(queries=400)(victim, p.batch, ball, stream())
        broken[name] = int((Victim(p.module, 2).decide(made.x).label != p.batch.y).sum())
        assert torch.equal(victim.decide(made.x).label, victim.bare.decide(made.x).label)
    assert broken["none"] > broken["round"]
    assert broken["none"] > broken["noise"]
