"""Pruning over architectures, as a table: what it removes, and what it does to clean and attacked accuracy.

`pytest -s` shows the tables. Accuracies of all networks take minutes of training and are in the slow part.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advplug.artifacts import Artifacts
from advplug.build import Builder, Built
from advplug.builtin import models
from advplug.builtin.gradient import ifgsm
from advplug.builtin.prune import prune
from advplug.contracts import Ball, DatasetInfo, Schedule, Threat, Tuned
from advplug.data import ArrayImages, Split
from advplug.defenses.pruning import rebuild
from advplug.errors import UsageError
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind, bind_stack
from advplug.registry import registry
from advplug.rng import Stream
from advplug.train import Training

PRUNED = (
    "cnn-b", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "efficientnet_b0",
    "regnet_y_400mf", "googlenet",
)  # fmt: skip
LARGE = ("vgg11_bn", "resnext50_32x4d")
"""In the slow part."""
TRAINED = (*(n for n in PRUNED if n != "mobilenet_v3_small"), "vgg11_bn")
"""Not MobileNetV3: its batch norm averages over 100 steps, 4 epochs on the digits, and takes dozens to settle."""
LONGER = {"squeezenet1_1": ":epochs=20"}
"""It has no batch norm and learns slowly."""
GROUPED = {"regnet_y_400mf": 8, "resnext50_32x4d": 32}
"""Channels a group of the last stage's grouped convolutions."""
REFUSED = {
    "vit_b_16": "conv_proj: its channels are shared with tokens, positions or scales outside any layer",
    "swin_t": "features.0.0: its channels are shared with layer norm",
    "convnext_tiny": "features.6.1: its channels are shared with layer norm",
    "shufflenet_v2_x0_5": "the channels of this network cannot be traced",
}
RATIO = Fraction(1, 5)
THREAT = Threat(Ball("linf", Fraction(8, 255)))
INFO = DatasetInfo(tuple("0123456789"), 1, (32, 32), {})


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    """Untrained, with batch-norm statistics of random images."""
    with Stream(0, name).as_global(), torch.no_grad():
        model = getattr(models.by_name, name.replace("-", "_"))().build(INFO).train()
        model(images(8))
    return model.eval()


def pruned(model: nn.Module) -> Tuned:
    data = Split(ArrayImages(images(4).numpy()), np.arange(4), np.arange(4))
    training = Training(data, INFO, Schedule(), torch.device("cpu"), Stream(0))
    return prune(ratio=float(RATIO), epochs=0)[0].apply(copy.deepcopy(model), training)  # type: ignore[union-attr,call-arg,return-value,arg-type]


@pytest.mark.parametrize("names", [PRUNED, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_what_is_removed(names: tuple[str, ...]) -> None:
    print(f"\n{'':21}{'parameters':>13}{'pruned':>13}{'filters':>9}{'pruned':>9}")
    x = images(3)
    for name in names:
        model = network(name)
        tuned = pruned(model)
        facts = tuned.facts
        print(
            f"{name:21}{facts['parameters_before']:13,}{facts['parameters_after']:13,}"
            f"{facts['filters_before']:9,}{facts['filters_after']:9,}"
        )
        assert facts["parameters_before"] == sum(p.numel() for p in model.parameters())
        assert facts["parameters_after"] == sum(p.numel() for p in tuned.model.parameters())
        for before, after in facts["widths"].values():
            # Grouped convolutions lose the same positions in each of their groups.
            group = GROUPED.get(name, before)
            assert after in (int((1 - RATIO) * before), before // group * int((1 - RATIO) * group))
        again = rebuild(model, tuned.structure)
        again.load_state_dict(tuned.model.state_dict())
        with torch.no_grad():
            scores = tuned.model(x)
            assert scores.shape == (3, 10)
            assert torch.equal(again(x), scores)


@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_can_be_removed(name: str) -> None:
    with pytest.raises(UsageError) as error:
        pruned(network(name))
    print(f"\n{name:21} {error.value}")
    assert REFUSED[name] in str(error.value)
    assert str(error.value).endswith("use an architecture like resnet18")


@dataclass(frozen=True)
class Silent:
    """No progress is shown."""

    def stage(self, text: str, total: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...


def built(model: str, defense: str) -> Built:
    """Trained on the handwritten digits, or from the cache that all tests share."""
    table = registry()
    dataset = bind(table, "dataset", parse_reference("digits"))
    reference = bind(table, "model", parse_reference(model))
    plan = VictimPlan(dataset, reference, bind_stack(table, parse_stack(defense)), 0)
    return Builder(Artifacts(), "cpu", True, Silent()).build(plan, None)


def accuracies(victim: Built, count: int) -> tuple[float, float]:
    """Shares of all test images and of `count` attacked ones that are answered rightly."""
    everything = victim.split.batch(np.arange(len(victim.split)))
    batch = everything.take(torch.arange(count))
    crafted = ifgsm(precision="float32")(victim.victim, batch, THREAT, Stream(0, "zoo"))
    assert THREAT.perturbation.check(batch.x, crafted.x).all()
    clean = victim.victim.decide(everything.x).label == everything.y
    attacked = victim.victim.decide(crafted.x).label == batch.y
    return clean.float().mean().item(), attacked.float().mean().item()


@pytest.mark.parametrize(
    ("names", "epochs", "count"),
    [
        (("cnn-b:epochs=2",), 1, 64),
        pytest.param(TRAINED, 6, 128, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_accuracies(names: tuple[str, ...], epochs: int, count: int) -> None:
    rows = {}
    print(f"\n{'digits, I-FGSM 8/255':21}{'parameters':>13}{'clean':>8}{'attacked':>10}")
    for name in names:
        model = name + LONGER.get(name, "")
        before, after = built(model, "none"), built(model, f"prune:ratio={float(RATIO)},epochs={epochs}")
        [facts] = after.facts.values()
        clean, attacked = accuracies(before, count)
        clean_after, attacked_after = accuracies(after, count)
        print(f"{name:21}{facts['parameters_before']:13,}{clean:8.1%}{attacked:10.1%}")
        print(f"{'  pruned':21}{facts['parameters_after']:13,}{clean_after:8.1%}{attacked_after:10.1%}")
        assert sum(p.numel() for p in after.victim.module.parameters()) == facts["parameters_after"]
        rows[name] = clean, clean_after, attacked, attacked_after
    for name, (clean, clean_after, attacked, attacked_after) in rows.items():
        assert clean >= 0.6, f"{name} was not trained well enough to say anything"
        assert clean_after >= clean - 0.03, name
        # Attacked are the first images, clean is of all.
        assert attacked <= clean + 0.05, name
        assert attacked_after <= clean_after + 0.05, name
