"""The checks on hand-made evidence: thresholds, missing evidence, verdicts."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from advplug.contracts import Strength
from advplug.estimate import Estimate
from advplug.evidence import Evidence
from advplug.health import CHECKS, Audit, Finding, Group, Outcome, examine, verdict

N = 100


def bits(count, n=N):
    found = np.zeros(n, dtype=bool)
    found[:count] = True
    return found


def finding(broken=50, strength=Strength.STRONG, **change):
    clean = np.ones((N, 1), dtype=bool)
    facts = {
        "index": np.arange(N),
        "y": np.arange(N) % 10,
        "clean": clean,
        "attacked": clean[:, 0],
        "adaptive": bits(broken)[:, None],
        "rounded": bits(broken)[:, None],
        "steps": np.full(N, 20),
        "zero_gradient": np.zeros(N, dtype=int),
        "nonfinite": np.zeros(N, dtype=int),
        "any_iterate": bits(broken),
    }
    return Finding("attack", strength, change.pop("gradient", True), Evidence(**(facts | change)))


def black_box(broken, queries=1000, **change):
    counts = np.full(N, queries)
    return finding(broken, Strength.ITERATIVE, gradient=False, steps=None, zero_gradient=None, nonfinite=None,
                   any_iterate=None, queries=counts, **change)  # fmt: skip


def audit(**change):
    rows = np.arange(64)
    none = bits(0, 64)
    facts = {
        "noise": none,
        "one_step": bits(20, 64),
        "cold_half": bits(30, 64),
        "cold_full": bits(45, 64),
        "unbounded": bits(60, 64),
        "saturated": none,
        "probed": ~bits(50, 64),
        "longer": none,
        "longer_steps": 40,
        "plain": ~bits(4, 64),
        "normalised": bits(30, 64),
        "mismatch": np.zeros(32),
        "spread": 0.0,
        "probabilities": False,
    }
    return Audit(rows, **(facts | change))


def group(*findings, **change):
    return Group(findings or (finding(),), **({"audit": audit(), "batch_dependent": False} | change))


def test_a_sound_group_is_trusted():
    flags, unchecked = examine(group())
    assert (flags, unchecked) == ((), ("black-box-beats-white-box",))
    assert verdict(group(), flags, unchecked) == "trusted"


FAULTS = {
    "zero-gradients": group(finding(zero_gradient=np.where(np.arange(N) >= 50, 20, 0))),
    "nonfinite-gradients": group(finding(nonfinite=bits(1).astype(int))),
    "gradient-mismatch": group(audit=audit(mismatch=np.where(np.arange(32) < 4, 0.02, 0.0))),
    "saturated-logits": group(audit=audit(saturated=bits(7, 64), margin=bits(60, 64))),
    "randomised-without-eot": group(audit=audit(spread=1.1e-4)),
    "perturbation-violation": group(finding(violations=1, worst_violation=0.1)),
    "lost-in-rounding": group(finding(rounded=bits(34)[:, None])),
    "silent-success": group(finding(any_iterate=bits(52))),
    "static-beats-adaptive": group(finding(static=bits(80)[:, None]), defended=True),
    "black-box-beats-white-box": group(finding(), black_box(57, queries=10)),
    "near-chance": group(finding(clean=(np.arange(N) % 5 == 0)[:, None])),
    "batch-dependent": group(batch_dependent=True),
    "probabilities": group(audit=audit(probabilities=True)),
    "undeclared-normalisation": group(audit=audit(plain=~bits(7, 64), normalised=~bits(0, 64))),
    "one-step-beats-iterative": group(finding(broken=10), audit=audit(one_step=bits(40, 64))),
    "noise-beats-attack": group(finding(broken=10), audit=audit(noise=bits(40, 64), one_step=bits(5, 64))),
    "rises-with-budget": group(audit=audit(cold_half=bits(45, 64), cold_full=bits(30, 64))),
    "unbounded-attack-fails": group(audit=audit(unbounded=bits(56, 64))),
    "not-converged": group(audit=audit(longer=bits(53, 64) & ~bits(50, 64))),
    "defense-adds-nothing": group(finding(static=bits(50)[:, None]), defended=True,
                                  difference=Estimate(0.01, 0.0, 0.02, N)),
    "below-certified": group(certified=bits(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_is_tripped_by_its_own_fault_alone(name):
    flags, _ = examine(FAULTS[name])
    assert [f.name for f in flags] == [name]
    assert flags[0].detail
    expected = {"error": "not trustworthy", "warn": "upper bound", "info": "trusted"}[CHECKS[name].level]
    assert verdict(FAULTS[name], flags, ()) == expected


@pytest.mark.parametrize("name", CHECKS)
def test_one_image_or_a_hair_is_no_sign(name):
    """Just under each threshold nothing trips."""
    under = {
        "zero-gradients": group(finding(zero_gradient=np.full(N, 9))),
        "nonfinite-gradients": group(),
        "gradient-mismatch": group(audit=audit(mismatch=np.where(np.arange(32) < 3, 1.0, 0.01))),
        "saturated-logits": group(audit=audit(saturated=bits(7, 64), margin=bits(56, 64))),
        "randomised-without-eot": group(audit=audit(spread=1e-4)),
        "perturbation-violation": group(),
        "lost-in-rounding": group(finding(rounded=bits(35)[:, None])),
        "silent-success": group(finding(any_iterate=bits(51))),
        "static-beats-adaptive": group(finding(static=bits(56)[:, None]), defended=True),
        "black-box-beats-white-box": group(finding(), black_box(56)),
        "near-chance": group(finding(clean=(np.arange(N) % 5 < 2)[:, None])),
        "batch-dependent": group(),
        "probabilities": group(),
        "undeclared-normalisation": group(audit=audit(plain=~bits(6, 64), normalised=~bits(0, 64))),
        "one-step-beats-iterative": group(finding(broken=10), audit=audit(one_step=bits(16, 64))),
        "noise-beats-attack": group(finding(broken=10), audit=audit(noise=bits(16, 64), one_step=bits(5, 64))),
        "rises-with-budget": group(audit=audit(cold_half=bits(36, 64), cold_full=bits(30, 64))),
        "unbounded-attack-fails": group(audit=audit(unbounded=bits(57, 64))),
        "not-converged": group(audit=audit(longer=bits(52, 64) & ~bits(50, 64))),
        "defense-adds-nothing": group(defended=True, difference=Estimate(0.02, 0.001, 0.04, N)),
        "below-certified": group(certified=~bits(50)),
    }[name]
    assert CHECKS[name].run(under) == Outcome("passed")


def test_without_evidence_a_check_is_unchecked_and_nothing_is_trusted():
    bare = Group([finding(steps=None, zero_gradient=None, nonfinite=None, any_iterate=None)])
    flags, unchecked = examine(bare)
    optional = {"static-beats-adaptive", "defense-adds-nothing", "below-certified"}
    evident = {"perturbation-violation", "lost-in-rounding", "near-chance"}
    assert set(unchecked) == CHECKS.keys() - evident - optional
    assert verdict(bare, flags, unchecked) == "upper bound"
    assert {"static-beats-adaptive", "defense-adds-nothing"} <= set(examine(Group(bare.findings, defended=True))[1])


NO_CHECK_WITHOUT = {"attacked_spread"}
"""Observations that only spare a check its alarm."""


@pytest.mark.parametrize(
    "missing", [f.name for f in fields(Audit) if f.default is None and f.name not in NO_CHECK_WITHOUT]
)
def test_an_observation_that_is_missing_leaves_its_check_unchecked(missing):
    certain = audit(saturated=bits(7, 64), margin=bits(0, 64), black_box=bits(0, 64))
    assert examine(group(audit=certain)) == ((), ())
    flags, unchecked = examine(group(audit=replace(certain, **{missing: None})))
    assert (flags, len(unchecked)) == ((), 1)


def test_what_need_not_run_does_not_stand_in_the_way_of_trust():
    assert {name for name, check in CHECKS.items() if not check.required} == {
        "black-box-beats-white-box",
        "defense-adds-nothing",
        "gradient-mismatch",
    }


def test_black_box_attacks_count_by_their_questions():
    run = CHECKS["black-box-beats-white-box"].run
    assert run(group()).state == "unchecked"
    assert run(group(finding(), black_box(10, queries=999))).state == "unchecked"
    assert run(group(finding(), black_box(10))).state == "passed"
    assert run(group(audit=audit(black_box=bits(60, 64)))).state == "tripped"
    assert run(group(audit=audit(black_box=bits(50, 64)))).state == "passed"
    assert run(group(finding(strength=Strength.ONE_STEP), black_box(90))).state == "inapplicable"


def test_what_a_cascade_leaves_to_random_search_is_no_success_of_its_gradients():
    """AutoAttack warns at 0.2 points; here the interval must lie above, on the images that were attacked."""
    run = CHECKS["black-box-beats-white-box"].run

    def cascade(late, queries=5000):
        return group(finding(black_box=bits(50) & ~bits(50 - late), queries=np.full(N, queries)))

    assert run(cascade(0)).state == "passed"
    assert run(cascade(0, queries=500)).state == "unchecked"
    assert run(cascade(1)).state == "passed"
    assert run(cascade(2)).state == "tripped"
    assert run(group(finding(), *cascade(9).findings)).state == "passed"
    assert run(group(finding(broken=N))).state == "passed"


def test_a_randomised_victim_needs_an_attack_that_averages():
    run = CHECKS["randomised-without-eot"].run
    random = audit(spread=None, stochastic=True)
    assert run(group(audit=random)).state == "tripped"
    assert run(group(replace(finding(), draws=20), audit=random)).state == "passed"
    assert run(group(audit=replace(random, draws=20))).state == "passed"
    assert run(group(black_box(10), audit=random)).state == "passed"


def test_checks_without_meaning_are_left_out():
    left_out = {
        "gradient-mismatch": group(audit=audit(gradient="bpda")),
        "unbounded-attack-fails": group(audit=audit(rejects=True)),
        "not-converged": group(finding(strength=Strength.ONE_STEP)),
        "silent-success": group(finding(found=np.zeros(N))),
        "defense-adds-nothing": group(),
    }
    for name, without in left_out.items():
        assert CHECKS[name].run(without).state == "inapplicable", name
    assert CHECKS["unbounded-attack-fails"].run(group(targeted=True)).state == "inapplicable"


def test_convergence_is_judged_on_the_images_that_are_left():
    run = CHECKS["not-converged"].run
    assert run(group(finding(broken=100))).state == "passed"
    few = audit(probed=bits(54, 64) & ~bits(50, 64), longer=bits(54, 64) & ~bits(50, 64))
    outcome = run(group(audit=few))
    assert outcome.state == "tripped"
    assert "break 4 of 4 images that are left, about 21.9 points" in outcome.detail
    assert run(group(audit=audit(probed=bits(50, 64)))).state == "unchecked"


def test_a_defense_that_harms_is_told_apart_from_one_without_effect():
    run = CHECKS["defense-adds-nothing"].run
    harm = run(group(defended=True, difference=Estimate(-0.1, -0.15, -0.05, N)))
    none = run(group(defended=True, difference=Estimate(0.0, -0.02, 0.02, N)))
    assert harm.detail.startswith("the defense lowers robust accuracy: -10.0 points [-15.0, -5.0]")
    assert none.detail.startswith("no difference to the undefended model is shown: +0.0 points")


def test_weak_attacks_alone_give_an_upper_bound():
    for strength in (Strength.FLOOR, Strength.ONE_STEP, Strength.ITERATIVE):
        weak = group(finding(strength=strength))
        assert verdict(weak, *examine(weak)) == "upper bound"


def test_a_group_without_evidence_has_no_verdict():
    assert verdict(Group([]), (), ()) is None


def test_a_strong_attack_beside_a_faulty_one_is_not_trusted():
    mixed = group(finding(), finding(violations=2))
    assert verdict(mixed, *examine(mixed)) == "not trustworthy"


def test_the_documentation_lists_every_check_with_its_level():
    page = (Path(__file__).parent.parent / "docs" / "verdicts.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (error|warn|info) \|", page, re.MULTILINE))
    assert rows == {name: check.level for name, check in CHECKS.items()}
