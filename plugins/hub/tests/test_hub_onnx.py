"""ONNX files as victims: the same answers and the same gradients as the network that was exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from advplug.contracts import DatasetInfo
from advplug.errors import UsageError
from advplug.testing import check_model
from advplug_hub import models, onnx_build, onnx_files
from cli_tools import QUICK, TINY, run

INFO = DatasetInfo(("a", "b", "c", "d"), 1, (8, 8), {})
Save = Callable[..., Path]


class Small(nn.Module):
    """Convolution, batch norm, a residual sum, pooling and a linear layer; smooth, so that differences are clean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        x = (x + self.second(x)).tanh()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def small() -> nn.Module:
    torch.manual_seed(0)
    net = Small()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.2, 0.2)
        net.norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def twin() -> nn.Module:
    return Small()


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Exports a network: by torch's exporter of today, which needs onnxscript, or the one before (`old`)."""
    folder = tmp_path_factory.mktemp("onnx")

    def export(net: nn.Module, name: str, batch: int | None = None, x: Tensor | None = None, old: bool = False) -> Path:
        path = folder / name
        x = images(batch or 2) if x is None else x
        how: dict[str, Any] = {"dynamo": False, "input_names": ["x"], "opset_version": 13}
        if not old:
            pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
            how = {"dynamo": True, "external_data": False, "verbose": False}
        if batch is None:
            how |= {"dynamic_axes": {"x": {0: "n"}}} if old else {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of themselves
            torch.onnx.export(net, (x,), path, **how)
        return path

    return export


@pytest.fixture(scope="module")
def exported(save: Save) -> Path:
    return save(small(), "small.onnx")


def logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = net(x)
    return answers


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (made,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    return made


# --- the same network ------------------------------------------------------------------------------


def test_logits_and_gradients_are_those_of_the_exported_network(exported: Path) -> None:
    net, x = small(), images()
    loaded = models.onnx(exported).build(INFO).eval()
    torch.testing.assert_close(logits(loaded, x), logits(net, x), rtol=1e-5, atol=1e-6)
    made = gradient(loaded, x)
    torch.testing.assert_close(made, gradient(net, x), rtol=1e-4, atol=1e-7)
    # Against finite differences of the loaded network, in double precision, along single pixels.
    loaded, step = loaded.double(), 1e-5
    for at in ((0, 0, 0, 0), (1, 0, 3, 4), (2, 0, 7, 7)):
        shift = torch.zeros_like(x, dtype=torch.float64)
        shift[at] = step
        up, down = (logits(loaded, x.double() + sign * shift)[at[0], 1] for sign in (1, -1))
        assert float(made[at]) == pytest.approx(float((up - down) / (2 * step)), rel=1e-4, abs=1e-8)


def test_normalisation_is_inside(exported: Path) -> None:
    loaded = models.onnx(exported, mean=(0.4,), std=(0.2,)).build(INFO).eval()
    x = images()
    torch.testing.assert_close(logits(loaded, x), logits(small(), (x - 0.4) / 0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("old", [False, True])
def test_a_network_for_one_image_takes_any_number(save: Save, old: bool) -> None:
    loaded = models.onnx(save(small(), f"one-{old}.onnx", batch=1, old=old)).build(INFO).eval()
    torch.testing.assert_close(logits(loaded, images(5)), logits(small(), images(5)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(loaded, images(5)), gradient(small(), images(5)), rtol=1e-4, atol=1e-7)


def test_a_last_softmax_is_taken_off_and_said(save: Save) -> None:
    path = save(nn.Sequential(small(), nn.Softmax(1)), "softmax.onnx")
    loaded: Any = models.onnx(path).build(INFO).eval()
    torch.testing.assert_close(logits(loaded, images()), logits(small(), images()), rtol=1e-5, atol=1e-6)
    assert loaded.notes == (onnx_build.SOFTMAX,)
    ran = run("eval", "-m", f"onnx:{path}", "--dataset", TINY, "-a", "fgsm", *QUICK, "-o", path.parent / "out")
    assert ran.code == 0, ran.err
    assert onnx_build.SOFTMAX in ran.out


def test_a_torchvision_network_passes_too(save: Save) -> None:
    from advplug.vision import import_torchvision

    torch.manual_seed(0)
    net = import_torchvision().models.resnet18(num_classes=4).eval()
    x = torch.rand(2, 3, 32, 32)
    path = save(net, "resnet18.onnx", x=x, old=True)
    # Fresh batch norms are alike: the exporter stores one and puts Identity nodes for the others.
    assert any(node.op_type == "Identity" for node in onnx.load(str(path)).graph.node)
    loaded = models.onnx(path).build(replace(INFO, channels=3, size=(32, 32))).eval()
    torch.testing.assert_close(logits(loaded, x), logits(net, x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient(loaded, x), gradient(net, x), rtol=1e-2, atol=1e-5)


# --- Identity of initialisers ----------------------------------------------------------------------


def shared(path: Path) -> Path:
    """Exporters that store equal tensors once leave Identity nodes in place of the others; here by hand.

    Two 1 x 1 convolutions of one kernel, the second reached through two Identity nodes, then a sum over the pixels.
    """
    kernel = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(2)) / 2
    first = torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    weights = [numpy_helper.from_array(t.numpy(), n) for t, n in ((first, "first"), (kernel, "kernel"))]
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node("Identity", ["kernel"], ["copy"]),
        helper.make_node("Identity", ["copy"], ["again"]),
        helper.make_node("Conv", ["a", "kernel"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "again"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_identity_of_an_initialiser_is_looked_through(tmp_path: Path) -> None:
    from onnx2torch import convert

    path = shared(tmp_path / "shared.onnx")
    with pytest.raises(Exception, match=r".*"):  # what the library makes of it alone
        convert(onnx.load(str(path)))
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(str(path)).graph.initializer}
    x = images()

    def expected(x: Tensor) -> Tensor:
        inner = nn.functional.conv2d(nn.functional.conv2d(x, held["first"]), held["kernel"]).tanh()
        return nn.functional.conv2d(inner, held["kernel"]).mean((2, 3))

    loaded = models.onnx(path).build(INFO).eval()
    torch.testing.assert_close(logits(loaded, x), expected(x), rtol=1e-5, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(expected(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(gradient(loaded, x), wanted, rtol=1e-5, atol=1e-7)


# --- as a victim -----------------------------------------------------------------------------------


def test_is_attacked_with_gradients(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("eval", "-m", f"onnx:{exported}", "--dataset", TINY, "-a", "fgsm", "-a", "pgd:steps=3", "-e", "0.5",
              *QUICK, "-o", tmp_path / "out", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    cells = ran.json["cells"]
    assert [c["status"] for c in cells] == ["ok", "ok"]
    assert all(c["passes"]["backward"] > 0 for c in cells)
    # The same network from its own weights comes to the same figures.
    torch.save(small().state_dict(), tmp_path / "w.pt")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    twin = run("eval", "-m", f"py:test_hub_onnx:twin,weights={tmp_path}/w.pt", "--dataset", TINY, "-a", "fgsm", "-a",
               "pgd:steps=3", "-e", "0.5", *QUICK, "-o", tmp_path / "twin", "--json")  # fmt: skip
    assert twin.code == 0, twin.err
    for one, other in zip(cells, twin.json["cells"], strict=True):
        for name in ("clean_accuracy", "robust_accuracy"):
            assert one["metrics"][name]["value"] == other["metrics"][name]["value"]


def test_conforms(exported: Path, save: Save) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 900, 10))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.net(x)
            return made

    path = save(Wide().eval(), "fake.onnx", x=torch.rand(2, 3, 32, 32))
    results = check_model("onnx", path=path, on="fake")
    assert [r.name for r in results if not r.ok] == []


def test_fits_are_told_before_anything_is_built(exported: Path) -> None:
    source = models.onnx(exported)
    assert source.misfit(INFO) is None
    for info, words in (
        (replace(INFO, classes=tuple("abc")), "small.onnx tells 4 classes apart, the dataset has 3"),
        (replace(INFO, channels=3), "takes images of 1 channels, the dataset's have 3"),
        (replace(INFO, size=(9, 8)), "takes images of 8 x 8 px, the dataset's have 9 x 8"),
    ):
        assert words in str(source.misfit(info))
    assert "mean has 3 numbers for 1 channels" in str(models.onnx(exported, mean=(1.0, 1.0, 1.0)).misfit(INFO))


def test_plans_need_no_torch(exported: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from advplug.cli import main\n"
        f"sys.argv = ['advplug', 'eval', '-m', 'onnx:{exported}', '--dataset', '{TINY}', '-a', 'fgsm', '--dry-run']\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def value(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def flatten(*shape: int | str) -> Any:
    return model_of([helper.make_node("Flatten", ["x"], ["y"])], [value("x", *shape)], [value("y", "n", "k")])


def add() -> Any:
    return model_of([helper.make_node("Add", ["x", "z"], ["y"])], [value("x", 1), value("z", 1)], [value("y", 1)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (add, "has 2 inputs (x, z); a classifier has one"),
        (lambda: flatten("n", 64), "takes no images"),
        (lambda: flatten(7, 1, 8, 8), "was exported for batches of 7 images"),
        (lambda: flatten("n", 8, 8, 1), "takes images (B, H, W, C); export it for (B, C, H, W)"),
        (lambda: flatten("n", 1, 8, 8), "must give logits of shape (2, 4) for two images, got (2, 64)"),
        (lambda: b"not onnx at all", "is no ONNX model that can be read"),
        (lambda: b"<html>sign in</html>", "is an HTML or XML page"),
        (lambda: b"", "is empty"),
    ],
)
def test_files_that_cannot_be_used_end_in_one_line(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    content = make()
    path = tmp_path / "m.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    ran = run("eval", "-q", "-m", f"onnx:{path}", "--dataset", TINY, "-a", "fgsm", *QUICK, "-o", tmp_path / "out")
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert ran.err.count("\n") == 1


def test_weights_outside_the_file_are_refused(exported: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(str(exported)), str(tmp_path / "m.onnx"), save_as_external_data=True, size_threshold=0)
    with pytest.raises(UsageError, match="keeps its weights in further files; save it as one"):
        models.onnx(tmp_path / "m.onnx")


def test_a_truncated_file_is_told(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(exported.read_bytes()[:-40])
    with pytest.raises(UsageError, match="is no ONNX model that can be read"):
        models.onnx(tmp_path / "m.onnx")


def test_the_identity_is_that_of_the_file(exported: Path) -> None:
    identity = models.onnx(exported).identity()
    assert identity["sha256"] == onnx_files.digest(exported)
    assert json.dumps(identity)
