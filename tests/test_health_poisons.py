"""The checks of attacks on training data, on hand-made evidence: thresholds, what is said, verdicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from advplug.health.facts import Outcome
from advplug.health.poisons import CHECKS, Look, examined
from advplug.poisons.evidence import PoisonEvidence, measured

N = 100
PASSED, UNCHECKED, INAPPLICABLE = Outcome("passed"), Outcome("unchecked"), Outcome("inapplicable")
NONE = np.zeros(0, dtype=int)
NO_TRIGGER: dict[str, Any] = {"triggered": np.zeros((0, 1), int), "reference_triggered": NONE}


def evidence(success: float, reference: float, n: int = N, **more: Any) -> PoisonEvidence:
    """Four classes; the trigger asks for class 0 and gets it from the first `success` of the images, from the clean
    model on the first `reference`."""
    y = np.arange(n) % 4
    wanted = np.zeros(n, dtype=int)
    answer = np.where(np.arange(n) < success * n, wanted, y)[:, None]
    twin = np.where(np.arange(n) < reference * n, wanted, y)
    columns: dict[str, Any] = {
        "index": np.arange(n), "y": y, "wanted": wanted, "clean": y[:, None], "triggered": answer,
        "reference_clean": y, "reference_triggered": twin, "target_index": NONE, "target_y": NONE,
        "target_wanted": NONE, "target": NONE[:, None], "target_reference": NONE, "reaches": 1.0, "poisons": 5,
        "rows": 100,
    }  # fmt: skip
    return PoisonEvidence(**(columns | more))


def targets(hits: int, twins: int = 0, n: int = 10, draws: int = 1) -> dict[str, Any]:
    """Columns of `n` targets, of which the model takes the first `hits` and the clean model the first `twins` for
    what is wanted."""
    y = np.arange(n)
    answer = np.where(y < hits, y + 1, y)
    return {
        "target_index": y, "target_y": y, "target_wanted": y + 1, "target": np.tile(answer[:, None], (1, draws)),
        "target_reference": np.where(y < twins, y + 1, y),
    }  # fmt: skip


def run(name: str, own: PoisonEvidence, undefended: PoisonEvidence | None = None, defended: bool = False) -> Outcome:
    return CHECKS[name].run(Look(own, undefended, defended))


def test_success_is_counted_over_those_that_have_something_to_gain() -> None:
    found = measured(evidence(0.4, 0.0))
    assert found["attack_success_rate"] is not None
    assert (found["attack_success_rate"].n, found["attack_success_rate"].value) == (75, 30 / 75)
    assert found["triggered_accuracy"] is not None
    assert found["triggered_accuracy"].value == 0.7
    assert found["clean_model_success_rate"] is not None
    assert found["clean_model_success_rate"].value == 0
    stored = PoisonEvidence.from_bytes(evidence(0.4, 0.0).to_bytes())
    assert measured(stored) == found
    assert (stored.poisons, stored.reaches) == (5, 1.0)


@pytest.mark.parametrize(
    ("own", "undefended", "defended", "flags", "verdict"),
    [
        (evidence(0.9, 0.0), evidence(0.9, 0.0), False, [], "trusted"),
        (evidence(0.1, 0.0), evidence(0.9, 0.0), True, [], "upper bound"),
        (evidence(0.3, 0.3), evidence(0.3, 0.3), False, ["attack-did-not-take"], "not trustworthy"),
        (evidence(0.0, 0.3), evidence(0.3, 0.3), True, ["attack-did-not-take"], "not trustworthy"),
        (evidence(0.9, 0.0, reaches=0.05), evidence(0.9, 0.0), True, ["trigger-destroyed", "defense-adds-nothing"],
         "not trustworthy"),
        (evidence(0.9, 0.0, clean=np.zeros((100, 1), int)), evidence(0.9, 0.0), False, ["near-chance"],
         "not trustworthy"),
        (evidence(0.9, 0.0), evidence(0.9, 0.0), True, ["defense-adds-nothing"], "upper bound"),
        (evidence(0.1, 0.0), None, True, [], "upper bound"),
        (evidence(0.9, 0.0), None, False, [], "upper bound"),
    ],
)  # fmt: skip
def test_each_flag_has_its_fault(own: Any, undefended: Any, defended: bool, flags: list[str], verdict: str) -> None:
    found, said = examined(Look(own, undefended, defended))
    assert ([f.name for f in found], said) == (flags, verdict)
    assert all(CHECKS[f.name].level == f.level for f in found)


@pytest.mark.parametrize(("hits", "flagged"), [(5, False), (4, True)])
def test_five_targets_are_the_fewest_that_show_something(hits: int, flagged: bool) -> None:
    """One-sided sign test: 2^-5 < 0.05 < 2^-4."""
    e = evidence(0, 0, **NO_TRIGGER, **targets(hits, n=hits))
    found, _ = examined(Look(e, e, False))
    assert ("attack-did-not-take" in [f.name for f in found]) is flagged


def test_an_attack_takes_where_the_clean_model_does_not_do_the_same() -> None:
    name = "attack-did-not-take"
    taken = evidence(0.2, 0.0)
    assert run(name, taken) == UNCHECKED
    assert run(name, evidence(0.0, 0.0), taken) == PASSED, "only the undefended model says whether it took"
    # 30 % of the images are 22 of the 75 that have something to gain.
    assert run(name, taken, evidence(0.3, 0.3)).detail == (
        "without a defense 22 of 75 triggered images are taken for what was asked, by the clean model 22 (p = 1)"
    )
    assert run(name, taken, evidence(0.06, 0.0)).detail == (
        "without a defense 4 of 75 triggered images are taken for what was asked, by the clean model 0 (p = 0.062)"
    )
    assert run(name, taken, evidence(0.07, 0.0)) == PASSED
    both = evidence(0.3, 0.3, **targets(4, 2))
    assert run(name, taken, both).detail == (
        "without a defense 22 of 75 triggered images are taken for what was asked, by the clean model 22 (p = 1); "
        "without a defense 4 of 10 targets are taken for what was asked, by the clean model 2 (p = 0.25)"
    )
    assert run(name, taken, evidence(0.3, 0.0, **targets(4, 2))).detail.startswith("without a defense 4 of 10 targets")
    assert run(name, taken, evidence(0, 0, **NO_TRIGGER)) == PASSED, "nothing was asked"


def test_of_several_draws_most_have_to_agree() -> None:
    name = "attack-did-not-take"
    hit, miss = evidence(0.9, 0.0), evidence(0.0, 0.0)
    half = evidence(0, 0, triggered=np.concatenate([hit.triggered, miss.triggered], axis=1))
    assert run(name, half, half).detail.startswith("without a defense 0 of 75 triggered images")
    most = evidence(0, 0, triggered=np.concatenate([hit.triggered, miss.triggered, hit.triggered], axis=1))
    assert run(name, most, most) == PASSED
    assert run(name, most, evidence(0, 0, **NO_TRIGGER, **targets(9, 4, draws=3))) == PASSED


def test_a_trigger_that_does_not_arrive() -> None:
    name = "trigger-destroyed"
    assert run(name, evidence(0.9, 0.0, reaches=0.0994)).detail == (
        "9.9 % of the trigger reaches the first layer with weights"
    )
    assert run(name, evidence(0.9, 0.0, reaches=0.1)) == PASSED
    for unseen in (np.nan, np.inf):
        assert run(name, evidence(0.9, 0.0, reaches=unseen)) == UNCHECKED
    assert run(name, evidence(0, 0, reaches=0.0, **NO_TRIGGER)) == INAPPLICABLE


def test_a_guess_is_no_model() -> None:
    """One class of four and a fifth of the rest are 40 %, and the interval has to lie above."""

    def right(count: int) -> PoisonEvidence:
        return evidence(0.9, 0.0, clean=np.where(np.arange(N) < count, np.arange(N) % 4, 9)[:, None])

    assert run("near-chance", right(50)) == PASSED
    assert run("near-chance", right(49)).detail == (
        "clean accuracy 49.0 % (at least 39.4 %) is near chance; always answering the largest class gives 25.0 %, "
        "and at least 40.0 % are asked for"
    )
    twice = evidence(0.9, 0.0, clean=np.stack([np.arange(N) % 4, np.zeros(N, dtype=int)], axis=1))
    assert run("near-chance", twice) == PASSED, "62.5 % over two draws"
    never = evidence(0.9, 0.0, clean=np.full((N, 1), -1))
    assert run("near-chance", never).detail == (
        "clean accuracy 0.0 % (at least 0.0 %) is near chance; always answering the largest class gives 25.0 %, "
        "and at least 40.0 % are asked for"
    )


def test_what_a_defense_takes_from_an_attack() -> None:
    name = "defense-adds-nothing"
    bare = evidence(0.8, 0.0, **targets(10))
    assert run(name, bare, bare) == INAPPLICABLE
    assert run(name, bare, None, True) == UNCHECKED
    # 60 and 15 of 75 images: 45 pairs of 77 fall one way, one each is added.
    assert run(name, evidence(0.2, 0.0, **targets(0)), bare, True) == PASSED
    none = run(name, bare, bare, True)
    assert none.detail == (
        "no lower success is shown on triggered images: +0.0 points [-3.6, +3.6]; "
        "no lower success is shown on targets: +0.0 points [-23.1, +23.1]"
    )
    assert run(name, evidence(0.2, 0.0, **targets(10)), bare, True).detail == (
        "no lower success is shown on targets: +0.0 points [-23.1, +23.1]"
    )
    worse = run(name, evidence(0.8, 0.0, **NO_TRIGGER, **targets(10)), evidence(0, 0, **NO_TRIGGER, **targets(2)), True)
    assert worse.detail.startswith("no lower success is shown on targets: +80.0 points [+")
    assert run(name, evidence(0, 0, **NO_TRIGGER), bare, True) == PASSED, "of what was not seen nothing is said"
