"""Attacks on training data: what is counted, what is recorded and never shown, and what says that nothing was shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug import contracts, session
from advplug.contracts import DatasetInfo, Param, Poisoned, Sift, Sifted, Targets, Trigger, Tuned
from advplug.data import ArrayImages, Dataset, Split
from advplug.errors import CellFailure, UsageError
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.poisons.prepared import left_to_judge, poisoned_by, rounds, sift, triggered
from advplug.registry import Source, load
from advplug.rng import Stream
from advplug.testing import check_attack
from planting import breaches

DIGITS, CNN = "digits:size=16", "cnn:epochs=4"
SEEN: dict[str, Any] = {}
"""What the planted defenses were given."""


def white(x: Tensor, index: Tensor) -> Tensor:
    marked = x.clone()
    marked[:, :, -4:-1, -4:-1] = 1
    return marked


def zeros(y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def patched(
    count: Annotated[int, Param("images", ge=0)] = 100, faint: Annotated[bool, Param("barely there")] = False
) -> Any:
    """Images of other classes get a white patch and the label 0."""

    def put(x: Tensor, index: Tensor) -> Tensor:
        return (white(x, index) - x) * (0.02 if faint else 1) + x

    def attack(data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        rows = np.flatnonzero(data.labels != 0)[:count]
        x = triggered(Trigger(put, zeros), data.batch(rows).x, torch.from_numpy(rows))
        marked = (x * 255).round().byte().numpy()
        changed = data.changed(rows, marked, np.zeros(len(rows), dtype=np.int64))
        mask = np.zeros(len(data), dtype=bool)
        mask[rows] = True
        return Poisoned(changed, mask, data.subset(rows), Trigger(put, zeros), facts={"rate": count / len(data)})

    return attack


def copied(
    copies: Annotated[int, Param("of each target", ge=1)] = 3, targets: Annotated[int, Param("images", ge=1)] = 5
) -> Any:
    """Copies of test images under another class."""

    def attack(data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        rows = np.arange(targets) * 7
        wanted = (test.labels[rows] + 1) % len(info.classes)
        images = (test.batch(np.repeat(rows, copies)).x * 255).round().byte().numpy()
        joined = data.joined(images, np.repeat(wanted, copies))
        mask = np.arange(len(joined)) >= len(data)
        return Poisoned(joined, mask, test.subset(np.repeat(rows, copies)), targets=Targets(rows, wanted))

    return attack


def surrogate(twin: Annotated[contracts.VictimRef, Param("a model")]) -> Any:
    SEEN["twin"] = twin
    return patched(50)


def outliers() -> Any:
    """Removes images of class 0 that the model answers less surely; told nothing of poisons."""

    def apply(trained: Any, training: Any) -> Sifted:
        SEEN["training"], model = training, trained()
        SEEN["again"] = trained() is not None
        bright = training.data.batch(np.arange(len(training.data))).x[:, :, -4:-1, -4:-1].amin((1, 2, 3)).numpy() > 0.9
        with torch.no_grad():
            SEEN["answers"] = model(training.data.batch(np.arange(4)).x).shape
        return Sifted(~bright, {"threshold": 0.9})

    return (Sift(apply),)


def chooser() -> Any:
    """Trains on the first half only, and says that it trusted that."""

    def apply(model: nn.Module, training: Any) -> Tuned:
        SEEN["chooser"] = training
        kept = torch.arange(len(training.data)) < len(training.data) // 2
        half = type(training)(training.data.subset(kept.nonzero().flatten().numpy()), training.info, training.schedule,
                              training.device, training.stream)  # fmt: skip
        told = [{"kept": int(kept.sum()), "decided": "half"}, {"kept": int((~kept).sum()), "decided": "rest"}]
        return Tuned(half.fit(model), facts={"rounds": told}, trusted=torch.stack([kept, ~kept]))

    return (contracts.Fit(apply),)


def blank() -> Any:
    """Covers the corner that the patch stands in."""

    def forward(inner: Any, x: Tensor, rng: Any) -> Tensor:
        covered = x.clone()
        covered[:, :, -4:-1, -4:-1] = 0
        out: Tensor = inner(covered)
        return out

    return (contracts.Wrap(forward),)


def broken() -> Any:
    def attack(data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        raise RuntimeError("no luck")

    return attack


def spec(kind: str, name: str, caps: Any) -> contracts.Spec:
    return contracts.Spec(name, f"{__name__}:{name}", caps, "planted")


class Plugin:
    @staticmethod
    @advplug.hookimpl
    def advplug_attacks() -> list[contracts.Spec]:
        caps = contracts.PoisonCaps()
        return [spec("attack", name, caps) for name in ("patched", "copied", "surrogate", "broken")]

    @staticmethod
    @advplug.hookimpl
    def advplug_defenses() -> list[contracts.Spec]:
        data = contracts.DefenseCaps(("data",), needs_data=True)
        return [
            spec("defense", "outliers", data),
            spec("defense", "chooser", contracts.DefenseCaps(("objective",), needs_data=True)),
            spec("defense", "blank", contracts.DefenseCaps(("wrap",))),
        ]


class _Point:
    @staticmethod
    def load() -> type:
        return Plugin


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = load([(Source("planted", "planted", "1"), _Point)])
    assert not known.broken
    monkeypatch.setattr(session, "registry", lambda: known)
    yield
    SEEN.clear()


def run(attack: str, *defenses: str, **more: Any) -> advplug.RunResult:
    return advplug.evaluate(CNN, attack, list(defenses), dataset=DIGITS, n=200, **more)


# --- a whole run ---------------------------------------------------------------------------------------


def test_a_backdoor_beside_the_clean_model_with_a_data_defense(tmp_path: Path) -> None:
    result = run("patched:count=100", "outliers", output=tmp_path)
    assert (result.cells, result.threats) == ((), ()), "no attack on images was asked for"
    undefended, defended = result.poisonings
    assert (undefended.status, undefended.verdict, undefended.flags) == ("ok", "trusted", ())
    success, reference = (undefended.metrics[n] for n in ("attack_success_rate", "clean_model_success_rate"))
    assert success is not None
    assert reference is not None
    assert success.value > 0.8 > 0.1 > reference.value
    assert success.n < 200, "images of class 0 have nothing to gain"
    assert undefended.metrics["poison_success_rate"] is None
    assert (undefended.poisons, undefended.training_images) == (100, defended.training_images)
    told = defended.provenance["facts"]["outliers"]
    assert (told["removed_poisons"], told["removed_poisons_share"], told["threshold"]) == (100, 1.0, 0.9)
    assert told["removed"] >= 100
    held = defended.metrics["attack_success_rate"]
    assert held is not None
    assert held.value < 0.1
    assert defended.verdict == "upper bound", "nobody made the poison for this defense"
    difference = defended.differences["attack_success_rate"]
    assert difference is not None
    assert difference.high is not None
    assert difference.high < -0.5
    # What a defense sees holds no trace of which are poisons.
    training = SEEN["training"]
    assert not any("poison" in name for name in vars(training) | vars(training.data))
    assert len(training.clean) == len(training.data)
    assert SEEN["answers"] == (4, 10)
    again = run("patched:count=100", "outliers", output=tmp_path)
    assert [p.metrics for p in again.poisonings] == [p.metrics for p in result.poisonings]
    assert json.loads(json.dumps(result.to_json()))["poisonings"][0]["attack"] == "patched:count=100"


def test_targets_are_judged_apart_and_a_choice_is_compared_with_the_poisons() -> None:
    result = run("copied:copies=30", "chooser")
    undefended, defended = result.poisonings
    psr, reference = (undefended.metrics[n] for n in ("poison_success_rate", "clean_model_poison_success_rate"))
    assert psr is not None
    assert reference is not None
    assert (psr.n, psr.value, reference.value) == (5, 1.0, 0.0)
    assert undefended.metrics["attack_success_rate"] is None
    first, second = defended.provenance["facts"]["chooser"]["rounds"]
    assert (first["poisons"], first["precision"]) == (0, 1.0), "the copies joined at the end"
    assert (first["decided"], second["decided"]) == ("half", "rest"), "what the training told of a round stays"
    assert first["kept"] == first["trusted"]
    assert second["poisons"] == 150
    assert first["recall"] + second["recall"] == 1
    everything = registry_digits()
    assert (len(SEEN["chooser"].test), len(SEEN["chooser"].clean)) == (len(everything.test) - 5, len(everything.train))


def registry_digits() -> Dataset:
    known = session.registry()
    found: Dataset = bind(known, "dataset", parse_reference(DIGITS)).value.load()
    return found


def test_what_does_not_take_shows_no_defense() -> None:
    undefended, defended = run("copied:targets=2,copies=1", "blank").poisonings
    for made in (undefended, defended):
        assert made.verdict == "not trustworthy"
        assert [f.name for f in made.flags if f.level == "error"] == ["attack-did-not-take"]


def test_a_trigger_that_is_removed_before_the_model_is_none() -> None:
    undefended, defended = run("patched:count=100", "blank").poisonings
    assert undefended.verdict == "trusted"
    assert [f.name for f in defended.flags] == ["trigger-destroyed"]
    assert defended.provenance["reaches"] == 0
    assert 0.8 < undefended.provenance["reaches"] < 1.3
    assert defended.verdict == "not trustworthy"


def test_a_surrogate_is_the_clean_twin() -> None:
    (made,) = run("surrogate:twin=model").poisonings
    assert made.status == "ok"
    with torch.no_grad():
        assert SEEN["twin"].logits(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


def test_failures_and_refusals_are_states(tmp_path: Path) -> None:
    result = run("broken")
    (made,) = result.poisonings
    assert (made.status, made.reason) == ("failed", "broken raised RuntimeError: no luck")
    assert result.failed == (made,)
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(UsageError, match="a training-set attack needs a model that is trained"):
        advplug.evaluate(module, "patched", dataset=DIGITS)
    with pytest.raises(UsageError, match="crafts no images"):
        session.plan_transfer(session.Request(models=("cnn", "cnn-b")), "patched")


def test_evasion_and_poison_stand_side_by_side() -> None:
    result = advplug.evaluate(CNN, ["fgsm", "patched:count=100"], dataset=DIGITS, n=50, audit="none")
    assert ([c.attack for c in result.cells], [p.attack for p in result.poisonings]) == (
        ["fgsm"],
        ["patched:count=100"],
    )


# --- the parts -----------------------------------------------------------------------------------------


def data(n: int = 6) -> Split:
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    return Split(ArrayImages(images), np.arange(n) % 3, np.arange(n), tuple((f"caption {i}",) for i in range(n)))


def test_changed_and_joined_splits_hold_what_they_should() -> None:
    split = data()
    new = np.full((2, 1, 2, 2), 255, np.uint8)
    changed = split.changed(np.array([4, 1]), new // np.array([1, 5], np.uint8)[:, None, None, None],
                            np.array([0, 2]), [("a",), ("b",)])  # fmt: skip
    taken = changed.batch(np.array([0, 1, 4, 5, 1])).x[:, 0, 0, 0] * 255
    assert taken.round().tolist() == [0, 51, 255, 5, 51]
    assert changed.labels.tolist() == [0, 2, 2, 0, 0, 2]
    assert changed.captions is not None
    assert changed.captions[1:5:3] == (("b",), ("a",))
    assert split.labels.tolist() == [0, 1, 2, 0, 1, 2], "the original stays"
    joined = split.joined(new, np.array([1, 1]), [("x",), ("y",)])
    assert (joined.batch(np.array([7, 2, 6])).x[:, 0, 0, 0] * 255).round().tolist() == [255, 2, 255]
    assert joined.index.tolist() == list(range(8))
    assert joined.captions is not None
    assert joined.captions[-1] == ("y",)
    assert (joined.subset(np.array([6, 0])).batch(np.arange(2)).x[:, 0, 0, 0] * 255).tolist() == [255, 0]
    with pytest.raises(ValueError, match="need captions"):
        split.joined(new, np.array([1, 1]))


def info() -> DatasetInfo:
    return DatasetInfo(("a", "b", "c"), 1, (2, 2), {})


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"poisons": np.zeros(5, dtype=bool)}, "poisons must be bool"),
        ({"originals": data().subset(np.arange(2))}, "originals"),
        ({"trigger": None}, "neither a trigger nor targets"),
        ({"data": data().changed(np.array([0]), labels=np.array([3]))}, "labels lie outside"),
        ({"targets": Targets(np.array([9]), np.array([1]))}, "no rows of the test split"),
        ({"targets": Targets(np.array([1]), np.array([1]))}, "wanted as its own class"),
        (
            {"data": Split(ArrayImages(np.full((6, 1, 2, 2), 0.3001, np.float32)), data().labels, np.arange(6))},
            "8 bits",
        ),
        ({"data": Split(data().images, data().labels, np.zeros(6, int))}, "same position"),
    ],
)
def test_a_poisoned_set_that_cannot_be_is_told(fault: dict[str, Any], told: str) -> None:
    sound: dict[str, Any] = {
        "data": data(), "poisons": np.arange(6) < 1, "originals": data().subset(np.arange(1)),
        "trigger": Trigger(white, zeros),
    }  # fmt: skip
    dataset = Dataset(info(), data(), data())
    assert poisoned_by(lambda *_: Poisoned(**sound), dataset, Stream(0), "it").poisons.sum() == 1
    with pytest.raises(CellFailure, match=told):
        poisoned_by(lambda *_: Poisoned(**{**sound, **fault}), dataset, Stream(0), "it")


def test_targets_leave_the_test_split() -> None:
    targets = Targets(np.array([1, 3]), np.array([0, 1]))
    made = Poisoned(data(), np.zeros(6, dtype=bool), data().subset(np.arange(0)), targets=targets)
    assert left_to_judge(data(), made).index.tolist() == [0, 2, 4, 5]
    assert left_to_judge(data(), None).index.tolist() == list(range(6))


def test_sifting_that_cannot_be_is_told() -> None:
    none = np.zeros(6, dtype=bool)
    with pytest.raises(CellFailure, match="must return bool"):
        sift(data(), none, lambda: Sifted(np.ones(6)), "it")
    with pytest.raises(CellFailure, match="left 1 of 6"):
        sift(data(), none, lambda: Sifted(np.arange(6) < 1), "it")
    left, poisons, told = sift(data(), np.arange(6) < 2, lambda: Sifted(np.arange(6) > 0), "it")
    assert (len(left), poisons.sum(), told["removed_poisons"], told["removed_clean_share"]) == (5, 1, 1, 0.0)


def test_rounds_count_leaks() -> None:
    trusted = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    found = rounds(trusted, np.array([True, False, False, False]))
    assert [(r["trusted"], r["poisons"], r["precision"], r["recall"]) for r in found] == [
        (2, 1, 0.5, 1 / 3),
        (0, 0, None, 0.0),
        (4, 1, 0.75, 1.0),
    ]


# --- the conformance kit ---------------------------------------------------------------------------------


def faulty(fault: str) -> Any:
    def put(x: Tensor, index: Tensor) -> Tensor:
        if fault == "writes":
            x[:] = white(x, index)
            return x
        if fault == "nothing":
            return x.clone()
        if fault == "batch":
            return (white(x, index) + x.mean()).clamp(0, 1)
        return white(x, index) * (2 if fault == "range" else 1)

    def wanted(y: Tensor) -> Tensor:
        return torch.full_like(y, 7 if fault == "class" else 0)

    def attack(data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        if fault == "labels":
            data.labels[0] = 1
        seed = None if fault == "seed" else 0
        rows = np.flatnonzero(data.labels != 0)[:10]
        images = np.random.default_rng(seed).integers(0, 256, (10, *data.batch(rows).x.shape[1:]), dtype=np.uint8)
        changed = data.changed(rows, images, None if fault == "true" else np.zeros(10, dtype=np.int64))
        mask = np.zeros(len(data), dtype=bool)
        mask[rows[: 5 if fault == "mask" else 10]] = True
        return Poisoned(changed, mask, data.subset(np.flatnonzero(mask)), Trigger(put, wanted))

    return attack


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("", ""), ("true", ""), ("writes", "writes into the images"), ("nothing", "changes nothing"),
        ("batch", "rest of its batch"), ("range", "leave [0, 1]"), ("class", "classes there are not"),
        ("seed", "other poisons"), ("mask", "not marked as poisons were changed"), ("labels", "writes into the labels"),
    ],
)  # fmt: skip
def test_the_kit_finds_planted_faults(plant: Any, fault: str, told: str) -> None:
    caps = contracts.PoisonCaps(clean_label=fault == "true")
    found = breaches(check_attack, plant("attack", caps, lambda: faulty(fault)))
    assert (told in found) if told else not found


def test_the_kit_sees_labels_that_change(plant: Any) -> None:
    name = plant("attack", contracts.PoisonCaps(clean_label=True), lambda: faulty(""))
    assert "true labels" in breaches(check_attack, name)
