"""The checks on hand-made evidence: thresholds, missing evidence, verdicts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from advplug.contracts import Strength
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
    }
    return Finding("attack", strength, change.pop("gradient", True), Evidence(**(facts | change)))


def audit(**change):
    rows = np.arange(64)
    none = bits(0, 64)
    facts = {"noise": none, "one_step": bits(20, 64), "cold_half": bits(30, 64), "cold_full": bits(45, 64)}
    return Audit(rows, np.ones(64, dtype=bool), **(facts | change))


def group(*findings, **change):
    return Group(findings or (finding(),), **({"audit": audit(), "batch_dependent": False} | change))


def test_a_sound_group_is_trusted():
    flags, unchecked = examine(group())
    assert (flags, unchecked) == ((), ())
    assert verdict(group(), flags, unchecked) == "trusted"


FAULTS = {
    "zero-gradients": group(finding(zero_gradient=np.where(np.arange(N) >= 50, 20, 0))),
    "nonfinite-gradients": group(finding(nonfinite=bits(1).astype(int))),
    "perturbation-violation": group(finding(violations=1, worst_violation=0.1)),
    "lost-in-rounding": group(finding(rounded=bits(40)[:, None])),
    "static-beats-adaptive": group(finding(static=bits(80)[:, None]), defended=True),
    "near-chance": group(finding(clean=(np.arange(N) % 5 == 0)[:, None])),
    "batch-dependent": group(batch_dependent=True),
    "one-step-beats-iterative": group(finding(broken=10), audit=audit(one_step=bits(40, 64))),
    "noise-beats-attack": group(finding(broken=10), audit=audit(noise=bits(40, 64), one_step=bits(5, 64))),
    "rises-with-budget": group(audit=audit(cold_half=bits(45, 64), cold_full=bits(30, 64))),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_is_tripped_by_its_own_fault_alone(name):
    flags, _ = examine(FAULTS[name])
    assert [f.name for f in flags] == [name]
    assert flags[0].detail
    expected = "not trustworthy" if CHECKS[name].level == "error" else "trusted"
    assert verdict(FAULTS[name], flags, ()) == expected


@pytest.mark.parametrize("name", CHECKS)
def test_one_image_or_a_hair_is_no_sign(name):
    """Just under each threshold nothing trips."""
    under = {
        "zero-gradients": group(finding(zero_gradient=np.full(N, 9))),
        "nonfinite-gradients": group(),
        "perturbation-violation": group(),
        "lost-in-rounding": group(finding(rounded=bits(45)[:, None])),
        "static-beats-adaptive": group(finding(static=bits(56)[:, None]), defended=True),
        "near-chance": group(finding(clean=(np.arange(N) % 5 < 2)[:, None])),
        "batch-dependent": group(),
        "one-step-beats-iterative": group(finding(broken=10), audit=audit(one_step=bits(16, 64))),
        "noise-beats-attack": group(finding(broken=10), audit=audit(noise=bits(16, 64), one_step=bits(5, 64))),
        "rises-with-budget": group(audit=audit(cold_half=bits(36, 64), cold_full=bits(30, 64))),
    }[name]
    assert CHECKS[name].run(under) == Outcome("passed")


def test_without_evidence_a_check_is_unchecked_and_nothing_is_trusted():
    bare = Group([finding(steps=None, zero_gradient=None, nonfinite=None)])
    flags, unchecked = examine(bare)
    assert set(unchecked) == {
        "zero-gradients",
        "nonfinite-gradients",
        "batch-dependent",
        "one-step-beats-iterative",
        "noise-beats-attack",
        "rises-with-budget",
    }
    assert verdict(bare, flags, unchecked) == "upper bound"


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
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (error|warn) \|", page, re.MULTILINE))
    assert rows == {name: check.level for name, check in CHECKS.items()}
