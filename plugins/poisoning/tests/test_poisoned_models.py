"""What poisons do to a model that is trained on them, and the conformance kit on the attacks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from poison_tools import dataset, make, poisoned
from torch import nn

from advplug.contracts import Trigger
from advplug.data import Split
from advplug.poisons.prepared import triggered
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.train import Training

DATA = "digits:train=1400"
TARGET = 0


@pytest.mark.parametrize(
    "attack",
    [
        "ba",
        "ba:trigger=checker,place=corners",
        "ba:trigger=random,fresh=true,place=random",
        "ba:trigger=blended,mode=all-to-all",
        "ba:trigger=sig,label=consistent",
        "ba:trigger=wanet",
        "tdpa",
    ],
)
def test_conformance(attack: str) -> None:
    name, _, settings = attack.partition(":")
    params = dict(item.split("=") for item in settings.split(",") if item)
    results = check_attack(name, **params)
    assert results
    assert all(r.ok for r in results), results


@cache
def trained(attack: str | None, seed: int = 0) -> nn.Module:
    """The `cnn`, trained on the set under attack."""
    data, source = dataset(DATA), make("model", "cnn")
    train = data.train if attack is None else poisoned(attack, DATA, seed).data
    stream = Stream(seed, "train")
    with stream.as_global("weights"):
        model = source.build(data.info)
    plan = source.schedule(data.info)
    return Training(train, data.info, plan, torch.device("cpu"), stream).fit(model)


@torch.no_grad()
def answers(model: nn.Module, split: Split, trigger: Trigger | None = None) -> np.ndarray:
    batch = split.batch(np.arange(len(split)))
    x = batch.x if trigger is None else triggered(trigger, batch.x, batch.index)
    found: np.ndarray = model(x).argmax(1).numpy()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_more_poisons_the_more_triggered_images_are_taken_for_the_target() -> None:
    """BadNets' white patch of 3 x 3 on 7 to 140 of 1400 digits; a clean model is not fooled by it."""
    test = dataset(DATA).test
    others = test.labels != TARGET
    rates = []
    for count in (0, 7, 14, 70, 140):
        attack = f"ba:size=3,target={TARGET},count={count or 1}"
        trigger = poisoned(attack, DATA).trigger
        model = trained(attack if count else None)
        rates.append(float((answers(model, test, trigger)[others] == TARGET).mean()))
        right = float((answers(model, test) == test.labels).mean())
        print(f"\n{count} poisons: {rates[-1]:.3f} of triggered images, clean accuracy {right:.3f}", end="")
        assert right > 0.93
    assert rates[0] < 0.05
    assert rates[1] < rates[3]
    assert min(rates[3:]) > 0.9
