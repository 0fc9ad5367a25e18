"""From stored cells to the rows of a result: what is compared with what, and which audit answers for whom."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from advplug.assemble import Stored, assemble, group_key, strength_of
from advplug.contracts import Strength
from advplug.evidence import Evidence
from advplug.health import Audit
from advplug.matrix import Sweep
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.registry import registry
from advplug.results import RunInfo, ThreatRow
from advplug.session import Request, plan
from advplug.work import cell_of

N = 100
BROKEN = {"fgsm": 40, "pgd": 80}
"""Of both victims alike: the defense does nothing."""


def evidence(broken: int) -> Evidence:
    """`broken` of N images fall; all are right without attack."""
    index, clean = np.arange(N), np.ones((N, 1), bool)
    return Evidence(index, index % 10, clean, clean[:, 0], (index < broken)[:, None])


def matrix(*defenses: str) -> list[Sweep]:
    return plan(Request(models=("cnn",), attacks=("fgsm", "pgd"), defenses=defenses, budgets=("0.1",)))


def rows(sweeps: list[Sweep], have: dict[str, tuple[Any, Evidence | None]], audits: dict[str, Any]) -> list[ThreatRow]:
    stored = Stored(lambda key: have[key][0] if key in have else None,
                    lambda key: have[key][1] if key in have else None, audits.get, lambda key: None)  # fmt: skip
    return list(assemble(sweeps, stored, RunInfo({}, 0, "cpu", "")).threats)


def finished(sweeps: list[Sweep]) -> dict[str, tuple[Any, Evidence | None]]:
    return {s.cell_key(e): (cell_of(s, e, "ok"), evidence(BROKEN[s.attack.label])) for s in sweeps for e in s.budgets}


@pytest.mark.parametrize("lacking", ["none", "prune"])
@pytest.mark.parametrize("how", ["never reached", "failed"])
def test_a_difference_is_that_of_attacks_that_met_both(lacking: str, how: str) -> None:
    sweeps = matrix("prune")
    have = finished(sweeps)
    (gone,) = [s for s in sweeps if s.victim.defense_label == lacking and s.attack.label == "pgd"]
    key = gone.cell_key(gone.budgets[0])
    del have[key]
    if how == "failed":
        have[key] = (cell_of(gone, gone.budgets[0], "failed", "out of memory"), None)
    bare, pruned = rows(sweeps, have, {})
    assert bare.difference_to_baseline is None
    assert pruned.difference_to_baseline is not None
    assert pruned.difference_to_baseline.value == 0, "one lacks the stronger attack: nothing is shown by that"
    assert pruned.worst_case_accuracy is not None
    assert pruned.worst_case_accuracy.value == (0.6 if lacking == "prune" else 0.2)


def test_without_an_attack_in_common_there_is_no_difference() -> None:
    sweeps = matrix("prune")
    have = finished(sweeps)
    for sweep in sweeps:
        if (sweep.victim.defense_label == "none") == (sweep.attack.label == "fgsm"):
            del have[sweep.cell_key(sweep.budgets[0])]
    _, pruned = rows(sweeps, have, {})
    assert pruned.difference_to_baseline is None
    assert "defense-adds-nothing" in pruned.unchecked


def test_an_audit_answers_for_the_attacks_that_it_saw() -> None:
    sweeps = matrix("none")
    eps = Fraction(1, 10)
    have = finished(sweeps)
    audit = Audit(np.arange(8))
    seen = group_key([(s, eps) for s in sweeps if s.attack.label == "fgsm"])
    (both,) = rows(sweeps, have, {seen: audit})
    assert both.audit is None, "the other attack has come since"
    (failed,) = [s for s in sweeps if s.attack.label == "pgd"]
    have[failed.cell_key(eps)] = (cell_of(failed, eps, "failed", "out of memory"), None)
    (one,) = rows(sweeps, have, {seen: audit})
    assert one.audit is not None


@pytest.mark.parametrize("weaker", ["apgd-t:n_targets=1", "adv.apgd-t:targets=1", "apgd:steps=10"])
def test_trying_less_than_by_default_is_no_strong_evidence(weaker: str) -> None:
    known = registry()
    name = parse_reference(weaker).name
    if name not in known.tables["attack"]:
        pytest.skip(f"{name} is not installed")
    assert strength_of(bind(known, "attack", parse_reference(name))) is Strength.STRONG
    assert strength_of(bind(known, "attack", parse_reference(weaker))) is Strength.ITERATIVE
