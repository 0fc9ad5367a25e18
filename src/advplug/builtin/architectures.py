"""What there is to know of each architecture without building it: names, layers at both ends, input sizes, tags.

Imports no torch; a test compares everything here with torchvision and with the built networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from advplug.errors import UnknownNameError, did_you_mean

CUSTOM = {
    "cnn": "small and fast: 3 x [convolution, batch norm, max-pool], global mean, one linear layer",
    "cnn-a": "LeNet-5 style: two 5x5 convolutions with max-pooling, three linear layers",
    "cnn-b": "3 x [convolution, batch norm, max-pool], two linear layers",
}

_NAMES = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169
    densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
    efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3
    maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
    regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
    regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d
    resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
    squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn
    vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2"""
TORCHVISION: tuple[str, ...] = tuple(_NAMES.split())
"""Every image classifier of torchvision."""


@dataclass(frozen=True)
class Architecture:
    """One network.

    `stem` and `head` are the first convolution and the layer that gives the logits. Images smaller than
    `smallest` are scaled up inside the model; with a `patch`, images are scaled to the next square that it
    divides, with a `grid` each side to its next multiple. `rate` is the
    AdamW learning rate it trains well at; without batch norm it has to be lower.
    """

    name: str
    stem: str
    head: str
    smallest: int = 1
    patch: int = 0
    grid: int = 0
    rate: float = 2e-3

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) the network gets for images of `size`."""
        if self.patch:
            side = math.ceil(max(size) / self.patch) * self.patch
            return side, side
        if self.grid:
            height, width = (math.ceil(n / self.grid) * self.grid for n in size)
            return height, width
        scale = max(1.0, self.smallest / min(size))
        height, width = (max(self.smallest, round(n * scale)) for n in size)
        return height, width

    def flat_features(self, size: tuple[int, int]) -> tuple[str, int] | None:
        """The layer whose width depends on the input size, and that width; None where there is none."""
        height, width = self.input_size(size)
        if self.name == "cnn-a":
            return "classifier.0", 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        if self.name == "cnn-b":
            return "classifier.0", 128 * (height // 8) * (width // 8)
        return None


# By family, the longest matching prefix counts: stem, head, and what else differs from the defaults.
_FAMILIES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("cnn", "features.0.0", "fc", smallest=8, rate=1e-2),
        Architecture("cnn-a", "features.0", "classifier.4", smallest=16, rate=6e-3),
        Architecture("cnn-b", "features.0.0", "classifier.2", smallest=8),
        Architecture("alexnet", "features.0", "classifier.6", smallest=63, rate=5e-4),
        Architecture("convnext", "features.0.0", "classifier.2", smallest=32, rate=5e-4),
        Architecture("densenet", "features.conv0", "classifier", smallest=32),
        Architecture("efficientnet", "features.0.0", "classifier.1"),
        Architecture("googlenet", "conv1.conv", "fc", smallest=15),
        Architecture("inception", "Conv2d_1a_3x3.conv", "fc", smallest=75),
        Architecture("maxvit", "stem.0.0", "classifier.5", grid=224, rate=5e-4),
        Architecture("mnasnet", "layers.0", "classifier.1"),
        Architecture("mobilenet_v2", "features.0.0", "classifier.1"),
        Architecture("mobilenet_v3", "features.0.0", "classifier.3"),
        Architecture("regnet", "stem.0", "fc"),
        Architecture("resnet", "conv1", "fc"),
        Architecture("resnext", "conv1", "fc"),
        Architecture("wide_resnet", "conv1", "fc"),
        Architecture("shufflenet", "conv1.0", "fc"),
        Architecture("squeezenet", "features.0", "classifier.1", smallest=21, rate=5e-4),
        Architecture("swin", "features.0.0", "head", smallest=32, rate=5e-4),
        Architecture("vgg", "features.0", "classifier.6", smallest=32, rate=5e-4),
        Architecture("vit_b_16", "conv_proj", "heads.head", patch=16, rate=5e-4),
        Architecture("vit_b_32", "conv_proj", "heads.head", patch=32, rate=5e-4),
        Architecture("vit_h_14", "conv_proj", "heads.head", patch=14, rate=5e-4),
        Architecture("vit_l_16", "conv_proj", "heads.head", patch=16, rate=5e-4),
        Architecture("vit_l_32", "conv_proj", "heads.head", patch=32, rate=5e-4),
    )
}


@cache
def architecture(name: str) -> Architecture:
    """Raises UnknownNameError with a suggestion where there is no such architecture."""
    known = (*CUSTOM, *TORCHVISION)
    if name not in known:
        hint = did_you_mean(name, known) or (
            "; 'advplug list models' shows all, and one in your own code is py:MODULE:FACTORY,weights=FILE"
        )
        raise UnknownNameError(f"no architecture is called '{name}'{hint}")
    found = _FAMILIES[max((f for f in _FAMILIES if name.startswith(f)), key=len)]
    return replace(found, name=name, rate=Architecture.rate if name.endswith("_bn") else found.rate)


_V2 = (
    "efficientnet_b1", "mobilenet_v2", "mobilenet_v3_large", "regnet_x_", "regnet_y_", "resnet50", "resnet101",
    "resnet152", "resnext101_32x8d", "resnext50_32x4d", "wide_resnet",
)  # fmt: skip
_SWAG = ("regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf", "vit_b_16", "vit_l_16", "vit_h_14")


def tags(name: str) -> tuple[str, ...]:
    """The tags of the ImageNet classifiers that torchvision has for an architecture; DEFAULT is one of them."""
    found = ["DEFAULT"]
    if name not in ("regnet_y_128gf", "vit_h_14"):
        found.append("IMAGENET1K_V1")
    if name.startswith(_V2) and name != "regnet_y_128gf":
        found.append("IMAGENET1K_V2")
    if name in _SWAG:
        found += ["IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_LINEAR_V1"]
    return tuple(found)
