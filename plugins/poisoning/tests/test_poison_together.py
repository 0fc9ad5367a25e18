"""Several attacks on one training set: each is there, and what was there before them is recorded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advplug.contracts import PoisonCaps, Poisoned
from advplug.data import Dataset
from advplug.errors import UsageError
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.poisons.prepared import poison
from advplug.registry import registry
from advplug.testing import check_attack

BOTH = "together:attacks=(ba:trigger=checker,size=4,count=20+tdpa:targets=5,copies=4)"


def digits() -> Dataset:
    found: Dataset = bind(registry(), "dataset", parse_reference("digits:size=16")).value.load()
    return found


def made(attack: str) -> Poisoned:
    return poison(bind(registry(), "attack", parse_reference(attack)), digits(), 0, {})


def test_both_are_there_with_what_was_there_before() -> None:
    both, data = made(BOTH), digits()
    assert both.poisons.sum() == 20 + 5 * 4
    assert both.trigger is not None
    assert both.targets is not None
    assert len(both.data) == len(data.train) + 20
    assert set(both.facts) == {"ba", "tdpa"}
    changed = np.flatnonzero(both.poisons[: len(data.train)])
    x = both.originals.batch(np.arange(20)).x
    assert torch.equal(x, data.train.batch(changed).x)
    assert both.originals.labels[:20].tolist() == data.train.labels[changed].tolist()
    copies = both.originals.batch(np.arange(20, 40)).x
    assert torch.equal(copies, data.test.batch(np.repeat(both.targets.rows, 4)).x)


def test_an_image_that_two_attacks_touch_is_recorded_as_it_was_at_first() -> None:
    twice = made("together:attacks=(ba:label=consistent,rate=1+tdpa:targets=5)")
    alone = made("ba:label=consistent,rate=1")
    assert twice.poisons[: len(alone.data)].sum() == alone.poisons.sum()


def test_it_conforms() -> None:
    assert all(r.ok is not False for r in check_attack("together"))


@pytest.mark.parametrize(
    ("attacks", "told"),
    [
        ("(ba)", "two attacks or more"),
        ("(ba+pgd)", "not pgd"),
        ("(ba+ba:trigger=sig)", "each bring trigger"),
        ("(tdpa+tdpa)", "each bring targets"),
        ("(ba:rate=0.1,count=3+tdpa)", "give one"),
    ],
)
def test_what_cannot_be_combined(attacks: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        made(f"together:attacks={attacks}")


def test_capabilities_are_those_that_all_have() -> None:
    entry = registry().get("attack", "together")
    params = entry.bind(parse_reference("together:attacks=(ba:label=consistent+tdpa)"))
    caps = entry.spec.caps_of(params)
    assert isinstance(caps, PoisonCaps)
    assert not caps.clean_label
    assert caps.modalities == {"image", "image-text"}
