"""Views of images and captions: what is drawn, what stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from advplug.errors import UsageError
from advplug_clip.tokens import Tokens, bundled
from advplug_safeclip.looks import view
from advplug_safeclip.settings import GENTLE, PUBLISHED, Views
from advplug_safeclip.words import NONE, Words, read_words, synonym_groups

NOTHING = Views(crop=1.0, flip=False, jitter=0.0, colour=0.5, hue=0.1, grey=0.0, blur=0.0, words=0.0)
GROUPS = [("small", "little", "tiny"), ("photo", "picture")]
CAPTIONS = [
    "a photo of the digit seven",
    "a small red three on black",
    "the tiny blue digit nine, in the little corner!",
    "one",
    "a picture of a dog's favourite toy that is longer than what the tower reads in one go, as it happens",
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(amount: int = 6, side: int = 16) -> Tensor:
    return torch.rand(amount, 3, side, side, generator=seeded(9))


# --- images ----------------------------------------------------------------------------------------


def test_a_view_without_change_is_the_image() -> None:
    assert torch.equal(view(pixels(), NOTHING, seeded()), pixels())


@pytest.mark.parametrize("how", [GENTLE, PUBLISHED])
def test_views_differ_stay_pixels_and_follow_the_generator_alone(how: Views) -> None:
    x, state = pixels(), torch.get_rng_state()
    one, again, other = (view(x, how, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0 <= one.min() <= one.max() <= 1
    assert one.shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_show_at_least_their_share_at_its_place() -> None:
    at = torch.linspace(0, 1, 64)
    x = torch.stack([at.expand(64, 64), at[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(200, 3, 64, 64)
    made = view(x, replace(NOTHING, crop=0.5), seeded())
    width, height = (made[:, 0, 0, -1] - made[:, 0, 0, 0]), (made[:, 1, -1, 0] - made[:, 1, 0, 0])
    area = width * height
    assert 0.45 < area.min() < 0.55
    assert 0.95 < area.max() < 1.001
    assert (width / height).min() < 0.85
    assert (width / height).max() > 1.15
    assert (width > 0).all()
    assert made[:, 0].min() < 0.02
    assert made[:, 0].max() > 0.98


def test_half_of_the_views_are_mirrored() -> None:
    x = torch.linspace(0, 1, 8).expand(400, 3, 8, 8)
    made = view(x, replace(NOTHING, flip=True), seeded())
    turned = made[:, 0, 0, 0] > made[:, 0, 0, -1]
    assert 150 < int(turned.sum()) < 250
    torch.testing.assert_close(made[turned], x[turned].flip(3))
    torch.testing.assert_close(made[~turned], x[~turned])


def test_changes_of_colour_leave_greys_grey_and_act_as_named() -> None:
    x = 0.3 + 0.2 * pixels(300)
    bright = view(x.mean((1, 2, 3), keepdim=True).expand_as(x), replace(NOTHING, jitter=1.0, hue=0.0), seeded())
    factor = bright.mean((1, 2, 3)) / x.mean((1, 2, 3))
    assert bright.flatten(2).std(2).max() < 1e-5, "contrast and saturation do not change a grey area"
    assert 0.5 <= factor.min() < 0.6
    assert 1.4 < factor.max() <= 1.5
    turned = view(x, replace(NOTHING, jitter=1.0, colour=0.0), seeded())
    torch.testing.assert_close(turned.mean(1), x.mean(1), msg="hues turn about the axis of greys")
    assert (turned - x).abs().max() > 0.02
    none = view(x, replace(NOTHING, grey=1.0), seeded())
    torch.testing.assert_close(none[:, 0], none[:, 2])
    torch.testing.assert_close(none[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    some = view(x, replace(NOTHING, jitter=0.3), seeded())
    assert 0.6 < ((some - x).abs().flatten(1).amax(1) < 1e-6).float().mean() < 0.8


# --- captions --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Words:
    return read_words(CAPTIONS, bundled(20), GROUPS)


def text(words: Words, rows: Tensor) -> list[list[str]]:
    vocabulary = list(dict.fromkeys(word for caption in CAPTIONS for word in caption.split()))
    return [[vocabulary[i] for i in row if i != NONE] for row in rows.tolist()]


def test_words_make_the_tokens_of_the_text(words: Words) -> None:
    assert torch.equal(words.tokens(words.rows), bundled(20)(CAPTIONS))
    short = read_words(CAPTIONS, bundled(5), GROUPS)
    assert torch.equal(short.tokens(short.rows), bundled(5)(CAPTIONS))


def test_synonyms_are_those_that_captions_use() -> None:
    found = read_words(["a small photo", "a tiny photo"], bundled(20), GROUPS).synonyms
    assert found.tolist() == [[NONE], [3], [NONE], [1]]
    groups = synonym_groups()
    assert len(groups) > 50
    assert all(len(group) > 1 for group in groups)


def operations(words: Words, monkeypatch: pytest.MonkeyPatch, which: int, share: float) -> list[list[list[str]]]:
    """The words of many changed captions, all by one operation."""
    made: list[list[list[str]]] = []
    monkeypatch.setattr(Words, "tokens", lambda self, rows: made.append(text(self, rows)))
    kept = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.full_like(kept(*a, **k), which))
    for seed in range(30):
        words.changed(torch.arange(len(CAPTIONS)), share, seeded(seed))
    return made


def test_replaced_words_are_synonyms_in_their_places(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [set(group) for group in GROUPS]
    changes = 0
    for rows in operations(words, monkeypatch, 0, 0.1):
        for row, caption in zip(rows, CAPTIONS, strict=True):
            pairs = list(zip(row, caption.split(), strict=True))
            different = [pair for pair in pairs if pair[0] != pair[1]]
            assert all(any(set(pair) <= group for group in groups) for pair in different)
            assert len(different) == (0 if caption == "one" else max(1, min(len(pairs) // 10, 1)))
            changes += len(different)
    assert changes == 30 * 4


def test_inserted_words_leave_all_others_in_order(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {word for group in GROUPS for word in group}
    places = set()
    for rows in operations(words, monkeypatch, 1, 0.1):
        for row, caption in zip(rows, CAPTIONS, strict=True):
            own = caption.split()
            added = [i for i in range(len(row)) if row[:i] + row[i + 1 :] == own]
            if caption == "one":
                assert row == own
            elif len(own) < 20:
                assert added
                assert row[added[0]] in known
                places.add(added[0] / len(own))
    assert min(places) == 0
    assert max(places) == 1


def test_swapped_words_are_the_same_words(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = 0
    for rows in operations(words, monkeypatch, 2, 0.1):
        for row, caption in zip(rows, CAPTIONS, strict=True):
            assert Counter(row) == Counter(caption.split())
            moved += row != caption.split()
    assert moved > 60


def test_deleted_words_leave_one_at_least_and_the_order(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for rows in operations(words, monkeypatch, 3, 0.9):
        for row, caption in zip(rows, CAPTIONS, strict=True):
            rest = iter(caption.split())
            assert row
            assert all(word in rest for word in row), "a subsequence"
            left.append(len(row) / len(caption.split()))
    assert sum(left) / len(left) < 0.5


def test_each_caption_gets_one_operation_and_the_generator_decides(words: Words) -> None:
    captions = torch.arange(4).repeat(50)
    state = torch.get_rng_state()
    one, again, other = (words.changed(captions, 0.1, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (200, 20)
    assert (one[:, 0] == words.first).all()
    assert ((one == words.last).sum(1) == 1).all()


def test_a_tokenizer_that_reads_otherwise_is_refused() -> None:
    letters = Tokens(
        lambda texts, n: torch.tensor([[1, 2, *map(ord, t)][:n] + [0] * (n - 2 - len(t)) for t in texts]), 20
    )
    with pytest.raises(UsageError, match="does not read word by word, so no words can be changed; write words=0"):
        read_words(["a photo of a cat"], letters)
