"""What holds at one budget holds at larger ones, too: images of static and bare attackers, and who broke an image."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug import contracts, session
from advplug.contracts import Access, AttackCaps, Batch, Crafted, Strength, Threat, Trace
from advplug.registry import Source, load
from advplug.rng import Stream
from advplug.victim import Victim

N = 40
X = torch.full((N, 1, 4, 4), 0.55)
Y = torch.zeros(N, dtype=torch.long)
BUDGETS = ["1/10", "1/8", "1/5"]


class Bright(nn.Module):
    """Class 0 where an image is brighter than the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        lead = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([lead, -lead], dim=1)


class Forgetful:
    """Breaks everything at the smallest budget and nothing at larger ones; nothing at all through a defense."""

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        able = not victim.wraps and threat.eps == float(Fraction(BUDGETS[0]))
        return Crafted(batch.x - 0.1 * able, None)


class Search:
    """Says that random search broke one more image at each budget."""

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        at = [float(Fraction(eps)) for eps in BUDGETS].index(threat.eps)
        fell = batch.index.cpu() == at
        return Crafted(batch.x - 0.1 * fell.view(-1, 1, 1, 1).to(batch.x), Trace(black_box=fell))


class Masked:
    """Random search breaks half of the images at the smallest budget, and gradients none at any."""

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        fell = (batch.index.cpu() < N // 2) & (threat.eps == float(Fraction(BUDGETS[0])))
        return Crafted(batch.x - 0.1 * fell.view(-1, 1, 1, 1).to(batch.x), Trace(black_box=fell))


class Plugin:
    @staticmethod
    @advplug.hookimpl
    def advplug_attacks() -> list[contracts.Spec]:
        caps = AttackCaps(Access.GRADIENT, frozenset({"linf"}), frozenset({"untargeted"}), Strength.STRONG)
        return [contracts.Spec(name, f"{__name__}:{made}", caps, name)
                for name, made in (("forgetful", "Forgetful"), ("search", "Search"), ("masked", "Masked"))]  # fmt: skip


class _Point:
    @staticmethod
    def load() -> type:
        return Plugin


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    known = load([(Source("odd", "odd", "1"), _Point)])
    assert not known.broken
    monkeypatch.setattr(session, "registry", lambda: known)


def cells(attack: str, **ask: Any) -> list[Any]:
    return list(advplug.evaluate(Bright(), attack, dataset=(X, Y), classes=2, eps=BUDGETS, audit="none", **ask).cells)


def test_images_of_attackers_that_do_not_see_the_defense_count_at_larger_budgets() -> None:
    """Each lies within the larger ball as well."""
    defended = [c for c in cells("forgetful", defense="bit-depth:bits=8") if c.defense != "none"]
    assert [c.eps for c in defended] == BUDGETS
    for c in defended:
        left = {name: c.metrics[f"{name}_robust_accuracy"].value for name in ("adaptive", "static", "bare")}
        assert left == {"adaptive": 1.0, "static": 0.0, "bare": 0.0}, c.eps
        assert c.metrics["robust_accuracy"].value == 0


def test_what_random_search_broke_at_smaller_budgets_says_nothing_of_gradients_at_larger_ones() -> None:
    """One image a budget is what may be left to it; three together would not be."""
    found = cells("search")
    assert [round(c.metrics["robust_accuracy"].value * N) for c in found] == [N - 1, N - 2, N - 3]
    assert all(not c.flags for c in found)
    result = advplug.evaluate(Bright(), "search", dataset=(X, Y), classes=2, eps=BUDGETS, audit="none")
    named = {flag.name for threat in result.threats for flag in threat.flags}
    assert "black-box-beats-white-box" not in named


def test_what_was_masked_at_the_smallest_budget_is_not_forgotten_at_larger_ones() -> None:
    result = advplug.evaluate(Bright(), "masked", dataset=(X, Y), classes=2, eps=BUDGETS, audit="none")
    for threat in result.threats:
        (flag,) = [f for f in threat.flags if f.name == "black-box-beats-white-box"]
        assert flag.detail == f"random search breaks {N // 2} of {N} images that no gradient of masked broke"
