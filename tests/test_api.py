"""`advplug.evaluate`: names and objects of the user's own, the same result as the command line, nothing modified."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import advplug
from advplug import cli
from advplug.errors import UsageError
from advplug.results import RunResult
from cli_tools import CNN, TINY, evaluate, run, stored, without_times
from conftest import ROOT
from usernets import Linear, Nan, Narrow, Raising, Several

G = torch.Generator().manual_seed(0)
X = (torch.rand(12, 1, 8, 8, generator=G) * 255).round() / 255
Y = torch.arange(12) % 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def right(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the labels that the model gives them."""
    with torch.no_grad():
        return X, copy.deepcopy(model).eval()(X).argmax(1)


def attack(model: Any, data: Any = None, **rest: Any) -> RunResult:
    rest = {"audit": "none", "eps": "4/255", "classes": 4, **rest}
    return advplug.evaluate(model, "pgd:steps=3", dataset=data or right(model), **rest)


def test_names_give_what_the_command_line_gives() -> None:
    printed = evaluate("-m", CNN, "-a", "ifgsm", "-d", "prune:epochs=1", "-e", "8/255", "-n", "15")
    mine = advplug.evaluate(CNN, "ifgsm", "prune:epochs=1", dataset=TINY, eps="8/255", n=15, output="mine")
    returned = json.loads(json.dumps(mine.to_json(), allow_nan=False))
    assert without_times(returned) == without_times(printed)
    run_ = {**printed["run"], "command": "advplug.evaluate", "output": "mine", "seconds": returned["run"]["seconds"]}
    assert returned["run"] == run_
    assert stored("mine").keys() == stored("out").keys()
    again = advplug.evaluate(CNN, "ifgsm", "prune:epochs=1", dataset=TINY, eps="8/255", n=15, output="out")
    assert json.loads(json.dumps(again.to_json()))["cells"] == printed["cells"]


def test_a_module_and_tensors() -> None:
    result = attack(Linear())
    (cell,) = result.cells
    assert (cell.model, cell.dataset, cell.status, cell.eps) == ("Linear", "tensors", "ok", "4/255")
    assert cell.metrics["clean_accuracy"].value == 1.0
    assert cell.metrics["clean_accuracy"].n == 12
    assert 0 < cell.metrics["robust_accuracy"].value < 1
    assert not Path("advplug-results").exists()


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=5),
        lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
        lambda x, y: [[x[:5], y[:5]], [x[5:8], y[5:8]], [x[8:], y[8:]]],
        lambda x, y: iter([(x, y)]),
        lambda x, y: [x, y],
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: (x.double(), y.int()),
        lambda x, y: ((x * 255).round().byte(), y),
    ],
    ids=["loader", "two-batches", "lists", "iterator", "list", "numpy", "double", "bytes"],
)
def test_data_in_any_form_is_the_same_data(form: Callable[[Tensor, Tensor], Any]) -> None:
    model = Linear()
    x, y = right(model)
    expected = attack(model, (x, y)).cells[0]
    found = attack(model, form(x, y)).cells[0]
    assert found.metrics == expected.metrics


@pytest.mark.parametrize(
    ("given", "shown"),
    [("8/255", "8/255"), (8 / 255, "8/255"), (0.1, "1/10"), (0, "0"), (1e-7, "1/10000000"), ("l2:0.5", "1/2")],
)
def test_budgets_are_numbers_or_text(given: Any, shown: str) -> None:
    assert attack(Linear(), eps=given).cells[0].eps == shown


class Everything(nn.Module):
    """Batch norm, dropout, a frozen layer, and parameters that hold gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.body[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def state(module: nn.Module) -> Any:
    return (
        {k: v.clone() for k, v in module.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()],
        [m.training for m in module.modules()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules()],
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("training", [True, False])
def test_the_users_things_stay_as_they_are(training: bool) -> None:
    torch.manual_seed(3)
    model = Everything().train(training)
    model.body[2].eval()
    model(X).sum().backward()
    x, y = X.clone(), Y.clone()
    before, draws = state(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    attack(model, (x, y), audit="quick")
    assert same(state(model), before)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (np.random.get_state()[1] == draws[1]).all()
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_model_in_training_mode_is_judged_in_evaluation_mode() -> None:
    torch.manual_seed(3)
    model = Everything()
    x, y = right(model)
    assert attack(model.train(), (x, y)).cells[0].metrics["clean_accuracy"].value == 1.0


def test_several_models_keep_apart() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 16), nn.Linear(16, 4)
    relu, other = (nn.Sequential(nn.Flatten(), layers[0], f, layers[1]) for f in (nn.ReLU(), nn.Hardtanh(-1, 0)))
    data = right(relu)
    result = attack([relu, other, Linear(), relu], data)
    assert [c.model for c in result.cells] == ["Sequential", "Sequential#2", "Linear"]
    assert len({c.key for c in result.cells}) == 3
    alone = [attack(m, data).cells[0].metrics for m in (relu, other)]
    assert [c.metrics for c in result.cells[:2]] == alone
    assert alone[0] != alone[1]


class Scaled(Linear):
    """Its weights do not tell what it does."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_what_weights_do_not_tell_makes_another_model() -> None:
    result = attack([Scaled(1.0), Scaled(-1.0), Scaled(1.0)], right(Scaled(1.0)), output="kept")
    assert [c.metrics["clean_accuracy"].value for c in result.cells] == [1.0, 0.0]
    again = attack(Scaled(-1.0), right(Scaled(1.0)), output="kept").cells[0]
    assert again.metrics["clean_accuracy"].value == 0.0
    assert len(stored("kept")) == 2


def test_results_of_objects_are_kept_and_resumed() -> None:
    first = attack(Linear(), output="kept")
    rows = stored("kept")
    again = attack(Linear(), output="kept")
    assert again.cells == first.cells
    other = Linear()
    with torch.no_grad():
        other.weight[0, 0] += 0.5
    attack(other, right(Linear()), output="kept")
    assert len(stored("kept")) == 2
    assert rows.items() <= stored("kept").items()


def test_models_that_train_need_training_data() -> None:
    with pytest.raises(UsageError, match="there are no training images; add some, or use a model with weights"):
        attack(CNN, (X, Y))
    result = attack([CNN, Linear()], (X, Y), train=(X, Y))
    assert [c.status for c in result.cells] == ["ok", "ok"]


def test_progress_is_told() -> None:
    class Told:
        stages: list[str] = []  # noqa: RUF012
        steps = 0

        def stage(self, text: str, total: int) -> None:
            self.stages.append(text)

        def advance(self, steps: int = 1) -> None:
            self.steps += steps

        def note(self, text: str) -> None: ...

    told = Told()
    attack(Linear(), progress=told)
    assert told.stages == ["Linear | none | pgd:steps=3 linf 4/255"]
    assert told.steps == 12


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet81"}, "no model is called 'resnet81'; did you mean 'resnet18'?"),
    ({"model": 3}, "a model is a reference or an nn.Module, got an int"),
    ({"model": Linear}, "a model is a reference or an nn.Module, got the class Linear; write Linear\\(...\\)"),
    ({"model": []}, "there is no model to evaluate"),
    ({"model": Narrow()}, "must return logits of shape \\(1, 4\\) for one image, got \\(1, 3\\)"),
    ({"model": Several()}, "must return logits of shape \\(1, 4\\) for one image, got tuple"),
    ({"model": nn.Conv2d(3, 4, 3)}, "does not take images of shape \\(1, 1, 8, 8\\)"),
    ({"attack": "pdg"}, "no attack is called 'pdg'; did you mean 'pgd'?"),
    ({"attack": print}, "an attack is a reference such as 'pgd:steps=40', got a builtin_function_or_method"),
    ({"defense": 1}, "a defense is a reference such as 'prune:ratio=0.4', got an int"),
    ({"dataset": None}, "data must be \\(images, labels\\) or batches of them"),
    ({"dataset": X}, "data must be \\(images, labels\\) or batches of them|images must be"),
    ({"dataset": []}, "data must be \\(images, labels\\) or batches of them"),
    ({"dataset": (X, Y[:5])}, "images must be \\(N, C, H, W\\) with N labels, got \\(12, 1, 8, 8\\) and \\(5,\\)"),
    ({"dataset": (X[:, 0], Y)}, "images must be \\(N, C, H, W\\)"),
    ({"dataset": (X[:0], Y[:0])}, "images must be \\(N, C, H, W\\)"),
    ({"dataset": (X * 255, Y)}, "images must hold numbers in \\[0, 1\\], found .* to 255; leave normalisation"),
    ({"dataset": (X - 1, Y)}, "images must hold numbers in \\[0, 1\\], found -1 to"),
    ({"dataset": (X * torch.nan, Y)}, "images must hold numbers in \\[0, 1\\], found nan to nan"),
    ({"dataset": (X, Y.float())}, "labels must be whole numbers, got torch.float32"),
    ({"dataset": (X, Y - 1)}, "labels must be class numbers 0 to classes - 1, found -1 to 2"),
    ({"classes": 3}, "labels must be class numbers 0 to classes - 1, found 0 to 3 of 3"),
    ({"eps": "8/0"}, "divides by zero"),
    ({"eps": -0.1}, "is negative"),
    ({"eps": float("nan")}, "is not a number"),
    ({"eps": 8}, "did you mean 8/255?"),
    ({"n": 0}, "-n must be at least 1 image|n must be at least 1 image"),
    ({"batch_size": 0}, "batch.size must be at least 1"),
    ({"audit": "some"}, "audit cannot be 'some'; choose from none, quick, full"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
    ({"device": torch.device("meta")}, "device 'meta' is not available here"),
]


@pytest.mark.parametrize(("changed", "text"), WRONG, ids=[t[:50] for _, t in WRONG])
def test_wrong_input_is_a_usage_error(changed: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"model": Linear(), "attack": "fgsm", "dataset": (X, Y), "classes": 4, "audit": "none"}
    with pytest.raises(UsageError, match=text) as caught:
        advplug.evaluate(**{**given, **changed})
    assert "\n" not in str(caught.value)


def test_a_failing_cell_is_a_status() -> None:
    result = attack([Raising(), Nan(), Linear()], (X, Y))
    assert [c.status for c in result.cells] == ["failed", "ok", "ok"]
    assert [c.reason for c in result.failed] == ["the model raised ZeroDivisionError: the user's code is wrong"]
    assert result.cells[1].metrics["clean_accuracy"].value == 0


def test_a_module_that_cannot_be_copied_says_so() -> None:
    model = Linear()
    model.extra = model.weight * 2  # no leaf of the graph
    with pytest.raises(UsageError, match="the model cannot be copied"):
        attack(model, (X, Y))


def test_the_page_on_the_python_interface_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "pgd:steps=10 at 1/10: 0." in out
    assert "worst case at 1/255: 0." in out
    assert "\n8 cells\n" in out
    assert "no attack is called 'pdg'; did you mean 'pgd'?" in out
    assert names["failed"] == []
    assert isinstance(names["result"], RunResult)
    assert json.loads(names["text"])["schema"] == 1
    assert len(stored("results")) == 8


def test_the_page_names_every_argument() -> None:
    import inspect

    text = (ROOT / "docs" / "python.md").read_text()
    shared = {p.name for p in cli.evaluate.params}
    for name in inspect.signature(advplug.evaluate).parameters:
        assert re.search(rf"\b{name}\b", text), name
    assert {"fresh", "device", "batch_size", "audit", "offline", "seeds"} <= shared
    assert run("schema").code == 0
