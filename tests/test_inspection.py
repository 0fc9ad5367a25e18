"""What is seen of a victim without an attack: each observation on a victim that has the trait, and on one without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.build import Built
from advplug.contracts import Wrap
from advplug.data import ArrayImages, Split
from advplug.decisions import Batching
from advplug.inspection import derivative_errors, inspect, is_batch_dependent
from advplug.rng import Stream
from advplug.victim import Victim

CLASSES, IMAGES = 4, 40


class Net(nn.Module):
    """A small convolutional net with pooling, on images with flat background: ties and kinks where there can be."""

    def __init__(self) -> None:
        super().__init__()
        with Stream(0, "net").as_global():
            self.layers = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, CLASSES),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Changed(Net):
    """The net with something around it."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward, x)


def images() -> np.ndarray:
    x = torch.zeros(IMAGES, 1, 8, 8)
    x[:, :, 2:6, 2:6] = torch.rand(IMAGES, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x.numpy()


def built(module: nn.Module, *wraps: Wrap) -> Built:
    module = module.eval()
    with torch.no_grad():
        y = module(torch.from_numpy(images())).argmax(1).numpy()
    split = Split(ArrayImages(images()), y, np.arange(IMAGES))
    return Built(Victim(module, CLASSES, wraps, stream=Stream(0, "victim")), split, 0, "")


def errors(module: nn.Module, *wraps: Wrap) -> Any:
    victim = built(module, *wraps).victim
    return derivative_errors(victim, torch.from_numpy(images())[:32], Stream(0, "test"), 10)


# --- finite differences ------------------------------------------------------------------------------


def dropping(f: Any, x: Tensor) -> Tensor:
    return f(functional.dropout(x, 0.5, training=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda f, x: f(x),
        lambda f, x: 1000 * f(x),
        lambda f, x: f(x).softmax(1),
        lambda f, x: (1000 * f(x)).softmax(1).clamp(0.001, 0.999) + 1e-12 * f(x),
        lambda f, x: f(x.clamp(0, 1)),
        lambda f, x: f(torch.sigmoid(5 * (x - 0.5))),
        dropping,
    ],
    ids=["net", "scaled", "softmax", "saturated", "clamped", "sigmoid", "dropout"],
)
def test_honest_gradients_are_those_of_finite_differences(change: Any) -> None:
    """Also where pools tie on flat background, pixels sit at the edge of [0, 1], and random parts draw."""
    found = errors(Changed(change))
    assert len(found) == 32
    assert (found < 1e-4).mean() >= 0.95


class Misled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@pytest.mark.parametrize(
    "change",
    [
        lambda f, x: f(x.detach()),
        lambda f, x: f(0.5 * x + 0.5 * x.detach()),
        lambda f, x: f((x > 0.5).to(x)),
        lambda f, x: f(x + (x.mul(4).round() / 4 - x).detach()),
        lambda f, x: f(x).mul(10).round(),
        lambda f, x: f(Misled.apply(x)),
        lambda f, x: f(x) + torch.sqrt(0 * x.flatten(1).sum(1, keepdim=True)),
    ],
    ids=["detached", "half", "one-bit", "straight-through", "rounded", "misled", "nan"],
)
def test_gradients_that_lie_differ(change: Any) -> None:
    assert (errors(Changed(change)) > 1e-2).mean() > 0.9


def test_a_part_of_the_gradient_is_missed_in_a_deep_place() -> None:
    net = Net()
    net.layers[3] = Changed(lambda f, x: functional.max_pool2d(x, 2).detach() + 0 * functional.max_pool2d(x, 2))
    assert (errors(net) > 1e-2).all()


def test_randomised_wraps_are_compared_under_the_same_draws() -> None:
    noisy = Wrap(lambda f, x, rng: f(x + 0.1 * torch.randn(x.shape, generator=rng)), stochastic=True, draws=4)
    assert (errors(Net(), noisy) < 1e-4).mean() >= 0.95


def test_what_cannot_run_in_float64_is_left_open() -> None:
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    assert errors(Single()) is None
    victim = built(Net()).victim
    victim.batch_dependent = True
    assert derivative_errors(victim, torch.from_numpy(images()), Stream(0, "test"), 10) is None


def test_looking_leaves_the_victim_as_it_was() -> None:
    net = Net().train()
    before = torch.get_rng_state()
    errors(net)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)


# --- answers -----------------------------------------------------------------------------------------


def look(module: nn.Module, *wraps: Wrap) -> Any:
    one = built(module, *wraps)
    return inspect(one, np.arange(32), 32, Batching(10))


def test_answers_that_differ_by_themselves_are_seen() -> None:
    assert look(Net()).spread == 0
    assert look(Changed(dropping)).spread > 1e-2
    declared = Wrap(lambda f, x, rng: f(x + torch.randn(x.shape, generator=rng)), stochastic=True, draws=2)
    assert look(Net(), declared).spread is None


def test_probabilities_are_told_from_logits() -> None:
    assert look(Changed(lambda f, x: f(x).softmax(1))).probabilities
    assert not look(Net()).probabilities
    assert not look(Changed(lambda f, x: f(x).log_softmax(1))).probabilities
    assert not look(Changed(lambda f, x: f(x).sigmoid())).probabilities
    one_hot = Wrap(lambda f, x, rng: f(x).softmax(1), surrogates=(lambda f, x, rng: f(x),))
    assert not look(Net(), one_hot).probabilities, "what is attacked are the logits"


def test_certainty_is_that_of_float32() -> None:
    for gap, certain in ((16, False), (18, True)):
        fixed = Changed(lambda f, x, gap=gap: gap * functional.one_hot(f(x).argmax(1), CLASSES).float())
        assert look(fixed).saturated.all() == certain


class Brightness(nn.Module):
    """The class is a quarter of the range of mean brightness."""

    def forward(self, x: Tensor) -> Tensor:
        centres = (torch.arange(CLASSES) + 0.5) / CLASSES
        return -100 * (x.flatten(1).mean(1, keepdim=True) - centres) ** 2


class Centred(Brightness):
    """The same for pixels in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5 + 0.5)


def test_a_model_of_other_pixels_is_found_out() -> None:
    y = np.arange(IMAGES) % CLASSES
    flat = np.broadcast_to(((y + 0.5) / CLASSES).astype(np.float32)[:, None, None, None], (IMAGES, 1, 8, 8))
    split = Split(ArrayImages(flat), y, np.arange(IMAGES))
    for module, plain, normalised in ((Brightness(), 32, 0), (Centred(), 8, 32)):
        built = Built(Victim(module, CLASSES), split, 0, "")
        seen = inspect(built, np.arange(32), 32, Batching(10))
        assert seen.plain.sum() == plain
        assert seen.normalised is not None
        assert seen.normalised.sum() >= normalised


def test_a_model_that_refuses_other_pixels_is_not_asked_twice() -> None:
    def strict(f: Any, x: Tensor) -> Tensor:
        if x.amin() < 0 or x.amax() > 1:
            raise ValueError("pixels must lie in [0, 1]")
        return f(x)

    assert look(Changed(strict)).normalised is None


def test_neighbours_are_told_from_chance() -> None:
    batching = Batching(16)
    assert is_batch_dependent(built(Net()), batching) is False
    assert is_batch_dependent(built(Changed(lambda f, x: f(x - x.mean(0)))), batching) is True
    assert is_batch_dependent(built(Changed(dropping)), batching) is None
    assert is_batch_dependent(built(Net()), Batching(1)) is None

    def seeded(f: Any, x: Tensor) -> Tensor:
        return f(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))

    assert is_batch_dependent(built(Changed(seeded)), batching) is True
