"""Batch norms folded into convolutions for attack passes: the same function, and only where it is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from advplug.attacks import precision
from advplug.attacks.folding import folded, last_fold
from advplug.builtin import gradient
from advplug.contracts import Batch
from advplug.rng import Stream
from advplug.victim import Victim, input_gradient
from advplug.vision import import_torchvision
from linear import threat


class Net(nn.Module):
    """Two blocks with a shortcut; statistics as after training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x - 0.5)).relu()
        x = (x + self.second(self.conv(x))).relu()
        head: Tensor = self.head(x.mean((2, 3)))
        return head


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) > 0 else -x)


class Cutting(Net):
    """Answers like `Net`, with another gradient: what a trace would lose."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            lost = super().forward(x)
        return super().forward(x) * 0.5 + lost * 0.5


class Shared(Net):
    """One convolution before two norms."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled: Tensor = self.norm(x).mean((2, 3)) + self.second(x).mean((2, 3))
        head: Tensor = self.head(pooled)
        return head


def made(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return net.eval().requires_grad_(False)


def seen(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    answers = net(point)
    return answers, input_gradient(answers[:, 0], point)


X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [None, "resnet18", "mobilenet_v2"])
def test_a_fold_answers_as_the_module_does(name: str | None) -> None:
    net = made() if name is None else made(getattr(import_torchvision().models, name))
    x = torch.rand(6, 3, 32, 32)
    found = folded(net, x)
    assert found is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())
    for ours, theirs in zip(seen(found, x), seen(net, x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.detach().abs().max()))
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())  # which stays as it was


def test_what_cannot_be_folded_is_left_alone() -> None:
    assert folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X) is None
    assert folded(made().train(), X) is None
    for kind in (Branching, Cutting, Shared):
        assert folded(made(kind), X) is None, kind
    hooked = made()
    hooked.stem.register_forward_hook(lambda m, i, out: 2 * out)  # type: ignore[union-attr]
    assert folded(hooked, X) is None


def test_changed_weights_are_folded_anew() -> None:
    net = made()
    first = folded(net, X)
    assert folded(net, X) is first is last_fold(net)
    net.norm.running_mean += 1  # type: ignore[operator, union-attr]
    assert last_fold(net) is None
    second = folded(net, X)
    assert second is not None
    assert second is not first
    assert torch.allclose(second(X), net(X), atol=1e-4)


def test_a_fold_keeps_no_model_alive() -> None:
    net = made()
    assert folded(net, X) is not None
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_attacks_use_a_fold_where_it_is_fast_and_never_a_stale_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(precision, "WORTH_SHARE", 1e6)
    fast = str(precision.Mode(folded=True))

    def clock(run: precision.Runner, x: Tensor) -> float:
        return 1e-4 * len(x) / (2.0 if str(getattr(run, "mode", precision.PLAIN)) == fast else 1.0)

    monkeypatch.setattr(precision, "_clock", clock)
    net = made()
    batch = Batch(X, net(X).argmax(1), torch.arange(len(X)))
    used = []
    attack = gradient.pgd(steps=20)
    for shift in (0.0, 1.5):
        net.head.bias[0] += shift  # type: ignore[index, operator, union-attr]
        victim = Victim(net, 4)
        found = attack(victim, batch, threat(0.02), Stream(0, "fold"))
        used.append(last_fold(net))
        plain = gradient.pgd(steps=20, precision="float32")(Victim(net, 4), batch, threat(0.02), Stream(0, "fold"))
        assert torch.equal(found.trace.any_iterate, plain.trace.any_iterate)
        assert torch.allclose(found.x, plain.x, atol=1e-5)
    assert precision.chosen(net) == fast
    assert None not in used
    assert used[0] is not used[1]
