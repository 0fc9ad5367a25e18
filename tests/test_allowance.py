"""How much a run may spend, and what it does first."""

from __future__ import annotations

import pytest

from advplug.costs.allowance import Allowance, informative, parse_duration, parse_passes
from advplug.errors import UsageError
from advplug.matrix import Sweep
from advplug.session import Request, plan


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("90s", 90), ("1h30m", 5400), ("2h", 7200), ("1.5h", 5400), ("10 min", 600), ("1H 2M 3S", 3723)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-5m", "1m2h", "soon", "1e3s", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="--budget takes a time such as 30m, 90s or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "passes"), [("1e6", 10**6), ("250_000", 250_000), ("7", 7), ("2.5e3", 2500)])
def test_passes(text: str, passes: int) -> None:
    assert parse_passes(text) == passes


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e30", "many"])
def test_what_is_no_number_of_passes(text: str) -> None:
    with pytest.raises(UsageError, match="--max-passes takes a number of images such as 1e6"):
        parse_passes(text)


def test_an_allowance_is_used_up() -> None:
    assert not Allowance().limited
    assert not Allowance().used_up(1e9, 10**12)
    assert not Allowance(seconds=60).used_up(59.9, 10**12)
    assert Allowance(seconds=60).used_up(60.0, 0)
    assert not Allowance(passes=100).used_up(1e9, 99)
    assert Allowance(60, 100).used_up(1.0, 100)


def order(*attacks: str, defenses: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,)) -> list[tuple[str, str, int]]:
    asked = Request(("cnn",), attacks, defenses, ("8/255",), limit=50, seeds=seeds)
    return [named(s) for s in informative(plan(asked))]


def named(sweep: Sweep) -> tuple[str, str, int]:
    return sweep.attack.label, sweep.victim.defense_label, sweep.victim.seed


def test_attacks_that_iterate_come_first_the_cheapest_before_the_others() -> None:
    found = order("noise", "fgsm", "pgd:steps=40", "ifgsm:steps=5")
    assert [a for a, *_ in found] == ["ifgsm:steps=5", "pgd:steps=40", "noise", "fgsm"]


def test_every_victim_is_met_before_any_is_met_again_and_seeds_come_last() -> None:
    found = order("fgsm", "pgd:steps=40", defenses=("jpeg", "prune"), seeds=(3, 1))
    assert found == [
        (attack, defense, seed)
        for seed in (3, 1)
        for attack in ("pgd:steps=40", "fgsm")
        for defense in ("none", "jpeg", "prune")
    ]


def test_the_undefended_model_comes_before_those_that_are_judged_on_its_images() -> None:
    """Averaging over draws costs on a randomised victim only: there the order of the two attacks is the other one."""
    found = order("ifgsm:steps=5,draws=40", "ifgsm:steps=20", defenses=("noise-vote",))
    assert [a for a, d, _ in found if d == "none"] == ["ifgsm:steps=5,draws=40", "ifgsm:steps=20"]
    for attack in ("ifgsm:steps=5,draws=40", "ifgsm:steps=20"):
        assert found.index((attack, "none", 0)) < found.index((attack, "noise-vote", 0))
    assert found[0] == ("ifgsm:steps=5,draws=40", "none", 0)


def test_nothing_is_lost_or_doubled() -> None:
    asked = Request(
        ("cnn", "cnn-a"), ("fgsm", "pgd", "square"), ("jpeg", "noise-vote"), ("1/255", "l2:1"), seeds=(0, 1)
    )
    sweeps = plan(asked)
    assert sorted(s.key for s in informative(sweeps)) == sorted(s.key for s in sweeps)
