"""The tiny models: their parts, how they are trained, and what they know afterwards."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advplug import evaluate
from advplug.artifacts import Artifacts
from advplug.contracts import DatasetInfo
from advplug.data import Dataset, Split
from advplug.errors import CellFailure, UsageError
from advplug.rng import Stream
from advplug.testing import check_model
from advplug.train import Training
from advplug.vision import import_torchvision
from advplug_clip import contrastive, tiny
from advplug_clip.models import Tiny, clip_tiny, clip_tiny_vit
from advplug_clip.scenes import DigitScenes
from advplug_clip.scorer import ClipScorer
from advplug_clip.tokens import pieces


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return DigitScenes(train=256, n=100, size=32, count=1, captions=2, seed=0).load()


def trained(source: Tiny, data: Dataset, seed: int = 0, **facts: Any) -> tuple[ClipScorer, dict[str, Any]]:
    with Stream(seed, "init").as_global():
        model = source.build(data.info)
    training = Training(
        data.train, data.info, source.schedule(data.info), torch.device("cpu"), Stream(seed, "test"), **facts
    )
    tuned = source.fit(model, training)
    assert isinstance(tuned.model, ClipScorer)
    return tuned.model, dict(tuned.facts)


def one_caption(split: Split) -> list[str]:
    assert split.captions is not None
    return [own[0] for own in split.captions]


# --- parts -----------------------------------------------------------------------------------------


def test_word_table_tells_known_pieces_apart_and_maps_all_others_to_one_row() -> None:
    torch.manual_seed(0)
    table = tiny.WordTable(6, 4)
    assert table.learn(torch.tensor([900, 3, 40000, 7])) == 0
    rows = table(torch.tensor([[3, 7, 900, 40000, 8, 49407]]))[0]
    torch.testing.assert_close(rows[:4], table.embedding.weight[:4])
    assert not rows[4:].any()


def test_word_table_keeps_the_most_frequent_pieces() -> None:
    table = tiny.WordTable(4, 4)
    numbers = pieces(torch.tensor([[5, 5, 5, 9], [9, 9, 2, 1], [2, 1, 7, 5]]))
    assert numbers[:2].tolist() == [5, 9]
    assert table.learn(numbers) == 2
    assert table.known.tolist() == [1, 5, 9]
    assert table.learn(torch.tensor([8])) == 0
    assert not table(torch.tensor([5])).any(), "what an earlier text taught is forgotten"


def test_pair_loss_is_that_of_open_clip() -> None:
    import_torchvision()
    from open_clip import ClipLoss

    torch.manual_seed(0)
    images, texts, scale = torch.randn(7, 5), torch.randn(7, 5), torch.tensor(1.3)
    unit = torch.nn.functional.normalize
    expected = ClipLoss()(unit(images, dim=-1), unit(texts, dim=-1), scale.exp())
    torch.testing.assert_close(contrastive.pair_loss(images, texts, scale), expected)


def test_pair_loss_of_perfect_and_of_equal_pairs() -> None:
    same = torch.ones(4, 3)
    assert float(contrastive.pair_loss(same, same, torch.tensor(0.0))) == pytest.approx(np.log(4))
    assert float(contrastive.pair_loss(torch.eye(4), torch.eye(4), torch.tensor(4.6))) < 1e-6


def test_pair_loss_of_classes_shares_what_is_right_among_their_texts() -> None:
    """Yang et al. 2022, arXiv 2204.03610, equations 2 and 3, term by term."""
    torch.manual_seed(0)
    images, texts, scale = torch.randn(5, 3), torch.randn(5, 3), torch.tensor(0.7)
    labels = torch.tensor([0, 1, 0, 2, 0])
    same = labels[:, None] == labels
    unit = torch.nn.functional.normalize
    logits = scale.exp() * unit(images, dim=-1) @ unit(texts, dim=-1).T

    def one_way(table: Tensor) -> Tensor:
        told = [-table[i].log_softmax(0)[same[i]].mean() for i in range(5)]
        return torch.stack(told).mean()

    expected = (one_way(logits) + one_way(logits.T)) / 2
    torch.testing.assert_close(contrastive.pair_loss(images, texts, scale, same), expected)
    own = torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(
        contrastive.pair_loss(images, texts, scale, own), contrastive.pair_loss(images, texts, scale)
    )


def test_images_of_a_class_share_its_captions() -> None:
    labels = np.array([1, 0, 1])
    captions = contrastive.Captions(torch.arange(5)[:, None], np.array([0, 2, 5]), labels)
    drawn = torch.stack([captions.draw(np.array([2, 1]), g) for g in map(seeded, range(60))])[..., 0]
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[2, 3, 4], [0, 1]]
    same = captions.same(np.array([0, 1, 2]))
    assert same is not None
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert replace(captions, labels=None).same(labels) is None


def test_each_image_is_mirrored_or_not() -> None:
    x = torch.arange(400 * 3.0).view(400, 1, 1, 3)
    made = contrastive._mirrored(x, seeded(0))
    turned = (made == x.flip(3)).flatten(1).all(1)
    assert torch.equal(made[~turned], x[~turned])
    assert 150 < int(turned.sum()) < 250


def test_only_data_without_captions_may_be_mirrored() -> None:
    photos = DatasetInfo(("cat", "dog"), 3, (32, 32), {}, flip=True)
    assert clip_tiny().schedule(photos).flip
    assert not clip_tiny().schedule(replace(photos, captions=True)).flip
    assert not clip_tiny().schedule(replace(photos, flip=False)).flip


def test_each_image_draws_among_its_own_captions() -> None:
    captions = contrastive.Captions(torch.arange(6)[:, None], np.array([0, 1, 4, 6]))
    drawn = torch.stack([captions.draw(np.array([2, 0, 1]), g) for g in map(seeded, range(60))])[..., 0]
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[4, 5], [0], [1, 2, 3]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augmentation_moves_a_batch_as_one() -> None:
    x = torch.arange(2 * 6 * 6.0).view(2, 1, 6, 6)
    seen = {tuple((contrastive._moved(x, 1, seeded(s))[:, 0, 2, 2] - x[:, 0, 2, 2]).tolist()) for s in range(80)}
    assert seen == {(6.0 * down + right,) * 2 for down in (-1, 0, 1) for right in (-1, 0, 1)}
    assert contrastive._moved(x, 0, seeded(0)) is x


# --- training --------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_is_the_same_each_time(scenes: Dataset) -> None:
    losses: list[float] = []
    source = clip_tiny_vit(epochs=3, words=64)
    model, facts = trained(source, scenes, progress=lambda *step: losses.append(step[-1]))
    assert len(losses) == 3 * 4
    assert facts["training_loss"] == pytest.approx(np.mean(losses[-4:]))
    assert facts["training_loss"] < losses[0] - 0.2
    assert facts["warnings"] == []
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    again, _ = trained(source, scenes)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other, _ = trained(replace(source, seed=1), scenes)
    assert not torch.equal(other.clip.text_projection, model.clip.text_projection)


def test_after_training_only_the_image_tower_has_gradients_and_columns_are_new(scenes: Dataset) -> None:
    source = clip_tiny(epochs=1, words=64)
    with Stream(0, "init").as_global():
        model = source.build(scenes.info)
    assert isinstance(model, ClipScorer)
    before = model.columns.clone()
    training = Training(scenes.train, scenes.info, source.schedule(scenes.info), torch.device("cpu"), Stream(0, "test"))
    contrastive.fit(model, training)
    assert not model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("clip.visual.")
    }
    assert not torch.allclose(model.columns, before)


def test_tasks_and_templates_share_weights() -> None:
    one, other = clip_tiny(), clip_tiny(task="retrieval", templates="a {}")
    assert one.weights_recipe() == other.weights_recipe()
    assert one.identity() == other.identity()
    assert one.weights_recipe() != clip_tiny(epochs=3).weights_recipe()


def test_cut_captions_and_rare_words_are_told(scenes: Dataset) -> None:
    _, facts = trained(clip_tiny_vit(epochs=1, context=6, words=16), scenes)
    cut, rare = facts["warnings"]
    assert "of 256 texts are longer than the 6 tokens that the model reads and were cut" in cut
    assert rare.endswith("rare word pieces of the training captions are not told apart; raise words=")


def test_images_without_captions_cannot_be_learned_from(scenes: Dataset) -> None:
    bare = replace(scenes, train=replace(scenes.train, captions=None))
    with pytest.raises(UsageError, match="needs a caption for every image"):
        trained(clip_tiny(), bare)
    with pytest.raises(CellFailure, match="at least 2 images, got 1"):
        trained(clip_tiny(), replace(scenes, train=scenes.train.subset(np.array([3]))))


def test_classes_without_captions_are_learned_by_their_names() -> None:
    """Handwritten digits as a dataset for classifiers: far above the tenth that guessing gives after two epochs."""
    result = evaluate("clip-tiny:epochs=2,lr=1e-3", "fgsm", dataset="digits:train=600", n=60, audit="none")
    (cell,) = result.cells
    assert cell.status == "ok", cell.reason
    clean = cell.metrics["clean_accuracy"]
    assert clean is not None
    assert clean.value > 0.5


def test_a_loss_that_is_no_number_fails_the_cell(scenes: Dataset) -> None:
    with pytest.raises(CellFailure, match=r"the loss became nan in epoch \d+ of 9, step \d of 4; use a smaller lr"):
        trained(clip_tiny_vit(epochs=9, lr=1e30, words=64), scenes)


@pytest.mark.parametrize("name", ["clip-tiny", "clip-tiny-vit"])
def test_conformance(name: str) -> None:
    results = check_model(name, on="digit-scenes")
    assert all(r.ok for r in results)
    assert len(results) == 10


def test_both_tasks_use_the_same_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    for task in ("zero-shot", "retrieval"):
        result = evaluate(
            f"clip-tiny-vit:epochs=1,task={task}", "fgsm", dataset="digit-scenes:train=128,n=16", audit="none"
        )
        assert [cell.status for cell in result.cells] == ["ok"]
    assert len(Artifacts().ls()) == 1


# --- the bars --------------------------------------------------------------------------------------


def recall(model: ClipScorer, x: Tensor, captions: list[str]) -> tuple[float, float]:
    """R@1 from image to text and from text to image, one caption an image."""
    logits = model.with_gallery(captions)(x)
    own = torch.arange(len(x))
    return float((logits.argmax(1) == own).float().mean()), float((logits.argmax(0) == own).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clip_tiny_reaches_its_bars(seed: int) -> None:
    """R@1 of at least .80 both ways among 100 images with distinct captions, mean of five pools; zero-shot .94."""
    data = DigitScenes(train=4000, n=1000, size=32, count=1, captions=2, seed=0).load()
    clock, cpu = time.perf_counter(), time.process_time()
    model, _ = trained(clip_tiny(), data, seed)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    x, captions = data.test.batch(np.arange(1000)).x, one_caption(data.test)
    with torch.no_grad():
        right = float((model(x).argmax(1).numpy() == data.test.labels).mean())
        pools = [recall(model, x[i : i + 100], captions[i : i + 100]) for i in range(0, 500, 100)]
    image, text = np.mean(pools, axis=0)
    print(f"\nseed {seed}: R@1 {image:.3f} / {text:.3f}, zero-shot {right:.3f}, {clock:.0f} s, {cpu:.0f} CPU s")
    assert min(image, text) >= 0.8
    assert right >= 0.94
