"""Fine-tuning of the image tower: its losses, its attack, what it changes and what it must not change."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug import evaluate
from advplug.artifacts import Artifacts
from advplug.contracts import Schedule, Tuned
from advplug.data import Dataset, Split
from advplug.errors import CellFailure, UsageError
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.session import Request, plan
from advplug.testing import check_defense
from advplug.train import Training
from advplug_clip import finetune, tiny
from advplug_clip import finetune_losses as losses
from advplug_clip.contrastive import pair_loss
from advplug_clip.prompts import prompts
from advplug_clip.scenes import DigitScenes
from advplug_clip.scorer import ClipScorer

ALL = ["mat", "caption-advtrain", "fare", "tecoa", "oft"]
QUICK = {"fare": "steps=2", "oft": "steps=2", "tecoa": "steps=2", "caption-advtrain": "steps=2", "mat": "blur=0.5"}
EPS = Fraction(8, 255)


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return DigitScenes(train=96, n=60, size=32, count=1, captions=2, seed=0).load()


@pytest.fixture(scope="module")
def model(scenes: Dataset) -> ClipScorer:
    """Untrained, with statistics of batch norm that are not those it starts with."""
    torch.manual_seed(0)
    made = tiny.scorer("convolutional", prompts(None, scenes.info.classes), 20, 64)
    with torch.no_grad():
        made.train()(scenes.train.batch(np.arange(64)).x)
    return made.eval()


def test_dropout_drops_from_images_and_not_from_texts_that_are_encoded_once(model: ClipScorer, scenes: Dataset) -> None:
    """Texts are encoded in the first pass: of its layers, the last linear one is the text tower's."""
    fresh = copy.deepcopy(model)
    fresh.refresh()
    entry = registry().get("defense", "dropout")
    tune, wrap = entry.make(entry.bind(parse_reference("dropout:rate=0.5")))
    made = tune.apply(fresh, training(scenes))
    x = scenes.test.batch(np.arange(4)).x
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.model(x)
        first, second = (wrap.forward(made.model, x, draws) for _ in range(2))
    assert made.facts["dropouts_a_pass"] > 0
    assert "clip.transformer" not in made.facts["dropout"]
    assert not torch.equal(first, second)
    layer = next(n for n, m in fresh.named_modules() if n.startswith("clip.transformer") and isinstance(m, nn.Linear))
    stages = entry.make(entry.bind(parse_reference(f"dropout:layers=({layer})")))
    with pytest.raises(UsageError, match="is not called by itself when the model runs"):
        stages[0].apply(copy.deepcopy(model), training(scenes))


@pytest.mark.parametrize("defense", ["adv-finetune", "grad-reg", "prune"])
def test_what_learns_from_class_labels_is_refused_for_retrieval_before_anything_is_trained(defense: str) -> None:
    ask = Request(("clip-tiny:task=retrieval",), ("caption-pgd",), (defense, "fare"), datasets=("digit-scenes",))
    refused = {s.victim.defense_label: s.refused for s in plan(ask)}
    assert str(refused[defense]).startswith(f"{defense} learns from class labels, clip-tiny:task=retrieval answers")
    assert (refused["none"], refused["fare"]) == (None, None)


def training(data: Dataset, **other: Any) -> Training:
    made = Training(data.train, data.info, Schedule(), torch.device("cpu"), Stream(0, "test"), test=data.test)
    return replace(made, **other)


def tuned(text: str, model: ClipScorer, data: Dataset, **other: Any) -> Tuned:
    """What the defense `text` makes of a copy of the model."""
    reference = parse_reference(text)
    entry = registry().get("defense", reference.name)
    (stage,) = entry.make(entry.bind(reference))
    made: Tuned = stage.apply(copy.deepcopy(model), training(data, **other))
    return made


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unit(n: int, width: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- losses ----------------------------------------------------------------------------------------


def test_contrastive_loss_of_different_texts_is_that_of_training() -> None:
    images, texts = 3 * unit(7, 5, 0), unit(7, 5, 1)
    expected = pair_loss(images, texts, torch.tensor(1.3))
    torch.testing.assert_close(losses.contrastive(images, texts, math.exp(1.3), torch.eye(7).bool()), expected)


def test_texts_that_read_the_same_are_no_wrong_answers_to_each_other() -> None:
    images, texts = unit(3, 5, 0), unit(3, 5, 1)
    twice_images, twice_texts = torch.cat([images, images[:1]]), torch.cat([texts, texts[:1]])
    same = torch.eye(4).bool()
    same[0, 3] = same[3, 0] = True
    logits = 5 * images @ texts.T
    each = [functional.cross_entropy(part, torch.arange(3), reduction="none") for part in (logits, logits.T)]
    # Images 0 and 3 are alike: neither sees the other among its wrong answers, the others see both.
    made = losses.contrastive(twice_images, twice_texts, 5.0, same)
    wide = 5 * twice_images @ twice_texts.T
    for i, j in ((0, 3), (3, 0)):
        wide[i, j] = -math.inf
    own = torch.arange(4)
    expected = (functional.cross_entropy(wide, own) + functional.cross_entropy(wide.T, own)) / 2
    torch.testing.assert_close(made, expected)
    row = functional.cross_entropy(wide[:1], own[:1])
    torch.testing.assert_close(row, each[0][0], msg="image 0 is told from texts 1 and 2 only")


def test_distance_is_a_sum_and_has_no_gradient_at_the_original() -> None:
    original = torch.randn(3, 4)
    features = original.clone().requires_grad_()
    losses.distance(features, original).sum().backward()
    assert not features.grad.any()  # type: ignore[union-attr]
    torch.testing.assert_close(losses.distance(original + 2, original), torch.full((3,), 16.0))


def test_dissimilarity_is_minus_the_mean_cosine() -> None:
    features, texts = 7 * unit(2, 6, 0), unit(6, 6, 1).view(2, 3, 6)
    cosines = (functional.normalize(features, dim=-1)[:, None] * texts).sum(2)
    torch.testing.assert_close(losses.dissimilarity(features, texts.mean(1)), -cosines.mean(1))


def test_augmentation_draws_for_each_image() -> None:
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    torch.testing.assert_close(losses.Augmentation(0, 0, 0, 0)(x, draws), x)
    bright = losses.Augmentation(0.2, 0, 0, 0)(0.5 * x, draws) / (0.5 * x)
    factors = bright.flatten(1).mean(1)
    torch.testing.assert_close(bright, factors.view(-1, 1, 1, 1).expand_as(bright))
    assert factors.unique().numel() == 5
    assert factors.min() > 0.8
    assert factors.max() < 1.2
    middle = 0.25 + 0.5 * x
    torch.testing.assert_close(losses.Augmentation(0, 0.2, 0, 0)(middle, draws).mean((1, 2, 3)), middle.mean((1, 2, 3)))
    noise = losses.Augmentation(0, 0, 0, 0.02)(torch.full((9, 3, 16, 16), 0.5), draws) - 0.5
    assert float(noise.std()) == pytest.approx(0.02, rel=0.05)
    strong = losses.Augmentation(1, 1, 2, 0.5)(x, draws)
    assert 0 <= strong.min() <= strong.max() <= 1


def test_blur_is_gaussian_with_the_spread_of_each_image() -> None:
    x = torch.zeros(2, 3, 21, 21)
    x[:, 1, 10, 10] = 1
    spread = torch.tensor([0.8, 1.5])
    made = losses.blurred(x, spread, 1.5)
    assert not made[:, [0, 2]].any()
    at = torch.arange(21) - 10
    for image, s in zip(made[:, 1], spread, strict=True):
        kernel = torch.exp(-0.5 * (at / s) ** 2) * (at.abs() <= 5)
        kernel = kernel / kernel.sum()
        torch.testing.assert_close(image, torch.outer(kernel, kernel))
    flat = torch.full((1, 1, 6, 6), 0.3)
    torch.testing.assert_close(losses.blurred(flat, torch.tensor([2.0]), 2.0), flat)
    assert losses.blurred(torch.rand(1, 1, 1, 1), torch.tensor([2.0]), 2.0).shape == (1, 1, 1, 1)


# --- the inner attack ------------------------------------------------------------------------------


def test_the_attack_starts_at_random_and_raises_the_loss_in_evaluation_mode(model: ClipScorer, scenes: Dataset) -> None:
    scorer = copy.deepcopy(model)
    finetune._mode(scorer.clip.visual)
    modes = [m.training for m in scorer.modules()]
    before, x = state(scorer), scenes.train.batch(np.arange(8)).x
    with torch.no_grad():
        clean = scorer.eval().encode_image(x)
    finetune._mode(scorer.clip.visual)
    seen: list[Tensor] = []

    def loss(features: Tensor) -> Tensor:
        each = losses.distance(features, clean)
        seen.append(each.detach())
        return each

    made = finetune.Inner(8 / 255, 4, 4 / 255)(scorer, x, loss, Stream(0, "attack"))
    assert (made - x).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= made.min() <= made.max() <= 1
    assert seen[0].min() > 0, "a start at the clean image would have no gradient"
    with torch.no_grad():
        last = losses.distance(scorer.eval().encode_image(made), clean)
    assert (last > seen[0]).all()
    finetune._mode(scorer.clip.visual)
    assert [m.training for m in scorer.modules()] == modes
    assert all(p.grad is None for p in scorer.parameters())
    for name, value in state(scorer).items():
        assert torch.equal(value, before[name]), name


def test_batch_norm_stays_in_evaluation_mode(model: ClipScorer) -> None:
    tower = copy.deepcopy(model.clip.visual)
    finetune._mode(tower)
    assert tower.training
    kinds = {type(m).__name__: m.training for m in tower.layers}
    assert kinds == {"Conv2d": True, "BatchNorm2d": False, "ReLU": True}


# --- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_only_the_image_tower_changes_and_facts_are_told(name: str, model: ClipScorer, scenes: Dataset) -> None:
    before = state(model)
    seen: list[tuple[Any, ...]] = []
    made = tuned(
        f"{name}:epochs=2,batch_size=32,{QUICK[name]}", model, scenes, progress=lambda *step: seen.append(step)
    )
    after = made.model.state_dict()
    assert set(after) == set(before), "no parametrisation is left"
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("clip.visual.") for key in changed), "the text tower is the same, bit by bit"
    assert not any("running" in key or "batches" in key for key in changed), "statistics of batch norm stay"
    assert not any(m.training for m in made.model.modules())
    assert [p.requires_grad for p in made.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(made.model.columns, model.columns)  # type: ignore[arg-type]
    for key, value in state(model).items():
        assert torch.equal(value, before[key])

    assert [step[:4] for step in seen] == [(e, 2, s, 3) for e in (1, 2) for s in (1, 2, 3)]
    facts = made.facts
    assert facts["updates"] == 6
    assert facts["ended"] == "all epochs were done"
    assert facts["training_seconds"] > 0
    assert facts["final_loss"] == pytest.approx(np.mean([step[-1] for step in seen[3:]]))
    size = sum(p.numel() for p in model.clip.visual.parameters())
    trained = facts["adapter_parameters" if name == "oft" else "parameters"]
    assert facts["share"] == round(trained / size, 4)
    assert facts["share"] < 0.1 if name == "oft" else facts["share"] == 1
    parts = [key for key in facts if key.startswith("final_") and key != "final_loss"]
    assert facts["final_loss"] == pytest.approx(np.mean([facts[key] for key in parts]))
    assert len(parts) == (2 if name in ("mat", "caption-advtrain") else 1)


@pytest.mark.parametrize("name", ["mat", "caption-advtrain", "tecoa"])
def test_rotations_serve_all_of_them(name: str, model: ClipScorer, scenes: Dataset) -> None:
    made = tuned(f"{name}:epochs=1,adapter=oft,block=8,coft=0.5,{QUICK[name]}", model, scenes)
    assert made.facts["share"] < 0.05
    weight = model.clip.visual.projection.weight.double()
    turned = made.model.clip.visual.projection.weight.double()  # type: ignore[union-attr,operator]
    assert not torch.equal(weight, turned)
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T, rtol=1e-5, atol=1e-5)


def test_fare_draws_attacked_images_to_the_original_features(model: ClipScorer, scenes: Dataset) -> None:
    """On images that it was not trained on, with attacks made anew."""
    x = scenes.test.batch(np.arange(40)).x
    with torch.no_grad():
        clean = model.encode_image(x)
    attack = finetune.Inner(8 / 255, 10, 2 / 255)

    def worst(scorer: ClipScorer) -> float:
        made = attack(scorer, x, lambda features: losses.distance(features, clean), Stream(1, "fresh"))
        with torch.no_grad():
            return float(losses.distance(scorer.encode_image(made), clean).mean())

    made = tuned("fare:epochs=8,batch_size=16", model, scenes)
    assert worst(made.model) < 0.75 * worst(model)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_weights(model: ClipScorer, scenes: Dataset) -> None:
    one, again = (tuned("mat:epochs=1", model, scenes).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    other = tuned("mat:epochs=1", model, scenes, stream=Stream(1, "test")).model.state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_oft_is_fare_with_the_adapter(model: ClipScorer, scenes: Dataset) -> None:
    one = tuned("oft:epochs=1,steps=1", model, scenes).model.state_dict()
    other = tuned("fare:epochs=1,steps=1,adapter=oft", model, scenes).model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_copy_that_fare_compares_with_shares_the_text_tower(model: ClipScorer) -> None:
    made = finetune._frozen(model)
    theirs = dict(made.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == (not name.startswith("clip.visual.")), name
        assert torch.equal(theirs[name], parameter)


def test_captions_are_drawn_among_an_images_own_and_means_take_all(model: ClipScorer) -> None:
    captions = (("zero", "one"), ("zero",), ("two", "three", "four"))
    texts = finetune.Texts(model, captions)
    rows = np.array([2, 0, 1])
    seen = set()
    for seed in range(30):
        features, same = texts.drawn(rows, torch.Generator().manual_seed(seed))
        told = tuple(
            next(t for t in captions[int(i)] if torch.equal(model.encode_text([t])[0], row))
            for i, row in zip(rows, features, strict=True)
        )
        seen.add(told)
        assert same.tolist() == [[a == b for b in told] for a in told]
    assert len(seen) == 6
    expected = [model.encode_text(captions[int(i)]).mean(0) for i in rows]
    torch.testing.assert_close(texts.means(rows), torch.stack(expected))


def test_offline_images_are_made_once_and_stay(
    model: ClipScorer, scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = finetune.away
    monkeypatch.setattr(finetune, "away", lambda *a: calls.append(len(a[3].x)) or real(*a))
    tuned("caption-advtrain:epochs=2,batch_size=32,offline=yes,steps=2", model, scenes)
    assert calls == [32] * 3
    calls.clear()
    tuned("caption-advtrain:epochs=2,batch_size=32,steps=2", model, scenes)
    assert calls == [32] * 6

    assert scenes.train.captions is not None
    texts = finetune.Texts(model, scenes.train.captions)
    kept = finetune.made_once(texts, finetune.Inner(8 / 255, 2, 4 / 255), training(scenes), Stream(0, "s"), 40)
    rows = np.array([95, 3, 41])
    x, made = scenes.train.batch(rows).x, kept(rows)
    assert torch.equal(made, kept(rows))
    assert torch.equal((made * 255).round() / 255, made)
    assert (made - x).abs().max() <= 8.5 / 255
    with torch.no_grad():
        means = texts.means(rows)
        clean, attacked = (losses.dissimilarity(model.encode_image(images), means) for images in (x, made))
    assert (attacked > clean).all()


def test_training_ends_on_an_average_over_an_epoch_only(
    model: ClipScorer, scenes: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.01, 0.9, 0.9, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02])

    def told(model: ClipScorer, batch: finetune.Rows, stream: Stream) -> dict[str, Tensor]:
        loss = 0 * model.encode_image(batch.x).sum() + next(values)
        return {"made_up": loss}

    plan = finetune.Plan(3, 32, 1e-3, 0.0, 0.0, stop=0.1)
    made = finetune.fine_tune("caption-advtrain", copy.deepcopy(model), training(scenes), told, plan, None)
    assert made.facts["updates"] == 6
    assert made.facts["ended"] == "the mean loss of the last 3 updates, 0.02, fell below 0.1"
    assert made.facts["final_made_up"] == pytest.approx(0.02)


def test_the_rate_rises_and_falls() -> None:
    plan = finetune.Plan(1, 32, 1e-3, 0.0, 0.1)
    rates = [plan.rate(i, 100) for i in range(100)]
    assert rates.index(max(rates)) == 10
    assert rates[0] < 0.1
    assert max(rates) == 1
    assert rates[-1] < 0.001
    assert finetune.Plan(1, 32, 1e-3, 0.0, 0.0).rate(0, 1) <= 1


def test_weights_that_are_only_loaded_are_tuned_gently() -> None:
    from advplug.build import TUNING
    from advplug_clip.defense_specs import Tuning

    def rate(schedule: Schedule, adapter: str, lr: float | None = None) -> float:
        tuning = Tuning("fare", 1, 4, lr, 0.0, 0.0, adapter, None, None)
        data = Split(None, np.zeros(2), np.zeros(2))  # type: ignore[arg-type]
        return tuning.plan(Training(data, None, schedule, None, Stream(0))).lr  # type: ignore[arg-type]

    assert rate(Schedule(), "none") == 1e-3
    assert rate(Schedule(), "oft") == pytest.approx(1e-2)
    assert rate(TUNING, "none") == 1e-5
    assert rate(TUNING, "oft", 2e-4) == 2e-4


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mat", "caption-advtrain"])
def test_captions_are_needed_for_every_image(name: str, model: ClipScorer, scenes: Dataset) -> None:
    bare = replace(scenes, train=replace(scenes.train, captions=None))
    with pytest.raises(UsageError, match=f"{name} learns from captions and the dataset has none; use digit-scenes"):
        tuned(name, model, bare)
    assert scenes.train.captions is not None
    one = replace(scenes, train=replace(scenes.train, captions=((), *scenes.train.captions[1:]), names=None))
    with pytest.raises(UsageError, match=f"{name} learns from captions and training image 0 has none"):
        tuned(name, model, one)


def test_tecoa_needs_classes(model: ClipScorer, scenes: Dataset) -> None:
    with pytest.raises(UsageError, match="tecoa learns classes and the dataset has none; use fare or"):
        tuned("tecoa", model, replace(scenes, info=replace(scenes.info, classes=())))


@pytest.mark.parametrize("name", ALL)
def test_leaks_are_refused_before_anything_is_trained(name: str, model: ClipScorer, scenes: Dataset) -> None:
    leaky = replace(scenes, test=scenes.train.subset(np.arange(5)))
    with pytest.raises(UsageError, match="5 of 5 evaluation images are in the training data"):
        tuned(name, model, leaky, progress=lambda *_: pytest.fail("it trains"))


def test_a_budget_is_needed_where_none_is_customary(model: ClipScorer, scenes: Dataset) -> None:
    bare = replace(scenes, info=replace(scenes.info, budgets={}))
    with pytest.raises(UsageError, match="fare: this dataset has no customary budget in linf; write fare:eps=8/255"):
        tuned("fare", model, bare)
    facts = tuned("fare:eps=2/255,steps=1,epochs=1", model, bare).facts
    assert (facts["eps"], facts["alpha"]) == ("2/255", "1/255")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fare:block=8", "block= belongs to rotations|block= belong to rotations"),
        ("mat:block=8,coft=0.1", "block= and coft= belong to rotations; write adapter=oft too"),
        ("tecoa:templates=digit", "did you mean"),
        ("fare:adapter=lora", "adapter"),
        ("fare:eps=-1", "eps"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_at_once(text: str, message: str) -> None:
    reference = parse_reference(text)
    entry = registry().get("defense", reference.name)
    with pytest.raises(UsageError, match=message):
        entry.spec.caps_of(entry.bind(reference))


def test_models_without_texts_are_refused(scenes: Dataset) -> None:
    with pytest.raises(UsageError, match="fare trains models of images and texts"):
        tuned("fare", nn.Flatten(), scenes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fare trains models of images and texts, cnn is none; use a CLIP model"):
        evaluate("cnn", "fgsm", defense="fare", dataset="digits", audit="none", baseline=False)


def test_a_loss_that_is_no_number_fails_the_cell(model: ClipScorer, scenes: Dataset) -> None:
    with pytest.raises(CellFailure, match=r"the loss became nan in epoch \d of 3, step \d of 3; use a smaller lr than"):
        tuned("fare:lr=1e30,steps=1,batch_size=32", model, scenes)
    with pytest.raises(CellFailure, match="at least 2 images, got 1"):
        tuned("fare:steps=1", model, replace(scenes, train=scenes.train.subset(np.array([3]))))


# --- whole -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_conformance(name: str) -> None:
    results = check_defense(name)
    assert all(r.ok is not False for r in results)


def test_tuned_weights_come_from_the_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    ask: dict[str, Any] = {"dataset": "digit-scenes:train=128,n=16", "audit": "none", "baseline": False}
    ask["defense"] = "oft:epochs=1,steps=1"
    first = evaluate("clip-tiny-vit:epochs=1", "fgsm", **ask)
    again = evaluate("clip-tiny-vit:epochs=1,task=retrieval", "caption-pgd:steps=1", **ask)
    assert [cell.status for cell in (*first.cells, *again.cells)] == ["ok", "ok"]
    assert len(Artifacts().ls()) == 2, "both tasks share the trained weights and the tuned ones"


# --- the bars --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fare_and_oft_reach_their_bars() -> None:
    """Adaptive zero-shot accuracy at 8/255 under APGD, 200 images: 40 points more with fare, 35 with oft.

    fare costs at most 2 points of clean accuracy, oft trains less than a tenth of the tower.
    """
    ask: dict[str, Any] = {"dataset": "digit-scenes", "eps": "8/255", "n": 200, "audit": "none"}
    cells = evaluate("clip-tiny", "apgd", defense=["fare", "oft"], **ask).cells
    assert [cell.status for cell in cells] == ["ok"] * 3
    clean = [cell.metrics["clean_accuracy"].value for cell in cells]
    left = [cell.metrics["robust_accuracy"].value for cell in cells]
    facts = [dict(cell.provenance["facts"]) for cell in cells]
    print()
    for name, c, r, told in zip(("none", "fare", "oft"), clean, left, facts, strict=True):
        print(f"{name}: clean {c:.3f}, adaptive {r:.3f}, {told.get(name, '')}")
    assert left[1] - left[0] >= 0.40
    assert clean[0] - clean[1] <= 0.02 + 1e-9
    assert left[2] - left[0] >= 0.35
    assert facts[2]["oft"]["share"] < 0.1
