"""digit-scenes: what is drawn is what the captions say, the same each time, and as many as wanted."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest

from advplug.errors import UsageError
from advplug.leakage import find_leaks
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.testing import check_dataset
from advplug_clip.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    PLACES,
    PROMPTS,
    SIZES,
    TEMPLATES,
    Scene,
    long_caption,
    short_caption,
)


def make(text: str):
    reference = parse_reference(text)
    entry = registry().get("dataset", reference.name)
    return entry.make(entry.bind(reference))


@pytest.fixture(scope="module")
def scenes():
    return make("digit-scenes").load()


def pixels(split) -> np.ndarray:
    return split.images.array.transpose(0, 2, 3, 1) / 255


def read(caption: str) -> dict[str, str]:
    """The attributes that a caption of one digit states."""
    words = f" {caption} "
    found = {}
    for what, table in (("size", SIZES), ("place", PLACES)):
        said = [name for name, ways in table.items() if any(f" {w} " in words for w in ways)]
        found |= {what: said[0]} if said else {}
    for what, names in (("colour", COLOURS), ("ground", BACKGROUNDS), ("digit", DIGITS)):
        said = [name for name in names if f" {name} " in words]
        assert len(said) <= 1, caption
        found |= {what: said[0]} if said else {}
    return found


def test_conforms():
    check_dataset("digit-scenes", train=200, n=100)
    check_dataset("digit-scenes", train=50, n=50, size=48, count=9, captions=5)


def test_facts(scenes):
    info = scenes.info
    assert (len(scenes.train), len(scenes.test)) == (4000, 1000)
    assert (info.channels, info.size, info.classes, info.evaluate) == (3, (32, 32), DIGITS, None)
    assert info.budgets["linf"] == Fraction(8, 255)
    assert info.captions
    assert not info.flip
    assert make("digit-scenes:n=2000").info().evaluate == 1000
    for split in (scenes.train, scenes.test):
        assert np.ptp(np.bincount(split.labels)) <= 1
    assert np.bincount(scenes.test.labels[:100]).tolist() == [10] * 10


def test_a_smaller_set_is_the_beginning_of_a_larger_one(scenes):
    part = make("digit-scenes:train=30,n=20").load()
    for small, large in ((part.train, scenes.train), (part.test, scenes.test)):
        n = len(small)
        assert np.array_equal(small.images.array, large.images.array[:n])
        assert small.captions == large.captions[:n]
        assert small.names == large.names[:n]
    other = make("digit-scenes:train=30,n=20,seed=1").load()
    assert other.train.captions != part.train.captions
    texts = ["digit-scenes", "digit-scenes:n=10", "digit-scenes:seed=1", "digit-scenes:count=2", "digit-scenes:size=48"]
    assert len({make(t).fingerprint() for t in texts}) == len(texts)


def test_handwriting_is_not_shared_by_training_and_test(scenes):
    from sklearn.datasets import load_digits

    assert not find_leaks(scenes.train, scenes.test)
    writers = [{int(name.rpartition(" ")[2]) for name in split.names} for split in (scenes.train, scenes.test)]
    assert not writers[0] & writers[1]
    assert len(writers[0]) > 1300
    assert max(map(len, writers)) <= 1397
    labels = load_digits().target
    own = [int(name.rpartition(" ")[2]) for name in scenes.test.names]
    assert np.array_equal(labels[own], scenes.test.labels)


def test_training_captions(scenes):
    assert {len(own) for own in scenes.train.captions} == {1}
    texts = [own[0] for own in scenes.train.captions]
    short = {p.format(d).replace("a eight", "an eight") for p in PROMPTS for d in DIGITS}
    said = [read(t) for t in texts]
    assert [DIGITS.index(s["digit"]) for s in said] == scenes.train.labels.tolist()
    # A long one without any attribute may read like a short one.
    assert np.mean([t in short for t in texts]) == pytest.approx(0.6, abs=0.03)
    longer = [s for s, t in zip(said, texts, strict=True) if t not in short]
    for what in ("colour", "size", "ground", "place"):
        assert 0.33 < np.mean([what in s for s in longer]) < 0.47
    assert max(len(t.split()) for t in texts) <= 17


def test_test_captions_are_full_distinct_and_true_to_the_image(scenes):
    assert {len(own) for own in scenes.test.captions} == {3}
    assert all(len(set(own)) == 3 for own in scenes.test.captions)
    everything = [t for own in scenes.test.captions for t in own]
    assert len(set(everything)) == len(everything)
    said = [[read(t) for t in own] for own in scenes.test.captions]
    assert all(len(s) == 5 for own in said for s in own)
    assert all(s == own[0] for own in said for s in own), "paraphrases say the same"
    assert len({tuple(own[0].values()) for own in said}) == 1000
    assert [DIGITS.index(own[0]["digit"]) for own in said] == scenes.test.labels.tolist()
    middles = {place: [] for place in PLACES}
    for image, (facts, *_) in zip(pixels(scenes.test), said, strict=True):
        ground, colour = np.array(BACKGROUNDS[facts["ground"]]), np.array(COLOURS[facts["colour"]])
        ink = inked(image, ground, colour)
        assert abs(np.median(image[ink < 0.2], axis=0) - ground).max() < 0.2
        assert abs(np.median(image[ink > 0.8], axis=0) - colour).max() < 0.2
        rows, columns = (np.flatnonzero((ink > 0.5).any(axis=a)) for a in (1, 0))
        assert np.ptp(rows) + 1 <= {"small": 18, "large": 25}[facts["size"]]
        assert np.ptp(rows) + 1 >= {"small": 9, "large": 13}[facts["size"]]
        middles[facts["place"]].append([(rows[0] + rows[-1]) / 2 - 15.5, (columns[0] + columns[-1]) / 2 - 15.5])
    for place, found in middles.items():
        down, right = place.split() if place != "centre" else ("", "")
        for axis, side in enumerate((down, right)):
            way = {"top": -1, "left": -1, "": 0, "bottom": 1, "right": 1}[side]
            assert np.mean(found, axis=0)[axis] * way >= 4.5 * abs(way)
            assert abs(np.mean(found, axis=0)[axis]) < (6 if way else 1)


def inked(image, ground, colour) -> np.ndarray:
    """How much of each pixel is the digit's, 0 to 1."""
    return ((image - ground) @ (colour - ground) / ((colour - ground) ** 2).sum()).clip(0, 1)


def test_several_digits():
    data = make("digit-scenes:train=20,n=600,count=4").load()
    images = pixels(data.test)
    counts = np.array([1 + name.count("+") for name in data.test.names])
    assert set(counts) == {1, 2, 3, 4}
    for image, count, (text, *_) in zip(images, counts, data.test.captions, strict=True):
        words = text.split()
        ground = next(np.array(rgb) for name, rgb in BACKGROUNDS.items() if name in words)
        ink = inked(image, ground, next(np.array(rgb) for name, rgb in COLOURS.items() if name in words))
        cells = [ink[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
        if count > 1:
            assert sum((cell > 0.6).sum() > 8 for cell in cells) == count, text
            assert f" {DIGITS[count]} " in f" {text} "
            assert not any(way in text for ways in PLACES.values() for way in ways)
    for text, words in {"digit-scenes:count=5": "size=33", "digit-scenes:count=2,size=16": "size=22"}.items():
        with pytest.raises(UsageError, match=words):
            make(text).info()
    assert make("digit-scenes:count=9,size=33,train=1,n=90").load().test.images.array.shape == (90, 3, 33, 33)


def test_the_grammar_is_unambiguous():
    looks = [(c, s, p, b) for c in COLOURS for s in SIZES for p in PLACES for b in BACKGROUNDS]
    for template in range(TEMPLATES):
        for words in ([0.0] * 3, [0.99] * 3):
            texts = {long_caption(Scene(d, *look), template, words) for look in looks for d in (0, 8)}
            assert len(texts) == 2 * len(looks)
    scene = Scene(8, "orange", "large", "centre", "navy")
    assert long_caption(scene, 0, [0, 0, 0]) == "a large orange eight in the middle on a navy background"
    assert long_caption(scene, 0, [0, 0, 0], {"colour"}) == "an orange eight"
    assert long_caption(scene, 2, [0.5, 0.9, 0.9]) == "the big orange digit eight at the center on navy"
    assert long_caption(scene, 4, [0, 0, 0], ()) == "an image with an eight"
    assert short_caption(scene, 4) == "a picture of an eight"
    assert short_caption(Scene(1, "red", "small", None, "black"), 2) == "a handwritten one"
    several = Scene(6, "red", "small", None, "black", 3)
    assert long_caption(several, 1, [0, 0, 0.9]) == "a photo of three small red sixes on black"
    assert (
        long_caption(several, 2, [0, 0, 0], set(ATTRIBUTES) - {"count"}) == "the small red sixes on a black background"
    )


def test_it_is_drawn_in_about_a_second():
    source = make("digit-scenes")
    start = time.perf_counter()
    source.load()
    assert time.perf_counter() - start < 5
