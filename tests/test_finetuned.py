"""Networks that are trained on one dataset and fine-tuned on another: what is taken over, and that it is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from advplug.artifacts import Artifact, Artifacts
from advplug.build import Builder
from advplug.builtin.models import SGD_FACTOR, TUNING_RATE
from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind, bind_stack
from advplug.progress import Silent
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_model
from cli_tools import run

FIRST = "fake:size=16,train=40,n=10,classes=4,channels=1"
TARGET = "fake:size=16,train=30,n=10,classes=3,channels=1,seed=1"


def model(text: str) -> Any:
    return bind(registry(), "model", parse_reference(text)).value


def tuned(network: str = "cnn:epochs=1", epochs: int = 1, first: str = FIRST, **more: object) -> str:
    options = "".join(f",{name}={value}" for name, value in more.items())
    return f"finetuned:({network}),source=({first}),epochs={epochs}{options}"


def victim(text: str, defense: str = "none", seed: int = 0, on: str = TARGET) -> VictimPlan:
    dataset = bind(registry(), "dataset", parse_reference(on))
    return VictimPlan(
        dataset, bind(registry(), "model", parse_reference(text)), bind_stack(registry(), parse_stack(defense)), seed
    )


class Counting(Artifacts):
    """A cache that notes what is made."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.made: list[str] = []

    def get_or_make(self, key: str, make: Callable[[], Artifact], label: str = "") -> Artifact:
        def noted() -> Artifact:
            self.made.append(label.partition(":")[0])
            return make()

        return super().get_or_make(key, noted, label)


@pytest.fixture
def cache(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "artifacts")


def weights(cache: Artifacts, plan: VictimPlan) -> Mapping[str, torch.Tensor]:
    module: nn.Module = Builder(cache, "cpu", True, Silent()).build(plan, None).victim.module
    return module.state_dict()


# --- what is taken over ----------------------------------------------------------------------------


def info(classes: int = 3, channels: int = 3, size: int = 32) -> DatasetInfo:
    return DatasetInfo(tuple(map(str, range(classes))), channels, (size, size), {"linf": Fraction(1, 10)})


@pytest.mark.parametrize("name", ["cnn", "cnn-a", "cnn-b", "resnet18", "squeezenet1_1"])
def test_all_but_the_last_layer_is_taken_over(name: str) -> None:
    source = model(tuned(name, first="fake"))
    with Stream(0, "init").as_global():
        fresh = source.build(info())
    own = {key: value.clone() for key, value in fresh.state_dict().items()}
    with Stream(1, "other").as_global():
        trained = model(name).build(info(classes=10))
    begun = source.adopt(fresh, trained).state_dict()
    for key, value in begun.items():
        theirs = trained.state_dict()[key]
        taken = value.shape == theirs.shape and torch.equal(value, theirs)
        assert taken or torch.equal(value, own[key])
        assert taken == (f"net.{source._arch.head}." not in key), key
    assert len(fresh.eval()(torch.rand(1, 3, 32, 32))[0]) == 3


def test_the_last_layer_is_new_where_there_are_as_many_classes() -> None:
    source = model(tuned(first="fake"))
    with Stream(0, "init").as_global():
        fresh = source.build(info(classes=10))
    own = fresh.get_submodule("net.fc").weight.clone()
    begun = source.adopt(fresh, model("cnn").build(info(classes=10)))
    assert torch.equal(begun.get_submodule("net.fc").weight, own)


def test_it_begins_with_the_trained_weights(cache: Counting) -> None:
    # At such a rate nothing moves: what comes out is what training began with.
    still = weights(cache, victim(tuned(lr=1e-30)))
    first = weights(cache, victim("cnn:epochs=1", on=FIRST))
    assert cache.made == ["finetuned", "cnn"]
    for key, value in still.items():
        if value.is_floating_point() and "running" not in key and not key.startswith("net.fc"):
            assert torch.equal(value, first[key]), key


def test_schedules() -> None:
    plan = model(tuned(epochs=4, optimizer="sgd", batch_size=32)).schedule(info())
    assert (plan.epochs, plan.optimizer, plan.batch_size) == (4, "sgd", 32)
    assert plan.lr == pytest.approx(TUNING_RATE * SGD_FACTOR)
    assert model(tuned(lr=0.5)).schedule(info()).lr == 0.5


# --- made once -------------------------------------------------------------------------------------


def test_the_first_training_is_shared(cache: Counting) -> None:
    long, short = victim(tuned(epochs=2)), victim(tuned())
    weights(cache, short)
    assert cache.made == ["finetuned", "cnn"]
    weights(cache, long)
    weights(cache, victim(tuned(), seed=1))
    weights(cache, victim(tuned(), "advtrain:attack=fgsm"))
    assert cache.made == ["finetuned", "cnn", "finetuned", "finetuned", "finetuned"]
    # It is the training of that network on that dataset, whoever asks for it.
    weights(cache, victim("cnn:epochs=1", on=FIRST))
    assert len(cache.made) == 5


def test_fine_tuned_weights_need_no_first_training_any_more(cache: Counting) -> None:
    plan = victim(tuned())
    before = weights(cache, plan)
    held = {key: value.clone() for key, value in before.items()}
    for stored in cache.ls():
        if stored.label.startswith("cnn"):
            for file in (cache.root / stored.key).iterdir():
                file.unlink()
            (cache.root / stored.key).rmdir()
    again = weights(cache, plan)
    assert cache.made == ["finetuned", "cnn"]
    assert all(torch.equal(held[key], again[key]) for key in held)


def test_the_identity_covers_the_first_training() -> None:
    others = (
        victim(tuned()),
        victim(tuned("cnn:epochs=2")),
        victim(tuned("cnn-a:epochs=1")),
        victim(tuned("cnn:epochs=1,seed=3")),
        victim(tuned(first=f"{FIRST},seed=4")),
        victim(tuned(optimizer="sgd")),
    )
    assert len({plan.key for plan in others}) == len(others)
    assert victim(tuned("cnn:epochs=1,optimizer=adamw")).key != victim(tuned("cnn:epochs=1,optimizer=sgd")).key


def test_the_identity_follows_the_files_of_the_source(tmp_path: Path) -> None:
    import numpy as np

    def saved(value: int) -> str:
        x = np.full((20, 16, 16), value, np.uint8)
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 4)
        return str(model(tuned(first=f"npz:{tmp_path / 'a.npz'}")).identity())

    assert saved(3) == saved(3)
    assert saved(3) != saved(4)


# --- what cannot be --------------------------------------------------------------------------------


def test_what_does_not_fit() -> None:
    assert "1 channels first" in model(tuned()).misfit(info())
    assert "one image size" in model(tuned("cnn-b", first="fake:size=16")).misfit(info())
    assert "16 x 16" in model(tuned("cnn-b", first="fake:size=16")).misfit(info())
    assert "one image size" in model(tuned("vit_b_16", first="fake:size=16")).misfit(info())
    assert model(tuned("cnn", first="fake:size=16")).misfit(info()) is None
    assert model(tuned("resnet18", first="fake:size=16")).misfit(info()) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("finetuned:resnet18", "needs its parameter 'source'"),
        ("finetuned:resnet19,source=fake", "did you mean 'resnet18'?"),
        ("finetuned:(torchvision:resnet18@DEFAULT),source=fake", "fine-tuned by itself"),
        ("finetuned:clip-tiny,source=fake", "no network that is trained here"),
        ("finetuned:(cnn+prune),source=fake", "backbone takes one model"),
        ("finetuned:cnn,source=fkae", "did you mean 'fake'?"),
        ("finetuned:cnn,source=(fake:clases=3)", "did you mean 'classes'?"),
        ("finetuned:(cnn:epoch=3),source=fake", "did you mean 'epochs'?"),
    ],
)
def test_references_that_mean_nothing(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        model(text)
    assert words in str(caught.value)


def test_it_keeps_the_contract() -> None:
    check_model("finetuned", on="digits", backbone="cnn:epochs=1", source="digits:train=40")


def test_a_dry_run_counts_both_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matrix.yaml").write_text(
        f"datasets: {TARGET}\nmodels:\n - {tuned()}\n - {tuned(epochs=2)}\nattacks: fgsm\naudit: none\n"
    )
    told = run("run", "matrix.yaml", "--dry-run", "--calibrate")
    assert told.code == 0, told.err
    assert "3 trainings" in told.out + told.err


def test_a_missing_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = run("eval", "-m", "finetuned:cnn,source=(npz:away.npz)", "--dataset", "fake", "-a", "fgsm")
    assert told.code == 2
    assert "'away.npz' cannot be read" in told.err
    assert len(told.err.strip().splitlines()) == 1
