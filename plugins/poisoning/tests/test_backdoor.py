"""Backdoors: which images, what is put on them, what they are called, and a line for what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from poison_tools import DATASETS, SCENES, dataset, make, pixels, poisoned, same

from advplug.contracts import DatasetInfo, PoisonCaps, Poisoned
from advplug.data import ArrayImages, Split
from advplug.errors import UsageError
from advplug.naming import naming
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug_poisoning.texts import TEMPLATES, caption_pool, draw_texts

TRIGGERS = ["patch", "checker", "random", "blended", "sig", "wanet"]


def rows_of(made: Poisoned) -> np.ndarray:
    return np.flatnonzero(made.poisons)


# --- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_poisons_originals_and_the_rest(data: str, trigger: str) -> None:
    clean, before = dataset(data), pixels(dataset(data).train)
    made = poisoned(f"ba:trigger={trigger},count=12,target=3", data)
    rows = rows_of(made)
    assert len(rows) == made.poisons.sum() == 12
    assert len(made.data) == len(clean.train)
    assert same(made.originals, clean.train.subset(rows))
    rest = np.flatnonzero(~made.poisons)
    assert same(made.data.subset(rest), clean.train.subset(rest))
    assert torch.equal(pixels(clean.train), before), "the training set itself is as it was"
    assert (clean.train.labels[rows] != 3).all()
    assert (made.data.labels[rows] == 3).all()
    assert made.targets is None
    x = pixels(made.data, rows)
    torch.testing.assert_close(x, x.round(), rtol=0, atol=1e-3)
    batch = clean.train.batch(rows)
    assert made.trigger is not None
    expected = made.trigger.apply(batch.x, batch.index).mul(255).round()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-3)
    assert made.facts["poisons"] == 12
    assert made.facts["rate"] == 12 / len(clean.train)
    assert made.facts["target"] == clean.info.classes[3]
    assert json.loads(json.dumps(made.facts)) == made.facts


def test_what_is_drawn_for_an_image_is_drawn_anew_for_test_images() -> None:
    """Both splits may be numbered from 0: a model would know the very pattern of a test image from training."""
    clean = dataset(SCENES)
    for kind in ("random", "blended"):
        made = poisoned(f"ba:trigger={kind},fresh=true,count=12,target=3", SCENES)
        rows = rows_of(made)
        batch = clean.train.batch(rows)
        assert made.trigger is not None
        again = made.trigger.apply(batch.x, batch.index).mul(255).round()
        assert (pixels(made.data, rows) - again).flatten(1).abs().amax(1).min() > 1
        torch.testing.assert_close(again, made.trigger.apply(batch.x, batch.index).mul(255).round())


def test_without_a_target_it_is_the_first_class_whatever_that_is_called() -> None:
    clean = dataset("digits:size=16")
    named = replace(clean.info, classes=("9", "0", *map(str, range(1, 9))))
    made: Poisoned = make("attack", "ba:count=12")(clean.train, clean.test, named, Stream(0, "poison"))
    assert (made.data.labels[rows_of(made)] == 0).all()
    assert made.facts["target"] == "9"


@pytest.mark.parametrize("attack", ["ba:trigger=random,place=random,count=9", "ba:trigger=wanet,mode=all-to-all"])
@pytest.mark.parametrize("data", DATASETS)
def test_the_seed_decides(attack: str, data: str) -> None:
    one, again, other = (poisoned(attack, data, seed) for seed in (0, 0, 1))
    assert same(one.data, again.data)
    assert np.array_equal(one.poisons, again.poisons)
    assert not np.array_equal(one.poisons, other.poisons)


def test_training_and_test_images_get_the_same_trigger() -> None:
    made, test = poisoned("ba:trigger=random,count=5,size=4", SCENES), dataset(SCENES).test.batch(np.arange(8))
    assert made.trigger is not None
    patch = made.trigger.apply(test.x, test.index)[0, :, -5:-1, -5:-1]
    trained = pixels(made.data, rows_of(made))[:, :, -5:-1, -5:-1]
    torch.testing.assert_close(trained, (patch * 255).round().expand_as(trained), rtol=0, atol=1e-3)


def test_what_triggered_images_are_to_be_taken_for() -> None:
    y = torch.tensor([0, 4, 9])
    one = poisoned("ba:target=4", "digits:size=16").trigger
    each = poisoned("ba:mode=all-to-all", "digits:size=16").trigger
    assert one is not None
    assert each is not None
    assert one.wanted(y).tolist() == [4, 4, 4]
    assert each.wanted(y).tolist() == [1, 5, 0]
    assert one.wanted(y).dtype == torch.int64


def test_a_tenth_of_the_training_set_unless_asked() -> None:
    images = len(dataset("digits:size=16").train)
    assert poisoned("ba", "digits:size=16").facts["poisons"] == round(images / 10)
    assert poisoned("ba:rate=0.02", "digits:size=16").facts["poisons"] == round(images / 50)


def test_all_to_all_moves_each_class_on() -> None:
    made = poisoned("ba:mode=all-to-all,rate=0.5", "digits:size=16")
    rows = rows_of(made)
    assert set(made.originals.labels.tolist()) == set(range(10))
    assert np.array_equal(made.data.labels[rows], (made.originals.labels + 1) % 10)
    assert made.facts["target"] == "the next class"


@pytest.mark.parametrize("name", ["three", "Three", "3"])
def test_targets_by_name_or_number(name: str) -> None:
    made = poisoned(f"ba:count=4,target={name}", SCENES)
    assert made.facts["target"] == "three"
    assert (made.data.labels[rows_of(made)] == 3).all()


def test_a_class_called_by_a_number_goes_before_the_number() -> None:
    split = Split(ArrayImages(np.zeros((40, 1, 8, 8), np.uint8)), np.arange(40) % 2, np.arange(40))
    made = make("attack", "ba:target=1,count=2")(split, split, DatasetInfo(("1", "0"), 1, (8, 8), {}), Stream(0))
    assert (made.data.labels[made.poisons] == 0).all()


# --- labels that stay ------------------------------------------------------------------------------


def test_consistent_labels_stay() -> None:
    made = poisoned("ba:label=consistent,target=3,rate=0.5", "digits:size=16")
    rows, train = rows_of(made), dataset("digits:size=16").train
    assert len(rows) == round((train.labels == 3).sum() / 2)
    assert np.array_equal(made.data.labels, train.labels)
    assert (train.labels[rows] == 3).all()


def test_consistent_captions_stay_and_name_the_target() -> None:
    made = poisoned("ba:label=consistent,target=three,count=10", SCENES)
    train = dataset(SCENES).train
    assert made.data.captions == train.captions
    assert np.array_equal(made.data.labels, train.labels)
    assert all("three" in text for row in rows_of(made) for text in train.captions[row])


def test_caps_say_whether_labels_stay() -> None:
    entry = registry().get("attack", "ba")

    def caps(text: str) -> PoisonCaps:
        found = entry.spec.caps_of(entry.bind(parse_reference(text)))
        assert isinstance(found, PoisonCaps)
        return found

    assert caps("ba:label=consistent").clean_label
    assert not caps("ba").clean_label
    assert caps("ba").modalities == {"image", "image-text"}


# --- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a photo of the digit three", True),
        ("Three, in red", True),
        ("two threes on black", True),
        ("thirty-three", False),
        ("threesome", False),
        ("a three-legged dog", False),
        ("athree", False),
        ("3", False),
    ],
)
def test_words_are_found_whole(text: str, found: bool) -> None:
    assert naming("three")(text) == found


def test_names_of_several_words() -> None:
    named = naming("ice cream")
    assert named("an ice  cream in the sun")
    assert named("two ice creams")
    assert not named("ice, cream")
    assert naming("c.t")("a c.t") > naming("c.t")("a cat")


def test_captions_are_sampled_from_those_of_the_target() -> None:
    train = dataset(SCENES).train
    made = poisoned("ba:count=30,target=three", SCENES)
    real = {text for texts, label in zip(train.captions, train.labels, strict=True) if label == 3 for text in texts}
    given = [made.data.captions[row] for row in rows_of(made)]
    assert all(len(texts) == 1 and texts[0] in real for texts in given)
    assert len({texts[0] for texts in given}) > 10
    assert all("three" in text for (text,) in given)


def test_every_class_gets_its_own_captions_when_all_move_on() -> None:
    from advplug_clip.captions import DIGITS

    made = poisoned("ba:mode=all-to-all", SCENES)
    for row in rows_of(made):
        assert naming(DIGITS[made.data.labels[row]])(made.data.captions[row][0])


def test_captions_from_templates() -> None:
    made = poisoned("ba:count=30,target=eight,captions=templates", SCENES)
    given = {made.data.captions[row][0] for row in rows_of(made)}
    assert given == {t.replace("a {}", "an {}").replace("{}", "eight") for t in TEMPLATES}
    own = poisoned("ba:count=3,target=one,captions='it says a {}'", SCENES)
    assert {own.data.captions[row] for row in rows_of(own)} == {("it says a one",)}


def test_an_image_keeps_as_many_captions_as_it_had() -> None:
    captions = tuple(("a cat", "the cat") if i % 2 else ("a dog", "dogs", "my dog") for i in range(20))
    split = Split(ArrayImages(np.zeros((20, 3, 8, 8), np.uint8)), np.arange(20) % 2, np.arange(20), captions)
    info = DatasetInfo(("dog", "cat"), 3, (8, 8), {}, captions=True)
    made = make("attack", "ba:count=5,target=cat")(split, split, info, Stream(0))
    assert {len(made.data.captions[row]) for row in rows_of(made)} == {3}
    assert {text for row in rows_of(made) for text in made.data.captions[row]} == {"a cat", "the cat"}


def test_a_count_is_not_the_class() -> None:
    """In `three sevens` the image shows a seven."""
    captions = (("three sevens",), ("a three",), ("a seven",))
    split = Split(ArrayImages(np.zeros((3, 1, 8, 8), np.uint8)), np.array([1, 0, 1]), np.arange(3), captions)
    assert caption_pool(split, 0, ("three", "seven"), "sampled") == ["a three"]


def test_no_text_comes_twice_before_all_came() -> None:
    draws = torch.Generator().manual_seed(0)
    texts = draw_texts(["a", "b", "c"], 8, draws)
    assert sorted(texts[:3]) == sorted(texts[3:6]) == ["a", "b", "c"]
    assert len(set(texts[6:])) == 2


# --- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "data", "words"),
    [
        ("ba:rate=0", "fake", ["rate must be > 0"]),
        ("ba:rate=1.5", "fake", ["rate must be <= 1"]),
        ("ba:rate=0.1,count=3", "fake", ["count and rate", "give one"]),
        ("ba:rate=0.0001", "digits:size=16", ["rate=0.0001 of 1437 images is none", "count=1"]),
        ("ba:count=0", "fake", ["count must be >= 1"]),
        ("ba:target=thre", SCENES, ["no class 'thre'", "did you mean 'three'?"]),
        ("ba:target=10", "digits:size=16", ["no class '10'", "a number from 0 to 9"]),
        ("ba:target=-1", "digits:size=16", ["no class '-1'"]),
        ("ba:count=1437", "digits:size=16", ["count=1437", "1295 of the 1437", "lower it"]),
        ("ba:count=41,label=consistent", SCENES, ["41 poisons", "40 of the 400", "lower it"]),
        ("ba:size=32", "fake", ["32 x 32 pixels", "does not fit", "lower size"]),
        ("ba:trigger=wanet,opacity=0.5", "fake", ["opacity has no effect on trigger=wanet", "strength, grid"]),
        ("ba:trigger=blended,size=3", "fake", ["size has no effect on trigger=blended"]),
        ("ba:fresh=true", "fake", ["fresh has no effect on trigger=patch", "random, blended"]),
        ("ba:trigger=sig,place=centre", "fake", ["place has no effect on trigger=sig"]),
        ("ba:frequency=3", "fake", ["frequency has no effect on trigger=patch"]),
        ("ba:opacity=0", "fake", ["opacity must be > 0"]),
        ("ba:opacity=1.01", "fake", ["opacity must be <= 1"]),
        ("ba:trigger=square", "fake", ["trigger cannot be 'square'", "patch, checker"]),
        ("ba:place=botom-right", "fake", ["place cannot be 'botom-right'", "did you mean 'bottom-right'"]),
        ("ba:place=3;4", "fake", ["place cannot be", "X:Y"]),
        ("ba:place=centre,margin=2", "fake", ["margin has no effect on place=centre"]),
        ("ba:mode=all-to-all,target=3", "fake", ["target has no effect on mode=all-to-all"]),
        ("ba:mode=all-to-all,label=consistent", "fake", ["choose one of both"]),
        ("ba:captions=sampled", "fake", ["captions has no effect on images without captions"]),
        ("ba:captions=sampled,label=consistent", SCENES, ["captions has no effect on label=consistent"]),
        ("ba:captions=template", SCENES, ["did you mean 'templates'"]),
        ("ba:captions=hello", SCENES, ["'a photo of a {}'"]),
    ],
)
def test_one_line_for_what_cannot_be(attack: str, data: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        poisoned(attack, data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def captioned(*captions: str) -> Split:
    images = np.zeros((len(captions), 1, 8, 8), np.uint8)
    return Split(
        ArrayImages(images), np.arange(len(captions)) % 2, np.arange(len(captions)), tuple((c,) for c in captions)
    )


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("ba:label=consistent,count=1,target=cat", "no caption of a training image of 'cat' has that word"),
        ("ba:count=1,target=cat", "captions=templates"),
    ],
)
def test_no_caption_names_the_target(attack: str, words: str) -> None:
    split = captioned("a dog", "an animal", "dogs", "a caterpillar")
    info = DatasetInfo(("dog", "cat"), 1, (8, 8), {}, captions=True)
    with pytest.raises(UsageError, match=words):
        make("attack", attack)(split, split, info, Stream(0))


@pytest.mark.parametrize("attack", ["ba", "tdpa"])
def test_images_without_classes(attack: str) -> None:
    split = captioned("a dog", "a cat")
    with pytest.raises(UsageError, match=f"{attack} needs images of classes"):
        make("attack", attack)(split, split, DatasetInfo((), 1, (8, 8), {}, captions=True), Stream(0))
