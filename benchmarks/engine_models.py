"""The nets and images that the engine is measured on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from advplug.builtin import gradient
from advplug.contracts import Ball, Batch, Threat
from advplug.params import fraction
from advplug.rng import Stream
from advplug.victim import Victim


def folder() -> Path | None:
    """The folder with the real data, or None."""
    found = os.environ.get("ADVPLUG_DATA")
    return Path(found) if found and (Path(found) / "weights" / "resnet20_cifar10.th").is_file() else None


def name() -> str:
    return "ResNet-20 on CIFAR-10" if folder() else "small net on the digits"


def images(train: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, C, H, W) and labels."""
    place = folder()
    if place:
        file = np.load(place / ("cifar10_train20k.npz" if train else "cifar10_test.npz"))
        return np.ascontiguousarray(file["x"].transpose(0, 3, 1, 2)), file["y"].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = np.kron(digits.images / 16 * 255, np.ones((1, 4, 4))).astype(np.uint8)[:, None].repeat(3, 1)
    cut = len(x) // 2
    rows = slice(0, cut) if train else slice(cut, None)
    return x[rows], digits.target[rows].astype(np.int64)


def batch(split: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> Batch:
    """Images `start` to `stop`, counted round where there are fewer."""
    rows = np.arange(start, stop) % len(split[1])
    x = torch.from_numpy(split[0][rows]).float().div_(255).contiguous()
    return Batch(x, torch.from_numpy(split[1][rows]), torch.arange(start, stop))


class Block(nn.Module):
    """Two convolutions beside an identity; where the shape changes, every second pixel and zero channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(y + x)


class Normalised(nn.Module):
    """Pixels in [0, 1] to what the weights were trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[no-any-return, operator]


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 with option-A shortcuts (He et al. 2015, arXiv 1512.03385, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalised()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(self.normalise(x))))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


def small_net() -> nn.Module:
    """Four convolutions; wide enough that an attack's time is the passes' time."""
    layers: list[nn.Module] = [Normalised()]
    for before, after, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))


def victim_net() -> nn.Module:
    """The ResNet-20 with its published weights, or the small net trained on the digits."""
    place = folder()
    if place is None:
        return _cached("digits", lambda net: _train(net, epochs=8, adversarial=False))
    state = torch.load(place / "weights" / "resnet20_cifar10.th", map_location="cpu", weights_only=True)
    net = ResNet20()
    net.load_state_dict({k.removeprefix("module."): v for k, v in state["state_dict"].items()})
    return net.eval()


def trained_net() -> nn.Module:
    """The small net, adversarially trained for a few minutes, from the user's cache after the first time."""
    kind = "cifar10" if folder() else "digits"
    return _cached(f"{kind}-adversarial", lambda net: _train(net, epochs=5, adversarial=True))


def _cached(key: str, train: Callable[[nn.Module], None]) -> nn.Module:
    return cached_net(f"engine-{key}", small_net, train)


def cached_net(key: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """A net that is trained the first time and read from the user's cache afterwards."""
    path = Path(platformdirs.user_cache_dir("advplug")) / "benchmarks" / f"{key}.safetensors"
    torch.manual_seed(0)
    net = make()
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    train(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return net.eval()


def _train(net: nn.Module, epochs: int, adversarial: bool) -> None:
    """AdamW with a one-cycle rate; adversarial: two PGD steps at 8/255 against the net as it stands."""
    x, y = images(train=True)
    x, y = x[:10000], y[:10000]
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    attack = gradient.pgd(steps=2, alpha=fraction("5/255"), precision="float32", keep_going=True)
    threat = Threat(Ball("linf", fraction("8/255")))
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(128):
            part = torch.from_numpy(x[rows.numpy()]).float().div_(255)
            flip = torch.rand(len(part), generator=order) < 0.5
            if folder():
                part[flip] = part[flip].flip(-1)
            labels = torch.from_numpy(y[rows.numpy()])
            if adversarial:
                made = Batch(part, labels, rows)
                part = attack(Victim(net, 10), made, threat, Stream(epoch, "train")).x
            net.train()
            loss = functional.cross_entropy(net(part), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
