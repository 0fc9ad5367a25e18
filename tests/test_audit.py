"""The audit of a group: what it costs, what it is asked about, when it is made anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug import session
from advplug.assemble import finding, group_key
from advplug.audit import PGD_STEPS, QUICK, Member, from_bytes, run_audit, to_bytes
from advplug.build import Built
from advplug.contracts import Gradient, Targeted, Untargeted, Wrap
from advplug.data import ArrayImages, Split
from advplug.decisions import Batching, clean_decisions
from advplug.evidence import Evidence
from advplug.health.facts import Audit
from advplug.rng import Stream
from advplug.victim import Victim

IMAGES, CLASSES = 80, 4


class Counted(nn.Module):
    """Far from any boundary, so that every attack takes all of its steps; counts the images that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.asked = [0]

    def __deepcopy__(self, memo: Any) -> Counted:
        other = Counted()
        other.asked = self.asked
        return other

    def forward(self, x: Tensor) -> Tensor:
        self.asked[0] += len(x)
        quarters = x.flatten(1).view(len(x), CLASSES, -1).mean(2)
        return self.scale * 10 * quarters


def scene(*wraps: Wrap) -> Built:
    y = np.arange(IMAGES) % CLASSES
    x = np.zeros((IMAGES, CLASSES, 16), dtype=np.float32)
    x[np.arange(IMAGES), y] = 1
    split = Split(ArrayImages(x.reshape(IMAGES, 1, 8, 8)), y, np.arange(IMAGES))
    return Built(Victim(Counted(), CLASSES, wraps, stream=Stream(0, "victim")), split, 0, "")


def member(attack: str, built: Built) -> Member:
    """An attack that broke nothing."""
    (sweep,) = session.plan(session.Request(("cnn",), (attack,), datasets=("fake:classes=4",)))
    draws = 10 if built.victim.stochastic else 1
    clean = np.ones((IMAGES, draws), dtype=bool)
    evidence = Evidence(np.arange(IMAGES), built.split.labels, clean, clean[:, 0], np.zeros_like(clean))
    return Member(sweep.attack, finding(sweep, evidence))


def audited(built: Built, attack: str, level: Any = "quick", goal: Any = None) -> Audit:
    clean = clean_decisions(built.victim, built.split, Batching(128))
    built.victim.module.asked[0] = 0  # type: ignore[union-attr, operator]
    threat = ("linf", Fraction(1, 100), goal or Untargeted())
    return run_audit(built, clean, threat, [member(attack, built)], level, Batching(128))


NOISY = Wrap(lambda f, x, rng: f(x + 1e-3 * torch.randn(x.shape, generator=rng)), stochastic=True, draws=20)
STAND_INS = (lambda f, x, rng: f(x), lambda f, x, rng: 2 * f(x))
VIEWED = Wrap(lambda f, x, rng: f(x), Gradient.BPDA, STAND_INS)


@pytest.mark.parametrize("attack", ["pgd:steps=10", "pgd", "apgd", "apgd-t", "autoattack", "pgd:steps=500", "fgsm"])
def test_a_quick_audit_costs_at_most_a_pgd_of_100_steps_on_64_images(attack: str) -> None:
    built = scene()
    audit = audited(built, attack)
    assert len(audit.rows) == QUICK == 64
    # Timing the first passes asks about 16 images more.
    assert 0 <= built.victim.module.asked[0] - audit.forward <= 16  # type: ignore[union-attr, index]
    assert audit.forward <= (PGD_STEPS + 1) * QUICK
    assert audit.backward <= PGD_STEPS * QUICK
    assert audit.longer is None or not audit.longer.any()


@pytest.mark.parametrize(("wrap", "times"), [(NOISY, 20), (VIEWED, 2)])
def test_draws_and_surrogates_multiply_the_cost(wrap: Wrap, times: int) -> None:
    audit = audited(scene(wrap), "pgd")
    assert audit.forward <= times * (PGD_STEPS + 1) * QUICK
    assert audit.backward <= times * PGD_STEPS * QUICK
    assert audit.probed is not None
    assert audit.probed.sum() >= 8


def test_what_is_left_of_the_budget_goes_into_longer_attacks() -> None:
    """Twice the steps on as many survivors as that reaches; a cascade's place is taken by APGD."""
    found = {attack: audited(scene(), attack) for attack in ("pgd:steps=10", "pgd", "autoattack")}
    assert {a: audit.longer_steps for a, audit in found.items()} == {"pgd:steps=10": 20, "pgd": 40, "autoattack": 200}
    probed = [int(audit.probed.sum()) for audit in found.values() if audit.probed is not None]
    assert probed[0] == 64
    assert probed == sorted(probed, reverse=True)
    assert probed[2] >= 8


def test_longer_attacks_are_judged_by_as_many_draws_as_what_they_are_held_against() -> None:
    """Eight of ten answers to a changed image are wrong: of two draws both are in 64 %, of four a majority in 82 %."""

    def often(f: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator) -> Tensor:
        changed = ((x > 0) & (x < 1)).flatten(1).any(1, keepdim=True)
        lost = changed & (torch.rand(len(x), 1, generator=rng) < 0.8)
        return torch.where(lost, -f(x), f(x))

    built = scene(Wrap(often, stochastic=True, draws=1, decisions=4))
    clean = clean_decisions(built.victim, built.split, Batching(128))
    unbroken = Evidence(np.arange(IMAGES), built.split.labels, clean.right, clean.right[:, 0], ~clean.right)
    (sweep,) = session.plan(session.Request(("cnn",), ("pgd:steps=5",), datasets=("fake:classes=4",)))
    members = [Member(sweep.attack, finding(sweep, unbroken))]
    audit = run_audit(built, clean, ("linf", Fraction(1, 100), Untargeted()), members, "full", Batching(128))
    assert audit.longer is not None
    assert audit.probed is not None
    assert audit.probed.sum() == IMAGES
    assert audit.longer.mean() < 0.73


def test_a_full_audit_takes_all_images_and_asks_random_search() -> None:
    audit = audited(scene(), "pgd:steps=2", "full")
    assert (audit.level, len(audit.rows)) == ("full", IMAGES)
    assert audit.black_box is not None
    assert audit.probed is not None
    assert audit.probed.all()
    assert audit.forward > 1000 * IMAGES


def test_a_victim_without_gradient_is_met_with_noise_alone() -> None:
    blocked = Wrap(lambda f, x, rng: f(x.detach()), Gradient.NONE)
    audit = audited(scene(blocked), "square")
    assert audit.noise is not None
    assert (audit.one_step, audit.cold_full, audit.unbounded, audit.longer) == (None,) * 4
    assert audit.backward <= QUICK


def test_targeted_and_refusing_victims_get_no_unbounded_probe() -> None:
    assert audited(scene(), "pgd:steps=2").unbounded is not None
    assert audited(scene(), "pgd:steps=2", goal=Targeted("next")).unbounded is None
    picky = Wrap(lambda f, x, rng: f(x), accepts=lambda x, z: torch.ones(len(x), dtype=torch.bool))
    audit = audited(scene(picky), "pgd:steps=2")
    assert audit.rejects
    assert audit.unbounded is None


def test_nothing_right_leaves_nothing_to_look_at() -> None:
    built = scene()
    built.split.labels[:] = (built.split.labels + 1) % CLASSES
    audit = audited(built, "pgd")
    assert (len(audit.rows), audit.forward, audit.noise) == (0, 0, None)


def test_an_archived_audit_comes_back_whole() -> None:
    audit = audited(scene(), "pgd:steps=2", "full")
    back = from_bytes(to_bytes(audit))
    for f in fields(Audit):
        one, other = getattr(audit, f.name), getattr(back, f.name)
        assert type(one) is type(other), f.name
        np.testing.assert_array_equal(one, other)
    assert from_bytes(to_bytes(Audit(np.arange(3)))).noise is None


def test_an_audit_belongs_to_the_attacks_of_its_group() -> None:
    one, both = (
        session.plan(session.Request(("cnn",), attacks, datasets=("fake",), budgets=("1/50",)))
        for attacks in (("pgd",), ("pgd", "fgsm"))
    )
    keys = [group_key([(s, s.budgets[0]) for s in sweeps]) for sweeps in (one, both, both[::-1])]
    assert keys[0] != keys[1] == keys[2]
