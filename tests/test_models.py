"""Models by name, with weights, from files and from own code, for whatever a dataset's images look like."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advplug.builtin import nets, pretrained
from advplug.builtin.architectures import CUSTOM, TORCHVISION, architecture, tags
from advplug.builtin.imagenet import class_table
from advplug.builtin.models import MODELS, SGD_FACTOR
from advplug.contracts import DatasetInfo, ModelSource
from advplug.errors import UnknownNameError, UsageError
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.vision import import_torchvision
from conftest import python

NAMES = (*CUSTOM, *TORCHVISION)


def source(text: str) -> Any:
    reference = parse_reference(text)
    entry = registry().get("model", reference.name)
    return entry.make(entry.bind(reference))


def info(channels: int = 3, size: int | tuple[int, int] = 32, classes: int = 7, **more: Any) -> DatasetInfo:
    shape = (size, size) if isinstance(size, int) else size
    return DatasetInfo(tuple(f"class {i}" for i in range(classes)), channels, shape, {"linf": Fraction(1, 10)}, **more)


def images(of: DatasetInfo, n: int = 2) -> torch.Tensor:
    return torch.rand(n, of.channels, *of.size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model.eval()(x)
    return out


# --- names and facts -------------------------------------------------------------------------------


def test_the_list_is_torchvisions() -> None:
    models = import_torchvision().models
    assert list(TORCHVISION) == models.list_models(module=models)
    assert [m.name for m in MODELS] == [*NAMES, "torchvision", "finetuned", "file", "py"]


def test_the_tags_are_torchvisions() -> None:
    models = import_torchvision().models
    for name in TORCHVISION:
        known = {w.name for w in models.get_model_weights(name) if w.meta["categories"]}
        assert set(tags(name)) == known | {"DEFAULT"}, name


@pytest.mark.parametrize(
    "name",
    ["cnn", "cnn-a", "cnn-b", "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
     "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18",
     "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn",
     "vgg11", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet50_2"],
)  # fmt: skip
def test_every_familys_first_and_last_layer(name: str) -> None:
    arch = architecture(name)
    with torch.device("meta"):
        net = nets.bare(arch, 3, arch.input_size((32, 32)), 7)
    assert next(n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)) == arch.stem
    head = net.get_submodule(arch.head)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.weight.shape[0] == 7
    if arch.name in CUSTOM and arch.flat_features((32, 32)):
        layer, width = arch.flat_features((32, 32)) or ("", 0)
        assert net.get_submodule(layer).in_features == width
    with_norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert (arch.rate >= 2e-3) == ((with_norm and name != "maxvit_t") or name == "cnn-a")


def test_names_and_sources_need_no_torch(tmp_path: Path) -> None:
    save_file(architecture_state("cnn"), tmp_path / "w.safetensors")
    torch.save(architecture_state("cnn"), tmp_path / "w.pt")
    (tmp_path / "own.py").write_text("import torch\n")
    code = """
import sys
from advplug.contracts import DatasetInfo
from advplug.parse import parse_reference
from advplug.registry import registry
info = DatasetInfo(("a", "b"), 1, (28, 28), {})
for text in sys.argv[1:]:
    reference = parse_reference(text)
    entry = registry().get("model", reference.name)
    made = entry.make(entry.bind(reference))
    entry.describe(), made.identity(), made.misfit(info), made.schedule(info)
assert not {"torch", "torchvision"} & set(sys.modules)
"""
    done = python(
        "-c", code, "resnet18:epochs=2", "torchvision:resnet50@DEFAULT", f"file:{tmp_path / 'w.safetensors'}#arch=cnn",
        f"file:{tmp_path / 'w.pt'}#arch=cnn", "py:own:net", site=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_told() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        source("resnt18")
    with pytest.raises(UnknownNameError, match="no architecture is called 'vgg_11'; did you mean 'vgg11'"):
        architecture("vgg_11")
    with pytest.raises(UsageError, match="no classifier called 'renset50'; did you mean 'resnet50'"):
        source("torchvision:renset50@DEFAULT")
    with pytest.raises(UsageError, match="no weights tagged 'IMAGENET1K_V3'; write resnet18@DEFAULT or @IMAGENET1K_V1"):
        source("torchvision:resnet18@IMAGENET1K_V3")
    with pytest.raises(UsageError, match="'file' needs its parameter 'arch'"):
        source("file:w.pt")
    for wrong in ("epochs=0", "lr=0", "batch_size=1", "optimizer=adam", "seed=-1"):
        with pytest.raises(UsageError):
            source(f"resnet18:{wrong}")


# --- built for a dataset ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "cnn-a", "cnn-b", "resnet18", "mobilenet_v3_small", "densenet121", "vgg11",
                                  "shufflenet_v2_x0_5", "squeezenet1_0"])  # fmt: skip
@pytest.mark.parametrize("size", [32, (28, 20)])
def test_models_take_channels_size_and_classes(name: str, size: int | tuple[int, int]) -> None:
    wanted = info(1, size)
    made: ModelSource = source(name)
    assert made.misfit(wanted) is None
    model = made.build(wanted)
    x = images(wanted)
    assert logits(model, x).shape == (2, 7)
    model.train()(x).sum().backward()
    first = model.get_submodule(f"net.{architecture(name).stem}")
    assert first.in_channels == 1
    assert first.weight.grad.abs().sum() > 0


def test_small_images_are_scaled_inside_the_model() -> None:
    model = source("inception_v3").build(info(1, (40, 60)))
    assert [n for n, _ in model.named_children()] == ["resize", "normalise", "net"]
    assert model.resize(torch.rand(1, 1, 40, 60)).shape == (1, 1, 75, 112)
    assert architecture("vit_b_16").input_size((28, 40)) == (48, 48)
    assert architecture("maxvit_t").input_size((32, 300)) == (224, 448)
    assert architecture("resnet18").input_size((5, 9)) == (5, 9)
    x = torch.rand(1, 1, 10, 10).requires_grad_()
    assert torch.autograd.grad(nets.Resized((20, 20))(x).sum(), x)[0].allclose(torch.full((10, 10), 4.0))
    assert logits(source("cnn-a").build(info(2, 8, 3)), torch.rand(2, 2, 8, 8)).shape == (2, 3)


def test_normalisation_is_inside() -> None:
    model = nets.classifier(nn.Flatten(), (0.25, 0.5), (0.5, 2.0))
    x = torch.tensor([0.75, 1.0]).view(1, 2, 1, 1)
    assert model(x).tolist() == [[1.0, 0.25]]
    assert model(x.double()).dtype == torch.float64
    assert model.state_dict() == {}
    assert [n for n, _ in nets.classifier(nn.Flatten()).named_children()] == ["net"]


def test_weights_follow_the_stream_and_the_seed() -> None:
    def built(text: str, seed: int = 0) -> torch.Tensor:
        with Stream(seed, "init").as_global():
            weight: torch.Tensor = source(text).build(info()).net.fc.weight
        return weight

    before = torch.get_rng_state()
    first = built("cnn")
    assert torch.equal(first, built("cnn"))
    assert not torch.equal(first, built("cnn:seed=1"))
    assert not torch.equal(first, built("cnn", seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_schedules() -> None:
    made = source("resnet18:epochs=3,optimizer=sgd,lr=0.07,batch_size=32,seed=4").schedule(info(flip=True))
    assert (made.epochs, made.optimizer, made.lr, made.batch_size, made.seed) == (3, "sgd", 0.07, 32, 4)
    assert (made.flip, made.shift) == (True, 4)
    plain = source("resnet18").schedule(info(1, 28))
    assert (plain.epochs, plain.optimizer, plain.flip, plain.shift) == (5, "adamw", False, 1)
    assert source("resnet18:optimizer=sgd").schedule(info()).lr == SGD_FACTOR * plain.lr
    assert source("vgg11").schedule(info()).lr < plain.lr


def test_data_that_cannot_be_trained_on() -> None:
    assert "no training images" in source("resnet18").misfit(info(trainable=False))
    assert "the dataset holds text data" in source("cnn").misfit(info(modality="text"))
    assert "no training images" in source("torchvision:resnet18@DEFAULT").misfit(info(trainable=False))


# --- pretrained ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of torch's download cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def planted(hub: Path, name: str) -> nn.Module:
    """An architecture with fresh weights where torchvision looks for its downloaded ones."""
    models = import_torchvision().models
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = models.get_model(name, weights=None, **options).eval()
    hub.mkdir(parents=True)
    torch.save(net.state_dict(), hub / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2])
    return net


def imagenet(classes: list[str], channels: int = 3, size: int = 64) -> DatasetInfo:
    return DatasetInfo(tuple(classes), channels, (size, size), {})


def test_imagenet_keeps_the_head(hub: Path) -> None:
    net = planted(hub, "squeezenet1_1")
    made = source("torchvision:squeezenet1_1@DEFAULT")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.rand(2, 3, 64, 64)
    expected = logits(net, (x - mean) / std)
    everything = imagenet([wnid for wnid, _ in class_table()])
    assert made.schedule(everything) is None
    torch.testing.assert_close(logits(made.build(everything), x), expected)
    some = imagenet(["tench", "n01443537", "toilet tissue"])
    assert made.schedule(some) is None
    assert made.misfit(some) is None
    torch.testing.assert_close(logits(made.build(some, offline=True), x), expected[:, [0, 1, 999]])


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "mobilenet_v3_small"])
def test_other_classes_and_channels_get_new_layers(hub: Path, name: str) -> None:
    net = planted(hub, name)
    arch, wanted = architecture(name), info(1, 64)
    made = source(f"torchvision:{name}@DEFAULT")
    assert made.schedule(wanted).lr < source("resnet18").schedule(wanted).lr
    model = made.build(wanted)
    assert logits(model, images(wanted)).shape == (2, 7)
    model.train()
    model(images(wanted)).sum().backward()
    old, new = net.get_submodule(arch.stem), model.net.get_submodule(arch.stem)
    torch.testing.assert_close(new.weight, old.weight.sum(1, keepdim=True))
    x = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(new(x), old(x.expand(1, 3, 9, 9)), rtol=1e-4, atol=1e-5)


def test_weights_of_one_size_scale_the_images(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrained._resize(architecture("vit_b_16"), 384, info(3, 32)) == (384, 384)
    assert pretrained._resize(architecture("vit_b_16"), 224, info(3, 224)) is None
    assert pretrained._resize(architecture("resnet18"), 224, info(3, 32)) is None


def test_weights_that_cannot_be_had(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, wanted = source("torchvision:squeezenet1_1@IMAGENET1K_V1"), info()
    path = hub / "squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(UsageError, match=r"--offline forbids the download; .*curl -L --create-dirs -o .* https:") as e:
        made.build(wanted, offline=True)
    assert str(path) in str(e.value)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error\n no route>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UsageError, match=r"cannot be fetched to .* no route>.*curl"):
        made.build(wanted)
    path.write_bytes(b"<html>sign in</html>")
    with pytest.raises(UsageError, match="HTML or XML page"):
        made.build(wanted)


# --- from a file -----------------------------------------------------------------------------------


def architecture_state(name: str, channels: int = 1, size: int = 28, classes: int = 2) -> dict[str, torch.Tensor]:
    arch = architecture(name)
    return nets.bare(arch, channels, arch.input_size((size, size)), classes).state_dict()


@pytest.mark.parametrize("name", ["cnn", "cnn-a", "cnn-b", "resnet18"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_gives_the_same_model(tmp_path: Path, name: str, kind: str) -> None:
    wanted = info(1, 28, 5)
    trained = source(name).build(wanted)
    path = tmp_path / f"w.{kind}"
    state = {f"module.{n}": v for n, v in trained.net.state_dict().items()}
    if kind == "pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    key = ",key=state_dict" if kind == "pt" else ""
    made = source(f"file:{path}#arch={name},mean=0.5,std=0.25,strip=module.{key}")
    assert made.misfit(wanted) is None
    assert made.schedule(wanted) is None
    assert made.identity()["sha256"]
    x = images(wanted)
    torch.testing.assert_close(logits(made.build(wanted), x), logits(trained, x))


def test_what_does_not_fit_a_file(tmp_path: Path) -> None:
    def reason(arch: str, wanted: DatasetInfo, more: str = "", **shape: int) -> str:
        path = tmp_path / "w.safetensors"
        save_file(architecture_state(arch, **shape), path)
        told = source(f"file:{path}#arch={arch}{more}").misfit(wanted)
        assert told is not None
        return str(told)

    fitting = info(1, 28, 2)
    assert reason("cnn", info(1, 28, 10)).startswith("w.safetensors tells 2 classes apart, the dataset has 10; use")
    assert "takes grayscale images, the dataset's are RGB; use" in reason("cnn", info(3, 28, 2))
    assert "another image size than 32 x 32 px" in reason("cnn-b", info(1, 32, 2))
    assert "mean has 3 numbers" in reason("cnn", fitting, ",mean=0.1:0.2:0.3,std=1")
    assert "holds text data" in reason("cnn", info(1, 28, 2, modality="text"))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"module.{n}": v for n, v in architecture_state("cnn").items()}, path)
    with pytest.raises(UsageError, match=r"no tensor features.0.0.weight, which arch=cnn needs; write strip=module\.$"):
        source(f"file:{path}#arch=cnn")
    with pytest.raises(UsageError, match="no architecture is called 'cnnn'; did you mean"):
        source(f"file:{path}#arch=cnnn")
    with pytest.raises(UsageError, match="no weights file"):
        source(f"file:{tmp_path / 'v.safetensors'}#arch=cnn")
    state = architecture_state("cnn-b")
    del state["classifier.0.bias"]
    save_file(state, path)
    with pytest.raises(UsageError, match="1 missing"):
        source(f"file:{path}#arch=cnn-b").build(info(1, 28, 2))


def test_a_transformers_size_follows_from_its_file(tmp_path: Path) -> None:
    # The three tensors that say it; the real file holds 350 MB.
    tensors = {
        "conv_proj.weight": torch.zeros(2, 3, 1, 1),
        "heads.head.weight": torch.zeros(2, 4),
        "encoder.pos_embedding": torch.zeros(1, 10, 4),
    }
    save_file(tensors, tmp_path / "w")
    made = source(f"file:{tmp_path / 'w'}#arch=vit_b_32")
    assert made.misfit(info(3, 96, 2)) is None
    assert made.misfit(info(3, 80, 2)) is None
    assert made.misfit(info(3, 128, 2)).startswith("w takes 96 px images, the dataset's have 128 px; use")


# --- own code --------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=4, channels=1):
        super().__init__(nn.Flatten(), nn.Linear(channels * 64, classes))

def plain():
    return Net()

def wrong():
    return "no module"

def broken():
    raise ValueError("not\\n today")

def wide(classes, width, depth=2):
    return Net()

def lost():
    class Lost(nn.Module):
        def forward(self, x):
            raise ValueError("never")
    return Lost()

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with own.py in it, the current one."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / name


def test_own_code_without_weights_is_trained(own: Path) -> None:
    wanted = info(2, 8, 5)
    made = source(f"py:{own.name}:Net#epochs=2,mean=0.5,std=0.5")
    assert made.misfit(wanted) is None
    assert made.schedule(wanted).epochs == 2
    assert logits(made.build(wanted), images(wanted)).shape == (2, 5)
    before = made.identity()
    own.with_suffix(".py").write_text(OWN + "# changed\n")
    assert source(f"py:{own.name}:Net").identity() != before


def test_own_code_with_weights_is_used_as_it_is(own: Path) -> None:
    wanted = info(1, 8, 4)
    net = source(f"py:{own.name}:plain").build(wanted).net
    save_file({f"module.{n}": v for n, v in net.state_dict().items()}, own.with_suffix(".safetensors"))
    made = source(f"py:{own.name}:plain#weights={own.with_suffix('.safetensors')},strip=module.,mean=0.5,std=0.2")
    assert made.schedule(wanted) is None
    x = images(wanted)
    torch.testing.assert_close(logits(made.build(wanted), x), logits(copy.deepcopy(net), (x - 0.5) / 0.2))


def test_own_code_that_does_not_work(own: Path) -> None:
    def fails(text: str, words: str, wanted: DatasetInfo | None = None) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            source(text).build(wanted or info(1, 8, 4))
        assert "\n" not in str(caught.value)

    fails(f"py:{own.name}x:plain", f"no module '{own.name}x' in .*did you mean '{own.name}'")
    fails(f"py:{own.name}:gone", f"'{own.name}' has no 'gone'$")
    fails(f"py:{own.name}:Plain", f"'{own.name}' has no 'Plain'; did you mean 'plain'")
    fails(f"py:{own.name}:wide", r"needs 'width', and only classes, .* are filled in; write a function beside it")
    fails(f"py:{own.name}:wrong", "must return an nn.Module, got a str")
    fails(f"py:{own.name}:broken", "ValueError: not today")
    fails(f"py:{own.name}:pair", "one tensor of logits, got a tuple")
    fails(f"py:{own.name}:plain", "does not take 3 x 8 x 8 images: .*; it takes 1 x 8 x 8 ones$", info(3, 8, 4))
    fails(f"py:{own.name}:plain", "1 x 32 x 32 images: .*; it takes 1 x 8 x 8 ones: write size=8 after", info(1, 32, 4))
    fails(f"py:{own.name}:lost", "does not take 1 x 8 x 8 images: ValueError: never$")
    fails(f"py:{own.name}:plain", r"shape \(2, 4\) for 2 images, the dataset's 9 classes need \(2, 9\)", info(1, 8, 9))
    fails("py:nothing", "no MODULE:FACTORY")
    fails(f"py:{own.name}:plain#weights=gone.pt", "no weights file")
    assert "mean has 2 numbers for 3 channels" in source(f"py:{own.name}:plain#mean=0:0").misfit(info(3, 8, 4))


RESNET20 = """
import torch
from torch import nn
from torch.nn import functional

class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, b // a, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.grow = b - a

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return functional.relu(x + y)

class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (a, b) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            setattr(self, f"layer{i}", nn.Sequential(Block(a, b), Block(b, b), Block(b, b)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
"""


def test_published_weights_reach_their_published_accuracy(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "published_resnet20.py").write_text(RESNET20)
    monkeypatch.chdir(tmp_path)
    weights = data_folder / "weights" / "resnet20_cifar10.th"
    made = source(
        f"py:published_resnet20:ResNet20#weights={weights},mean=0.485:0.456:0.406,std=0.229:0.224:0.225,"
        "strip=module.,key=state_dict"
    )
    with np.load(data_folder / "cifar10_test.npz") as data:
        x = torch.from_numpy(data["x"][:2000]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(data["y"][:2000])
    model = made.build(info(3, 32, 10))
    right = torch.cat([logits(model, part).argmax(1) for part in x.split(250)]) == y
    assert 0.90 < right.float().mean() < 0.935  # 91.73 % of all 10,000; 2,000 images spread by 0.6 points
