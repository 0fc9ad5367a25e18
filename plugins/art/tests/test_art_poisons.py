"""ART's attacks on training data: what they may change, and whether they come nearer to what they want."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.contracts import PoisonCaps, Poisoned
from advplug.errors import UsageError
from advplug.parse import parse_reference
from advplug.poisons.prepared import triggered
from advplug.registry import registry
from advplug.rng import Stream
from advplug.testing import check_attack
from advplug.testing.state import fingerprint
from advplug.victim import Victim
from advplug_art.features import Features, last
from advplug_art.poison_specs import POISONS

pytest_plugins = ["poison_world"]
NAMES = [spec.name for spec in POISONS]
TARGETED = ("art.feature-collision", "art.bullseye-polytope", "art.gradient-matching")
QUICK: dict[str, str] = {
    "art.feature-collision": "targets=2,share=0.02,steps=10",
    "art.bullseye-polytope": "targets=2,steps=25",
    "art.gradient-matching": "targets=2,steps=10",
    "art.hidden-trigger": "steps=10,source=3",
    "art.clean-label-backdoor": "steps=5",
    "art.sleeper-agent": "steps=6,source=3",
}
EPS = {
    "art.bullseye-polytope": 0.1,
    "art.gradient-matching": 0.1,
    "art.hidden-trigger": 0.1,
    "art.clean-label-backdoor": 0.3,
    "art.sleeper-agent": 0.1,
}
FALLS = {"feature_distance", "centre_distance", "label_probability"}


def fresh(world: Any, text: str, seed: int = 0) -> Poisoned:
    """What an attack makes of the digits; its surrogate is the clean model."""
    reference = parse_reference(text)
    entry = registry().get("attack", reference.name)
    bound = entry.bind(reference)
    attack = entry.make(bound, **dict.fromkeys(entry.needs(bound), Victim(world.clean, 10)))
    found: Poisoned = attack(world.data.train, world.data.test, world.info, Stream(seed, "poison"))
    return found


_once = functools.cache(fresh)


@pytest.fixture
def poisoned(world: Any) -> Callable[..., Poisoned]:
    """An attack's poisons, made once for each text and seed."""
    return functools.partial(_once, world)


def quick(name: str) -> str:
    return f"{name}:{QUICK[name]}"


def told(made: Poisoned) -> list[Any]:
    """Facts by goal."""
    found: list[Any] = made.facts.get("by_target", [made.facts])
    return found


def objective(facts: Any) -> tuple[str, float, float]:
    (name,) = {"feature_distance", "centre_distance", "label_probability", "gradient_cosine"} & facts.keys()
    return name, facts[name]["before"], facts[name]["after"]


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_the_contract(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    steps = 60 if name == "art.feature-collision" else 4
    check_attack(name, steps=steps, **({"targets": 1} if name in TARGETED else {}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_labels_stay_and_pixels_have_8_bits_within_eps(
    name: str, world: Any, poisoned: Callable[..., Poisoned], capfd: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(world.clean)
    made = poisoned(quick(name))
    assert fingerprint(world.clean) == before
    assert capfd.readouterr() == ("", "")
    rows = np.flatnonzero(made.poisons)
    assert len(rows) == made.facts["poisons"] > 0
    json.dumps(made.facts)
    now, old = made.data.batch(rows), made.originals.batch(np.arange(len(rows)))
    assert torch.equal(now.y, old.y)
    assert torch.equal(old.x, world.data.train.batch(rows).x)
    assert float((now.x * 255 - (now.x * 255).round()).abs().max()) < 1e-3
    changes = (now.x - old.x).abs()
    assert (changes.flatten(1).amax(1) > 0).all()
    if name == "art.clean-label-backdoor":
        corner = torch.zeros_like(changes, dtype=torch.bool)
        corner[:, :, -4:, -4:] = True
        assert (now.x[corner] == 1).all()
        changes = changes[~corner]
    if name in EPS:
        assert float(changes.max()) <= EPS[name] + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_each_comes_nearer_to_what_it_wants(name: str, poisoned: Callable[..., Poisoned]) -> None:
    for facts in told(poisoned(quick(name))):
        what, before, after = objective(facts)
        assert after < 0.9 * before if what in FALLS else after > before + 0.02, facts


def test_the_seed_decides(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    text = quick("art.bullseye-polytope")
    first, again, other = poisoned(text), fresh(world, text), poisoned(text, 1)
    rows = np.arange(len(first.data))
    assert torch.equal(first.data.batch(rows).x, again.data.batch(rows).x)
    assert first.targets is not None
    assert other.targets is not None
    assert not np.array_equal(first.targets.rows, other.targets.rows)


# --- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETED)
def test_targets_are_right_without_poison_and_wanted_as_another_class(
    name: str, world: Any, poisoned: Callable[..., Poisoned]
) -> None:
    made = poisoned(quick(name))
    assert made.targets is not None
    assert made.trigger is None
    batch = world.data.test.batch(made.targets.rows)
    assert (world.clean(batch.x).argmax(1) == batch.y).all()
    assert (batch.y.numpy() != made.targets.wanted).all()
    labels = made.data.labels[made.poisons]
    assert set(labels) == set(made.targets.wanted)


def pooled(world: Any, x: Tensor) -> Tensor:
    """What enters the last layer of the built-in network, written out."""
    net = world.clean
    features: Tensor = net[:-1](x) if not hasattr(net, "net") else net.net[:-1](net.normalise(x))
    return features.flatten(1)


def test_bullseye_draws_the_mean_of_its_poisons_to_the_target(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    """ART's own loss has the images that are poisoned for its target."""
    made = poisoned("art.bullseye-polytope:targets=1,steps=40,wanted=7")
    assert made.targets is not None
    with torch.no_grad():
        goal = pooled(world, world.data.test.batch(made.targets.rows).x)[0]
        rows = np.flatnonzero(made.poisons)
        now = pooled(world, made.data.batch(rows).x).mean(0)
        old = pooled(world, made.originals.batch(np.arange(len(rows))).x).mean(0)
    near, far = float((now - goal).norm() / goal.norm()), float((old - goal).norm() / goal.norm())
    assert near < 0.8 * far
    (facts,) = told(made)
    assert facts["centre_distance"] == pytest.approx({"before": far, "after": near}, abs=1e-3)


def test_gradient_matching_turns_the_gradient_to_the_targets(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    made = poisoned("art.gradient-matching:targets=1,steps=15,wanted=7")
    assert made.targets is not None

    def gradient(x: Tensor) -> Tensor:
        loss = functional.cross_entropy(world.clean(x), torch.full((len(x),), 7))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(world.clean.parameters()))])

    goal = gradient(world.data.test.batch(made.targets.rows).x)
    rows = np.flatnonzero(made.poisons)
    now = float(functional.cosine_similarity(gradient(made.data.batch(rows).x), goal, dim=0))
    old = float(functional.cosine_similarity(gradient(made.originals.batch(np.arange(len(rows))).x), goal, dim=0))
    assert now > old + 0.1
    (facts,) = told(made)
    assert facts["gradient_cosine"] == pytest.approx({"before": old, "after": now}, abs=1e-3)


def test_a_watermark_shows_the_target(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    made = poisoned("art.feature-collision:targets=1,share=0.02,steps=1,lr=1e-6,watermark=0.3,wanted=7")
    assert made.targets is not None
    rows = np.flatnonzero(made.poisons)
    clean = made.originals.batch(np.arange(len(rows))).x
    wanted = (clean + 0.3 * world.data.test.batch(made.targets.rows).x).clamp(0, 1)
    assert float((made.data.batch(rows).x - wanted).abs().max()) < 1.5 / 255


def test_several_layers_are_compared(poisoned: Callable[..., Poisoned]) -> None:
    (facts,) = told(poisoned("art.bullseye-polytope:targets=1,steps=25,layers=(features.1+pool)"))
    _, before, after = objective(facts)
    assert after < before


# --- triggers --------------------------------------------------------------------------------------


def test_the_trigger_is_for_its_source_class_only(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    y = torch.arange(10)
    for name in ("art.hidden-trigger", "art.sleeper-agent"):
        trigger = poisoned(quick(name)).trigger
        assert trigger is not None
        assert trigger.wanted(y).tolist() == [0, 1, 2, 0, 4, 5, 6, 7, 8, 9]
    all_of_them = poisoned(quick("art.clean-label-backdoor")).trigger
    assert all_of_them is not None
    assert (all_of_them.wanted(y) == 0).all()
    batch = world.data.test.batch(np.arange(3))
    marked = triggered(all_of_them, batch.x, batch.index)
    assert (marked[:, :, -4:, -4:] == 1).all()
    assert torch.equal(marked[:, :, :-4], batch.x[:, :, :-4])


def test_poisons_of_hidden_triggers_do_not_show_them(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    for name in ("art.hidden-trigger", "art.sleeper-agent"):
        made = poisoned(quick(name))
        corner = made.data.batch(np.flatnonzero(made.poisons)).x[:, :, -4:, -4:]
        assert float(corner.mean()) < 0.3


def test_clean_label_poisons_are_drawn_without_replacement(world: Any, poisoned: Callable[..., Poisoned]) -> None:
    made = poisoned(quick("art.clean-label-backdoor"))
    assert made.facts["poisons"] == int(0.33 * (world.data.train.labels == 0).sum())
    assert (made.data.labels[made.poisons] == 0).all()


@pytest.mark.parametrize("pattern", ["checkerboard", "noise"])
def test_patches(pattern: str, world: Any, poisoned: Callable[..., Poisoned]) -> None:
    trigger = poisoned(f"art.clean-label-backdoor:steps=1,size=3,pattern={pattern}").trigger
    assert trigger is not None
    corner = trigger.apply(torch.full((2, 1, 16, 16), 0.5), torch.arange(2))[:, 0, -3:, -3:]
    assert torch.equal(corner[0], corner[1])
    if pattern == "checkerboard":
        assert corner[0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    else:
        assert len(corner[0].unique()) > 5


# --- what cannot be asked --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("art.gradient-matching:wanted=ten", ("wanted", "'ten'", "0 to 9")),
        ("art.gradient-matching:targets=5000", ("targets=5000", "fewer")),
        ("art.gradient-matching:share=0.001", ("share=0.001", "larger share")),
        ("art.bullseye-polytope:targets=3,wanted=7,share=0.5,steps=1", ("class '7'", "fewer targets")),
        ("art.bullseye-polytope:layers=features:a=1", ("no layer name",)),
        ("art.bullseye-polytope:steps=1,layers=pol", ("no layer 'pol'", "did you mean 'pool'")),
        ("art.hidden-trigger:steps=1,layer=features.9", ("no layer 'features.9'",)),
        ("art.hidden-trigger:source=0", ("same class",)),
        ("art.sleeper-agent:target=11", ("target", "'11'")),
        ("art.bullseye-polytope:targets=1,steps=1,eps=1/1000", ("8 bits", "larger eps")),
        ("art.clean-label-backdoor:size=16", ("16 x 16", "smaller size")),
    ],
)
def test_what_cannot_be_asked_ends_in_one_line(text: str, words: tuple[str, ...], world: Any) -> None:
    with pytest.raises(UsageError) as caught:
        fresh(world, text)
    message = str(caught.value)
    assert "\n" not in message
    for word in (text.partition(":")[0], *words):
        assert word in message, message


def test_they_are_registered_with_what_they_can_do() -> None:
    for spec in POISONS:
        entry = registry().get("attack", spec.name)
        assert entry.spec.caps == PoisonCaps(clean_label=True)
        assert list(entry.needs({p.name: p.default for p in entry.params()})) == ["surrogate"]
        assert all(p.info.help for p in entry.params())


# --- features --------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers, called in another order than they are written, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.unused = nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(x.flatten(1))))
        return logits


def test_features_are_what_enters_the_layer_called_last() -> None:
    net, x = Two(), torch.rand(5, 1, 2, 2)
    assert last(net, x[:1]) is net.second
    (found,) = Features(net, (), x[:1], "test")(x)
    assert torch.equal(found, torch.tanh(net.first(x.flatten(1))))
    first, second = Features(net, ("first", "second"), x[:1], "test")(x)
    assert torch.equal(first, net.first(x.flatten(1)))
    assert torch.equal(second, net(x))
    assert not net.second._forward_hooks
    assert not net.second._forward_pre_hooks
    with pytest.raises(UsageError, match="gives no tensor"):
        Features(net, ("unused",), x[:1], "test")
    with pytest.raises(UsageError, match="no linear layer"):
        Features(nn.Flatten(), (), x[:1], "test")
