"""RobustBench's entries, from files as they were published: names of tensors, wrappings, leftovers.

The names and the arithmetic are written down here a second time, from the published networks, so that the loader is
compared with something that it does not share.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_tools import HTML, serving, sha256
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, linear, pad, relu, silu

from advplug.errors import UsageError
from advplug.registry import registry
from advplug.testing import check_model
from advplug_hub import models, published, robustbench
from advplug_hub.networks import network
from advplug_hub.published import ENTRIES, Entry
from cli_tools import QUICK, run

CIFAR = "fake:n=8,train=16,size=32,channels=3,classes=10"
Shapes = dict[str, tuple[int, ...]]
Files = Callable[[Entry], tuple[dict[str, Tensor], Path]]
PARAMETERS = {
    ("wide", 28, 10): 36_479_194, ("wide", 34, 10): 46_160_474, ("wide-silu", 28, 10): 36_479_194,
    ("wide-silu", 70, 16): 266_796_506, ("resnet18", 18, 1): 11_173_962, ("preact18", 18, 1): 11_171_146,
    ("preact18-bn", 18, 1): 11_172_170,
}  # fmt: skip
"""Of each network that an entry has, counted by hand: published as 36.5, 46.2, 36.5, 266.8 and 11.2 million."""


# --- the published files ---------------------------------------------------------------------------


def norm(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def wide_shapes(depth: int, width: int, silu: bool) -> Shapes:
    """The names of TRADES' wide networks, or of those that came from TensorFlow with SiLU."""
    stem, last, head = ("init_conv", "batchnorm", "logits") if silu else ("conv1", "bn1", "fc")
    first, second, beside = ("batchnorm_{}", "conv_{}", "shortcut") if silu else ("bn{}", "conv{}", "convShortcut")
    at = 0 if silu else 1
    shapes: Shapes = {f"{stem}.weight": (16, 3, 3, 3)}
    inside = 16
    for stage, outside in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            place = f"layer.{stage}.block.{block}" if silu else f"block{stage + 1}.layer.{block}"
            shapes |= norm(f"{place}.{first.format(at)}", inside)
            shapes[f"{place}.{second.format(at)}.weight"] = (outside, inside, 3, 3)
            shapes |= norm(f"{place}.{first.format(at + 1)}", outside)
            shapes[f"{place}.{second.format(at + 1)}.weight"] = (outside, outside, 3, 3)
            if block == 0 and inside != outside:
                shapes[f"{place}.{beside}.weight"] = (outside, inside, 1, 1)
            inside = outside
    return shapes | norm(last, inside) | {f"{head}.weight": (10, inside), f"{head}.bias": (10,)}


def small_shapes(kind: str) -> Shapes:
    """The names of the networks of 18 layers."""
    pre = kind != "resnet18"
    shapes: Shapes = {"conv1.weight": (64, 3, 3, 3)} | ({} if pre else norm("bn1", 64))
    inside = 64
    for layer, outside in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            place = f"layer{layer}.{block}"
            shapes |= norm(f"{place}.bn1", inside if pre else outside) | norm(f"{place}.bn2", outside)
            shapes[f"{place}.conv1.weight"] = (outside, inside, 3, 3)
            shapes[f"{place}.conv2.weight"] = (outside, outside, 3, 3)
            if inside != outside:
                shapes[f"{place}.shortcut.0.weight"] = (outside, inside, 1, 1)
                shapes |= {} if pre else norm(f"{place}.shortcut.1", outside)
            inside = outside
    shapes |= norm("bn", 512) if kind == "preact18-bn" else {}
    return shapes | {"linear.weight": (10, 512), "linear.bias": (10,)}


def shapes_of(entry: Entry) -> Shapes:
    if entry.family.startswith("wide"):
        return wide_shapes(entry.depth, entry.width, entry.family == "wide-silu")
    return small_shapes(entry.family)


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Weights under which signals neither die nor explode, statistics that are not those of a fresh network."""
    draws = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        made = torch.rand(shape, generator=draws)
        if len(shape) > 1:
            made = torch.empty(shape).normal_(generator=draws) / made[0].numel() ** 0.5
        elif name.endswith(("bias", "running_mean")):
            made = 0.2 * (made - 0.5)
        state[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else made + 0.5 * (len(shape) == 1)
    return state


def published_file(entry: Entry, state: dict[str, Tensor], path: Path) -> Path:
    """What the authors saved: tensors alone or in a checkpoint, from parallel training or not, with leftovers."""
    extra: dict[str, Tensor] = {}
    content: Any = dict(state)
    if entry.family == "wide":  # a stage that is never used
        extra = {n.replace("block1", "sub_block1"): v for n, v in state.items() if n.startswith("block1.")}
        content = {"state_dict": {f"module.{n}": v for n, v in (state | extra).items()}, "epoch": 200}
    elif entry.family == "wide-silu":
        content |= {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    elif entry.family == "preact18":
        content = {n: v for n, v in content.items() if not n.endswith("num_batches_tracked")}
    elif entry.family == "preact18-bn":
        content = {f"model.{n}": v for n, v in content.items()}
        content |= {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
    torch.save(content, path)
    return path


# --- the published arithmetic ----------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """The published networks, straight from their tensors."""

    family: str
    state: dict[str, Tensor]

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (self.state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(x, mean, var, weight, bias)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return conv2d(x, self.state[f"{name}.weight"], None, stride, padding)

    def pre_activation(self, place: str, x: Tensor, stride: int) -> Tensor:
        start = relu(self.bn(f"{place}.bn1", x))
        beside = x
        if f"{place}.shortcut.0.weight" in self.state:
            beside = self.conv(f"{place}.shortcut.0", start if self.family == "preact18-bn" else x, stride, 0)
        made = relu(self.bn(f"{place}.bn2", self.conv(f"{place}.conv1", start, stride)))
        return self.conv(f"{place}.conv2", made) + beside

    def basic(self, place: str, x: Tensor, stride: int) -> Tensor:
        made = relu(self.bn(f"{place}.bn1", self.conv(f"{place}.conv1", x, stride)))
        made = self.bn(f"{place}.bn2", self.conv(f"{place}.conv2", made))
        if f"{place}.shortcut.0.weight" in self.state:
            x = self.bn(f"{place}.shortcut.1", self.conv(f"{place}.shortcut.0", x, stride, 0))
        return relu(made + x)

    def wide(self, place: str, x: Tensor, stride: int) -> Tensor:
        start = relu(self.bn(f"{place}.bn1", x))
        made = relu(self.bn(f"{place}.bn2", self.conv(f"{place}.conv1", start, stride)))
        changes = f"{place}.convShortcut.weight" in self.state
        return self.conv(f"{place}.conv2", made) + (
            self.conv(f"{place}.convShortcut", start, stride, 0) if changes else x
        )

    def smooth(self, place: str, x: Tensor, stride: int) -> Tensor:
        start = silu(self.bn(f"{place}.batchnorm_0", x))
        padded = pad(start, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        made = silu(self.bn(f"{place}.batchnorm_1", self.conv(f"{place}.conv_0", padded, stride, 0)))
        changes = f"{place}.shortcut.weight" in self.state
        return self.conv(f"{place}.conv_1", made) + (self.conv(f"{place}.shortcut", start, stride, 0) if changes else x)

    def blocks(self, block: Any, pattern: str, x: Tensor, stages: range, count: int) -> Tensor:
        for stage in stages:
            for i in range(count):
                x = block(pattern.format(stage, i), x, 2 if i == 0 and stage > stages[0] else 1)
        return x


def logits(entry: Entry, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of pixels in [0, 1]."""
    net = Arithmetic(entry.family, state)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    scaled = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    count = (entry.depth - 4) // 6
    if entry.family == "wide":
        made = net.blocks(net.wide, "block{}.layer.{}", net.conv("conv1", x), range(1, 4), count)
        return linear(relu(net.bn("bn1", made)).mean((2, 3)), state["fc.weight"], state["fc.bias"])
    if entry.family == "wide-silu":
        made = net.blocks(net.smooth, "layer.{}.block.{}", net.conv("init_conv", scaled), range(3), count)
        return linear(silu(net.bn("batchnorm", made)).mean((2, 3)), state["logits.weight"], state["logits.bias"])
    if entry.family == "resnet18":
        made = net.blocks(net.basic, "layer{}.{}", relu(net.bn("bn1", net.conv("conv1", x))), range(1, 5), 2)
    else:
        made = net.blocks(net.pre_activation, "layer{}.{}", net.conv("conv1", scaled), range(1, 5), 2)
        made = relu(net.bn("bn", made)) if entry.family == "preact18-bn" else made
    return linear(made.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def narrow(entry: Entry) -> Entry:
    """Wide networks with few channels and two blocks a stage, so that a test is quick."""
    return replace(entry, depth=16, width=1) if entry.family.startswith("wide") else entry


def name_of(entry: Entry) -> str:
    return f"{entry.name} {entry.norm}"


# --- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """State and file of an entry; those of one family share them."""
    folder = tmp_path_factory.mktemp("published")

    @cache
    def of(family: str, depth: int, width: int) -> tuple[dict[str, Tensor], Path]:
        entry = next(replace(e, depth=depth, width=width) for e in ENTRIES if e.family == family)
        state = random_state(shapes_of(entry))
        return state, published_file(entry, state, folder / f"{family}.pt")

    return lambda entry: of(entry.family, entry.depth, entry.width)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_every_entry_is_built_from_a_file_in_the_published_format(entry: Entry, files: Files) -> None:
    small = narrow(entry)
    state, path = files(small)
    model = robustbench.build(small, path, None, None, offline=True).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made, expected = model(x), logits(small, state, x)
    assert made.std() > 0.01
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert f"{entry.robust:.2f} % robust at {'L-inf' if entry.norm == 'linf' else 'L2'} {entry.eps}" in model.notes[0]
    assert f"{entry.clean:.2f} % clean for {entry.name}" in model.notes[0]


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_every_entry_has_the_tensors_of_the_published_size(entry: Entry) -> None:
    with torch.device("meta"):
        net = network(entry.family, entry.depth, entry.width)
    assert {n: tuple(v.shape) for n, v in net.state_dict().items()} == shapes_of(entry)
    count = sum(p.numel() for p in net.parameters())
    assert count == PARAMETERS[entry.family, entry.depth, entry.width]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", PARAMETERS, ids=str)
def test_every_entry_loads_in_full_size(kind: tuple[str, int, int], tmp_path: Path) -> None:
    same = [e for e in ENTRIES if (e.family, e.depth, e.width) == kind]
    path = published_file(same[0], random_state(shapes_of(same[0])), tmp_path / "w.pt")
    x = torch.rand(1, 3, 32, 32)
    for entry in same:
        source = models.robustbench(entry.name, entry.norm, path)
        with torch.no_grad():
            assert source.build(registry_info()).eval()(x).isfinite().all()
    path.unlink()  # up to a gigabyte


@cache
def registry_info() -> Any:
    entry = registry().get("dataset", "fake")
    return entry.make({p.name: p.default for p in entry.params()}).info()


def test_the_table_has_no_two_rows_of_a_name_and_budget_norm() -> None:
    assert len(ENTRIES) == len({name_of(e) for e in ENTRIES}) == len({e.drive for e in ENTRIES}) == 22
    assert all(0 <= e.robust < e.clean < 100 for e in ENTRIES)


@pytest.fixture
def carmon(files: Files, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a network with few channels, which the table then lists."""
    monkeypatch.setattr(published, "ENTRIES", tuple(map(narrow, ENTRIES)))
    return files(published.entry("Carmon2019Unlabeled", "linf"))[1]


def test_the_published_figure_stands_beside_the_measured_one(carmon: Path, tmp_path: Path) -> None:
    model = f"robustbench:Carmon2019Unlabeled,weights={carmon}"
    command = ("eval", "-m", model, "-a", "fgsm", "-e", "8/255", "-n", "4", "--dataset", CIFAR, *QUICK, "-o", tmp_path)
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert "note: fgsm on robustbench:Carmon2019Unlabeled" in ran.out
    told = "RobustBench lists 59.53 % robust at L-inf 8/255 and 89.69 % clean for Carmon2019Unlabeled, undefended"
    assert told in ran.out
    (cell,) = run(*command, "--json").json["cells"]  # from the store
    assert cell["metrics"]["clean_accuracy"]["n"] == 4
    assert any(told in note for note in cell["notes"])


def test_conforms(carmon: Path) -> None:
    results = check_model("robustbench", name="Carmon2019Unlabeled", weights=carmon, on="fake")
    assert [r.name for r in results if not r.ok] == []
    assert "input gradients" in {r.name for r in results}


def test_fetched_held_to_its_sha256_and_then_used_offline(
    carmon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "hub" / "robustbench" / "Carmon2019Unlabeled-linf.pt"
    entry, content = published.entry("Carmon2019Unlabeled", "linf"), carmon.read_bytes()
    with pytest.raises(UsageError, match=f"are not at {place} and --offline forbids the download; fetch it elsewhere"):
        robustbench.build(entry, None, None, None, offline=True)
    with serving() as site:
        url = f"{site.address}/file"
        site.files["/file"] = HTML
        with pytest.raises(
            UsageError, match=r"for robustbench:Carmon2019Unlabeled is an HTML or XML page, not weights"
        ):
            robustbench.build(entry, None, url, None, offline=False)
        site.files["/file"] = content
        with pytest.raises(UsageError, match="as asked for"):
            robustbench.build(entry, None, url, sha256(HTML), offline=False)
        first = robustbench.build(entry, None, url, sha256(content), offline=False).state_dict()
    second = robustbench.build(entry, None, None, None, offline=True).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert place.read_bytes() == content
    place.write_bytes(content + b"\0")
    with pytest.raises(UsageError, match=rf"{place} is not the file that .*lock.json recorded"):
        robustbench.build(entry, None, url, None, offline=True)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("Wong2020Fats", "no entry of RobustBench's is known here as 'Wong2020Fats'; did you mean 'Wong2020Fast'?"),
        ("nonsense", "no entry of RobustBench's is known here as 'nonsense'; it has Standard, Carmon2019Unlabeled"),
        ("Wong2020Fast,norm=l2", "RobustBench's 'Wong2020Fast' is for linf; write norm=linf"),
        ("Wong2020Fast,weights=none.pt,url=x", "say twice where the file comes from"),
        ("Wong2020Fast,weights=none.pt", "there is no weights file none.pt"),
        ("Wong2020Fast,sha256=12", "'12' is no SHA-256; write its 64 hexadecimal digits"),
    ],
)
def test_bad_references_end_in_one_line(reference: str, words: str) -> None:
    ran = run("eval", "-m", f"robustbench:{reference}", "--dataset", CIFAR, "-a", "fgsm")
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_other_data_than_cifar_10_is_refused_with_what_fits(carmon: Path, tmp_path: Path) -> None:
    ran = run("eval", "-m", f"robustbench:Carmon2019Unlabeled,weights={carmon}", "-a", "fgsm", "--dataset", "digits",
              "-o", tmp_path)  # fmt: skip
    assert ran.code == 2
    assert "Carmon2019Unlabeled is a model of CIFAR-10: 10 classes, RGB images of 32 x 32 px; use cifar10" in ran.err


class Attack:
    """What a pickle can do to those who load it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    entry = published.entry("Wong2020Fast", "linf")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Attack(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds Python objects that only run code can restore"):
        robustbench.build(entry, tmp_path / "w.pt", None, None, offline=True)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_told_apart(carmon: Path, tmp_path: Path) -> None:
    smooth = published.entry("Wang2023Better_WRN-28-10", "linf")
    with pytest.raises(UsageError, match=r"does not fit the model: .* missing \(such as init_conv\.weight\)"):
        robustbench.build(smooth, carmon, None, None, offline=True)
    content = torch.load(carmon, weights_only=True)
    content["state_dict"] |= {"module.fc.weight": torch.zeros(100, 64), "module.fc.bias": torch.zeros(100)}
    torch.save(content, tmp_path / "hundred.pt")
    entry = published.entry("Carmon2019Unlabeled", "linf")
    with pytest.raises(UsageError, match=r"2 of \d+ tensors have another shape"):
        robustbench.build(entry, tmp_path / "hundred.pt", None, None, offline=True)


def test_plans_need_neither_torch_nor_the_file() -> None:
    code = (
        "import sys; from advplug.cli import main\n"
        f"sys.argv = ['advplug', 'eval', '-m', 'robustbench:Carmon2019Unlabeled', '--dataset', '{CIFAR}', '-a', 'fgsm',"
        " '--dry-run']\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
