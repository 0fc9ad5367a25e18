"""SafeCLIP, RoCLIP and CleanCLIP on a small poisoned set: what they choose, change, count and refuse."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from advplug.build import TUNING
from advplug.contracts import DatasetInfo, Tuned
from advplug.data import ArrayImages, Dataset, Split
from advplug.errors import CellFailure, UsageError
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_defense
from advplug.train import Training
from advplug_clip.captions import COLOURS
from advplug_clip.models import clip_tiny
from advplug_clip.scorer import ClipScorer
from advplug_safeclip.pairs import read
from advplug_safeclip.settings import GENTLE

PAIRS, POISONS = 320, 32
QUICK = "safeclip:unimodal=1,multimodal=2,epochs=2,batch_size=32,floor=0.3"
SOURCE = clip_tiny(epochs=4, words=64)


def coloured(amount: int, start: int = 0) -> Split:
    """Images of one colour under noise, and captions that name it."""
    names = list(COLOURS)
    labels = np.arange(start, start + amount) % len(names)
    draws = np.random.RandomState(start)
    plain = np.array([COLOURS[name] for name in names])[labels][:, :, None, None]
    images = plain * draws.uniform(0.4, 1, (amount, 1, 1, 1)) + draws.normal(0, 0.1, (amount, 3, 32, 32))
    sentences = ("a photo of a {} wall", "the {} wall", "a wall in {}", "a picture of a {} wall")
    captions = tuple((sentences[draws.randint(4)].format(names[label]),) for label in labels)
    return Split(ArrayImages((255 * images.clip(0, 1)).round().astype(np.uint8)), labels, np.arange(amount), captions)


@pytest.fixture(scope="module")
def clean() -> Dataset:
    info = DatasetInfo(tuple(COLOURS), 3, (32, 32), {}, captions=True)
    return Dataset(info, coloured(PAIRS), coloured(64, start=7))


@pytest.fixture(scope="module")
def poisons() -> np.ndarray:
    rows = np.zeros(PAIRS, dtype=bool)
    rows[np.random.RandomState(0).choice(np.flatnonzero(np.arange(PAIRS) % 8 != 3), POISONS, replace=False)] = True
    return rows


@pytest.fixture(scope="module")
def poisoned(clean: Dataset, poisons: np.ndarray) -> Dataset:
    """A tenth of the images have a patch and a caption of the fourth colour."""
    rows = np.flatnonzero(poisons)
    images = (255 * clean.train.batch(rows).x.numpy()).round().astype(np.uint8)
    images[:, :, 26:31, 26:31] = 255
    assert clean.train.captions is not None
    target = [own for own in clean.train.captions if list(COLOURS)[3] in own[0]]
    captions = [target[i % len(target)] for i in range(len(rows))]
    return replace(clean, train=clean.train.changed(rows, images, np.full(len(rows), 3), captions))


def fresh(data: Dataset) -> ClipScorer:
    with Stream(0, "init").as_global():
        model = SOURCE.build(data.info)
    assert isinstance(model, ClipScorer)
    return model


def training(data: Dataset, **other: Any) -> Training:
    made = Training(data.train, data.info, SOURCE.schedule(data.info), torch.device("cpu"), Stream(0, "test"))
    return replace(made, test=data.test, **other)


def fitted(text: str, data: Dataset, model: ClipScorer | None = None, **other: Any) -> Tuned:
    """What the defense `text` makes of a copy of the model, or of a fresh one."""
    reference = parse_reference(text)
    entry = registry().get("defense", reference.name)
    (stage,) = entry.make(entry.bind(reference))
    made: Tuned = stage.apply(fresh(data) if model is None else copy.deepcopy(model), training(data, **other))
    return made


@pytest.fixture(scope="module")
def safe(poisoned: Dataset) -> Tuned:
    return fitted(QUICK, poisoned)


# --- SafeCLIP --------------------------------------------------------------------------------------


def test_fewer_poisons_than_by_chance_are_taken_for_safe(safe: Tuned, poisons: np.ndarray) -> None:
    assert safe.trusted is not None
    trusted = safe.trusted.numpy()
    assert trusted.dtype == bool
    assert trusted.shape == (2, PAIRS)
    for chosen in trusted:
        assert chosen.mean() >= 0.3
        assert (chosen & poisons).sum() < 0.5 * chosen.mean() * POISONS


def whole(rows: int) -> int:
    """How many of these rows are in batches of 32; fewer are a batch of their own."""
    return rows // 32 * 32 if rows >= 32 else rows


def test_all_pairs_can_be_safe(poisoned: Dataset) -> None:
    """No filter at all: nothing is left for the epochs of each modality by itself."""
    few = replace(poisoned, train=poisoned.train.subset(np.arange(64)))
    made = fitted("safeclip:unimodal=1,multimodal=1,epochs=1,batch_size=32,floor=1,cap=1", few)
    assert made.trusted is not None
    assert bool(made.trusted.all())


def test_facts_say_who_chose_and_what_it_took(safe: Tuned) -> None:
    facts = json.loads(json.dumps(safe.facts))
    assert facts["why"] == "preset=small, since there are 320 pairs and large data have 100,000"
    assert facts["settings"]["epochs"] == 2
    assert facts["settings"]["words"] == GENTLE.words
    assert {r["decided"] for r in facts["rounds"]} <= {"mixture", "floor", "cap"}
    assert safe.trusted is not None
    assert [r["chosen"] for r in facts["rounds"]] == safe.trusted.sum(1).tolist()
    assert facts["rounds"][0]["means"][0] == 0
    floors = sum(r["decided"] == "floor" for r in facts["rounds"])
    assert len(facts["warnings"]) == floors
    cost = facts["cost"]
    assert set(cost["seconds"]) == {"unimodal", "slow", "scoring", "filtered"}
    assert 0 < cost["data_share"] < 0.5
    # Two views of each pair, then one of each, twice; each pair is scored twice, by two views.
    steady = 2 * PAIRS + 2 * PAIRS + 4 * PAIRS
    last = [whole(r["chosen"]) + 2 * whole(PAIRS - r["chosen"]) for r in facts["rounds"]]
    assert cost["image_encodings"] == cost["text_encodings"] == steady + sum(last)
    assert cost["passes"] == 2 * cost["image_encodings"]
    assert cost["with_gradient"] == cost["passes"] - 8 * PAIRS
    assert cost["plain_passes"] == 2 * 5 * PAIRS


def test_the_model_is_left_as_training_leaves_it(safe: Tuned, poisoned: Dataset) -> None:
    model = safe.model
    assert isinstance(model, ClipScorer)
    assert not any(m.training for m in model.modules())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("clip.visual.")
    }
    assert all(p.is_contiguous() for p in model.parameters())
    batch = poisoned.test.batch(np.arange(64))
    with torch.no_grad():
        right = (model(batch.x).argmax(1) == batch.y).float().mean()
    assert right > 0.5, "one colour of eight is a guess"


def test_the_same_seed_gives_the_same_weights(poisoned: Dataset) -> None:
    short = QUICK.replace(
        "multimodal=2,epochs=2", "multimodal=1,epochs=1,bank=64,views=2,looks=1,mixture=free,blur=0.5"
    )
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    one, again = fitted(short, poisoned), fitted(short, poisoned)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # type: ignore[index]
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    other = fitted(short, poisoned, stream=Stream(1, "test"))
    assert not torch.equal(other.model.clip.text_projection, one.model.clip.text_projection)  # type: ignore[union-attr,arg-type]


def test_progress_counts_updates(poisoned: Dataset) -> None:
    seen: list[tuple[int, int, int, int]] = []
    few = replace(poisoned, train=poisoned.train.subset(np.arange(64)))
    fitted(QUICK, few, progress=lambda *step: seen.append(step[:4]))
    assert seen[0] == (1, 1, 1, 10)
    assert [step[2] for step in seen] == sorted(step[2] for step in seen)
    assert len(seen) <= 10


# --- RoCLIP and CleanCLIP --------------------------------------------------------------------------


def test_roclip_matches_every_third_epoch(poisoned: Dataset) -> None:
    made = fitted("roclip:epochs=3,batch_size=32,pool=0.2", poisoned)
    facts = json.loads(json.dumps(made.facts))
    assert facts["settings"]["pool"] == 64
    assert facts["matched_epochs"] == 1, "the last of three: captions have to be learned first"
    assert set(facts["cost"]["seconds"]) == {"matched", "contrastive"}
    assert facts["cost"]["passes"] == facts["cost"]["plain_passes"] == 2 * 3 * PAIRS
    assert facts["cost"]["with_gradient"] == 5 * PAIRS, "captions have no gradient where images are matched"
    assert made.trusted is None


def test_cleanclip_learns_from_a_share_of_the_clean_pairs_and_keeps_the_words(
    safe: Tuned, poisoned: Dataset, clean: Dataset
) -> None:
    assert isinstance(safe.model, ClipScorer)
    known = safe.model.clip.token_embedding.known.clone()
    made = fitted("cleanclip:share=0.2,epochs=2,batch_size=16", poisoned, safe.model, clean=clean.train)
    assert made.facts["clean_pairs"] == 64
    assert made.facts["updates"] == 8
    assert made.facts["lr"] == SOURCE.lr
    assert made.facts["cost"]["passes"] == 2 * 2 * 2 * 64
    assert isinstance(made.model, ClipScorer)
    assert torch.equal(made.model.clip.token_embedding.known, known)
    changed = {n for n, v in made.model.state_dict().items() if not torch.equal(v, safe.model.state_dict()[n])}
    assert {"clip.text_projection", "clip.visual.projection.weight", "clip.logit_scale"} <= changed
    loaded = fitted("cleanclip:share=0.1,epochs=1", poisoned, safe.model, clean=clean.train, schedule=TUNING)
    assert loaded.facts["lr"] == 1e-5


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["safeclip", "roclip", "cleanclip"])
def test_bad_data_is_named(text: str, clean: Dataset) -> None:
    bare = replace(clean, train=replace(clean.train, captions=None))
    with pytest.raises(UsageError, match=f"{text} learns from captions and the dataset has none"):
        fitted(text, bare, clean=bare.train)
    gap = replace(clean, train=clean.train.changed(np.array([5]), captions=[()]))
    with pytest.raises(UsageError, match=f"{text} learns from captions and training image 5 has none"):
        fitted(text + ":share=1" * (text == "cleanclip"), gap, clean=gap.train)
    few = replace(clean, train=clean.train.subset(np.arange(3)))
    with pytest.raises(CellFailure, match=f"{text} needs at least 4 pairs to learn from, got 3; use more images"):
        fitted(text + ":share=1" * (text == "cleanclip"), few, clean=few.train)
    with pytest.raises(UsageError, match=f"{text} trains models of images and texts; use a CLIP model"):
        fitted(text, clean, torch.nn.Linear(2, 2), clean=clean.train)  # type: ignore[arg-type]


def test_cleanclip_needs_clean_pairs_that_are_no_test_images(clean: Dataset) -> None:
    with pytest.raises(UsageError, match="cleanclip needs clean pairs, and this training holds none"):
        fitted("cleanclip", clean)
    with pytest.raises(UsageError, match="evaluation images are in the training data"):
        fitted("cleanclip:share=1", clean, clean=clean.test)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safeclip:floor=0.9,cap=0.5", r"floor=0.9 is above cap=0.5; lower the floor, or raise the cap"),
        ("safeclip:preset=published,floor=0.9", r"floor=0.9 is above cap=0.85"),
        ("safeclip:threshold=1", r"threshold must be < 1, got 1"),
        ("safeclip:threshold=0", r"threshold must be > 0, got 0"),
        ("safeclip:preset=tiny", r"preset cannot be 'tiny'; choose from published, small"),
        ("roclip:pool=0", r"pool must be > 0, got 0"),
        ("cleanclip:share=1.5", r"share must be <= 1, got 1.5"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_trained(text: str, message: str) -> None:
    reference = parse_reference(text)
    entry = registry().get("defense", reference.name)
    with pytest.raises(UsageError, match=message):
        entry.spec.caps_of(entry.bind(reference))


def test_a_loss_that_is_no_number_fails_the_cell(poisoned: Dataset) -> None:
    with pytest.raises(CellFailure, match=r"the loss became nan in epoch 1 of 1, step .*; use a smaller lr than 1e"):
        fitted(QUICK + ",lr=1e30", poisoned)


def test_images_that_are_no_bytes_are_read_each_time(clean: Dataset) -> None:
    model = fresh(clean)
    held = read("safeclip", clean.train, model, GENTLE, torch.device("cpu"))
    assert held.held is not None
    floats = replace(clean.train, images=ArrayImages(clean.train.batch(np.arange(PAIRS)).x.numpy() * 0.999))
    other = read("safeclip", floats, model, GENTLE, torch.device("cpu"))
    assert other.held is None
    rows, draws = np.array([3, 1]), torch.Generator()
    torch.testing.assert_close(held.images(rows, draws, plain=True), clean.train.batch(rows).x)
    torch.testing.assert_close(other.images(rows, draws, plain=True), clean.train.batch(rows).x * 0.999)


@pytest.mark.parametrize("name", ["safeclip", "roclip", "cleanclip"])
def test_conformance(name: str) -> None:
    results = check_defense(name, on="clip-tiny")
    assert all(r.ok is not False for r in results)
