"""The networks of RobustBench's entries, their parameters named as in the published files; pixels are 32 x 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from advplug_hub.published import Family


def network(family: Family, depth: int, width: int, classes: int = 10) -> nn.Module:
    """The network of a family, with fresh weights; `depth` and `width` matter to wide ones."""
    if family == "wide":
        return WideResNet(depth, width, classes)
    if family == "wide-silu":
        return SiluWideResNet(depth, width, classes)
    if family == "resnet18":
        return ResNet18(classes)
    return PreActResNet18(classes, last_norm=family == "preact18-bn")


def _conv(inside: int, outside: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2 if padding is None else padding, bias=False)


def _stages(depth: int, width: int) -> list[tuple[int, int, int, int]]:
    """(blocks, channels in, channels out, stride) of the three stages (Zagoruyko and Komodakis 2016)."""
    if (depth - 4) % 6:
        raise ValueError(f"a wide residual network has 6n + 4 layers, not {depth}")
    channels = (16, 16 * width, 32 * width, 64 * width)
    return [((depth - 4) // 6, channels[i], channels[i + 1], 1 if i == 0 else 2) for i in range(3)]


# --- wide residual networks as trained with TRADES ---------------------------------------------------


class _WideBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = _conv(inside, outside, stride=stride)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = _conv(outside, outside)
        self.convShortcut = None if inside == outside else _conv(inside, outside, 1, stride, 0)

    def forward(self, x: Tensor) -> Tensor:
        start = functional.relu(self.bn1(x))
        made: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(start))))
        beside: Tensor = x if self.convShortcut is None else self.convShortcut(start)
        return beside + made


class _WideStage(nn.Module):
    def __init__(self, blocks: int, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        first, rest = (inside, stride), (outside, 1)
        self.layer = nn.Sequential(*(_WideBlock(c, outside, s) for c, s in (first, *[rest] * (blocks - 1))))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made


class WideResNet(nn.Module):
    """A wide residual network with ReLU, of images (B, 3, 32, 32)."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        stages = _stages(depth, width)
        self.conv1 = _conv(3, 16)
        self.block1, self.block2, self.block3 = (_WideStage(*stage) for stage in stages)
        self.bn1 = nn.BatchNorm2d(stages[-1][2])
        self.fc = nn.Linear(stages[-1][2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(functional.relu(self.bn1(x)).mean((2, 3)))
        return logits


# --- wide residual networks with SiLU (Gowal et al. 2020, arXiv 2010.03593, section 4) ---------------


class _SiluBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inside)
        self.conv_0 = _conv(inside, outside, stride=stride, padding=0)
        self.batchnorm_1 = nn.BatchNorm2d(outside)
        self.conv_1 = _conv(outside, outside)
        self.shortcut = None if inside == outside else _conv(inside, outside, 1, stride, 0)
        # TensorFlow's padding, which is one-sided where the stride is 2.
        self.pad = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        start = functional.silu(self.batchnorm_0(x))
        made: Tensor = self.conv_0(functional.pad(start, self.pad))
        made = self.conv_1(functional.silu(self.batchnorm_1(made)))
        beside: Tensor = x if self.shortcut is None else self.shortcut(start)
        return beside + made


class _SiluStage(nn.Module):
    def __init__(self, blocks: int, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        first, rest = (inside, stride), (outside, 1)
        self.block = nn.Sequential(*(_SiluBlock(c, outside, s) for c, s in (first, *[rest] * (blocks - 1))))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.block(x)
        return made


class SiluWideResNet(nn.Module):
    """A wide residual network with SiLU, of normalised images (B, 3, 32, 32)."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        stages = _stages(depth, width)
        self.init_conv = _conv(3, 16)
        self.layer = nn.Sequential(*(_SiluStage(*stage) for stage in stages))
        self.batchnorm = nn.BatchNorm2d(stages[-1][2])
        self.logits = nn.Linear(stages[-1][2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv(x))
        logits: Tensor = self.logits(functional.silu(self.batchnorm(x)).mean((2, 3)))
        return logits


# --- residual networks of 18 layers for 32 x 32 pixels ----------------------------------------------


class _BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, outside, stride=stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = _conv(outside, outside), nn.BatchNorm2d(outside)
        beside: Sequence[nn.Module] = ()
        if stride != 1 or inside != outside:
            beside = (_conv(inside, outside, 1, stride, 0), nn.BatchNorm2d(outside))
        self.shortcut = nn.Sequential(*beside)

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(made + self.shortcut(x))


class _PreActBlock(nn.Module):
    """`early` shortcuts start before the first normalisation, others behind it."""

    def __init__(self, inside: int, outside: int, stride: int, early: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), _conv(inside, outside, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), _conv(outside, outside)
        self.early = early
        self.shortcut: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(_conv(inside, outside, 1, stride, 0))

    def forward(self, x: Tensor) -> Tensor:
        start = functional.relu(self.bn1(x))
        beside: Tensor = x if self.shortcut is None else self.shortcut(x if self.early else start)
        made: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(start))))
        return made + beside


def _layer(block: Any, inside: int, outside: int, stride: int, **more: Any) -> nn.Sequential:
    return nn.Sequential(block(inside, outside, stride, **more), block(outside, outside, 1, **more))


class ResNet18(nn.Module):
    """He et al. 2016 with a 3 x 3 stem and no pooling before the stages, of images (B, 3, 32, 32)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64), nn.BatchNorm2d(64)
        self.layer1 = _layer(_BasicBlock, 64, 64, 1)
        self.layer2 = _layer(_BasicBlock, 64, 128, 2)
        self.layer3 = _layer(_BasicBlock, 128, 256, 2)
        self.layer4 = _layer(_BasicBlock, 256, 512, 2)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class PreActResNet18(nn.Module):
    """The pre-activation kind, of normalised images (B, 3, 32, 32); with `last_norm` a normalisation before the mean,
    and shortcuts that start behind each block's first one."""

    def __init__(self, classes: int, last_norm: bool) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64)
        self.layer1 = _layer(_PreActBlock, 64, 64, 1, early=not last_norm)
        self.layer2 = _layer(_PreActBlock, 64, 128, 2, early=not last_norm)
        self.layer3 = _layer(_PreActBlock, 128, 256, 2, early=not last_norm)
        self.layer4 = _layer(_PreActBlock, 256, 512, 2, early=not last_norm)
        self.bn = nn.BatchNorm2d(512) if last_norm else None
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            x = functional.relu(self.bn(x))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
