"""Targeted poisoning: whose copies join, under which name, and how copies differ."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from poison_tools import DATASETS, SCENES, dataset, pixels, poisoned, same

from advplug.contracts import Targets
from advplug.errors import UsageError
from advplug.naming import naming
from advplug.parse import parse_reference
from advplug.registry import registry


def targets(attack: str, data: str, seed: int = 0) -> Targets:
    found = poisoned(attack, data, seed).targets
    assert found is not None
    return found


@pytest.mark.parametrize("data", DATASETS)
def test_copies_join_and_the_rest_stays(data: str) -> None:
    clean, before = dataset(data), pixels(dataset(data).train)
    made = poisoned("tdpa:targets=5", data)
    copies = 6 if clean.train.captions else 3
    assert made.targets is not None
    assert made.trigger is None
    rows, wanted = made.targets.rows, made.targets.wanted
    assert len(set(rows.tolist())) == 5
    assert (wanted != clean.test.labels[rows]).all()
    assert made.poisons.sum() == 5 * copies == len(made.data) - len(clean.train)
    first = np.arange(len(clean.train))
    assert same(made.data.subset(first), clean.train)
    assert torch.equal(pixels(clean.train), before)
    assert not made.poisons[first].any()
    assert same(made.originals, clean.test.subset(np.repeat(rows, copies)))
    added = np.flatnonzero(made.poisons)
    assert np.array_equal(made.data.labels[added], np.repeat(wanted, copies))
    x = pixels(made.data, added)
    torch.testing.assert_close(x, x.round(), rtol=0, atol=1e-3)
    torch.testing.assert_close(x[::copies], pixels(clean.test, rows), rtol=0, atol=0.51)
    assert made.facts["poisons"] == 5 * copies
    assert made.facts["rate"] == 5 * copies / len(made.data)
    assert len(made.facts["wanted"]) == made.facts["targets"] == 5
    assert json.loads(json.dumps(made.facts)) == made.facts


def test_copies_with_labels_differ_a_little_and_those_with_captions_do_not() -> None:
    made = poisoned("tdpa:targets=4,copies=5", "digits:size=16")
    x = pixels(made.data, np.flatnonzero(made.poisons)).reshape(4, 5, -1)
    assert ((x[:, 1:] - x[:, :1]).abs().amax(2) > 1).all()
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 20
    exact = poisoned("tdpa:targets=4,copies=5,shift=0,noise=0", "digits:size=16")
    y = pixels(exact.data, np.flatnonzero(exact.poisons)).reshape(4, 5, -1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    scenes = poisoned("tdpa:targets=4", SCENES)
    z = pixels(scenes.data, np.flatnonzero(scenes.poisons)).reshape(4, 6, -1)
    assert torch.equal(z, z[:, :1].expand_as(z))
    moved = poisoned("tdpa:targets=4,noise=0.05", SCENES)
    w = pixels(moved.data, np.flatnonzero(moved.poisons)).reshape(4, 6, -1)
    assert (w[:, 1:] != w[:, :1]).any(2).all()


def test_copies_are_moved_by_at_most_the_shift() -> None:
    made = poisoned("tdpa:targets=3,copies=12,shift=2,noise=0", "digits:size=16")
    x = pixels(made.data, np.flatnonzero(made.poisons)).reshape(3, 12, 16, 16)
    seen = set()
    for target in x:
        wide = torch.nn.functional.pad(target[:1, None], (2,) * 4, mode="replicate")[0, 0]
        views = {(d, r): wide[d : d + 16, r : r + 16] for d in range(5) for r in range(5)}
        for copy in target:
            places = [place for place, view in views.items() if torch.equal(view, copy)]
            assert places
            seen |= set(places)
    assert len(seen) > 8


def test_captions_name_the_wanted_class_and_are_real() -> None:
    made, train = poisoned("tdpa:targets=6", SCENES), dataset(SCENES).train
    real = {text for texts in train.captions for text in texts}
    classes = dataset(SCENES).info.classes
    for row in np.flatnonzero(made.poisons):
        (text,) = made.data.captions[row]
        assert text in real
        assert naming(classes[made.data.labels[row]])(text)
    first = [made.data.captions[row][0] for row in np.flatnonzero(made.poisons)[:6]]
    assert len(set(first)) > 1
    sentences = poisoned("tdpa:targets=2,copies=3,captions='the digit {}'", SCENES)
    assert all("the digit " in sentences.data.captions[row][0] for row in np.flatnonzero(sentences.poisons))


@pytest.mark.parametrize("data", DATASETS)
def test_the_seed_decides(data: str) -> None:
    one, again, other = (poisoned("tdpa", data, seed) for seed in (0, 0, 1))
    assert same(one.data, again.data)
    assert one.targets is not None
    assert again.targets is not None
    assert np.array_equal(one.targets.wanted, again.targets.wanted)
    assert not np.array_equal(targets("tdpa", data).rows, targets("tdpa", data, 1).rows)
    assert not same(one.originals, other.originals)


def test_every_class_but_the_own_one_can_be_wanted() -> None:
    found = targets("tdpa:targets=39,copies=1", "fake:train=200,n=40")
    offsets = (found.wanted - dataset("fake:train=200,n=40").test.labels[found.rows]) % 10
    assert set(offsets.tolist()) >= set(range(1, 9))
    assert 0 not in offsets


@pytest.mark.parametrize(
    ("attack", "data", "words"),
    [
        ("tdpa:targets=0", "fake", ["targets must be >= 1"]),
        ("tdpa:targets=60", SCENES, ["targets=60 of 60 test images", "lower it"]),
        ("tdpa:copies=0", "fake", ["copies must be >= 1"]),
        ("tdpa:copies=1,noise=0.1", "fake", ["noise has no effect on copies=1"]),
        ("tdpa:copies=1,shift=2", "fake", ["shift has no effect on copies=1"]),
        ("tdpa:captions=templates", "fake", ["captions has no effect on images without captions"]),
        ("tdpa:captions=sampel", SCENES, ["did you mean 'sampled'"]),
    ],
)
def test_one_line_for_what_cannot_be(attack: str, data: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        poisoned(attack, data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_both_are_listed() -> None:
    for name in ("ba", "tdpa"):
        entry = registry().get("attack", name)
        assert entry.source.distribution == "advplug-poisoning"
        assert entry.describe()["caps"]["modalities"] == ["image", "image-text"]
        assert str(parse_reference(name)) == name
