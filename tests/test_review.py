"""Ways in which an evaluation could deceive without a word, each seen once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advplug
from advplug import contracts, session, work
from advplug.builtin.noise import noise
from advplug.contracts import Ball, Batch, DatasetInfo, Threat
from advplug.decisions import out_of_memory
from advplug.errors import CellFailure, UsageError
from advplug.estimate import Estimate, paired_p_value
from advplug.registry import Registry, Source, load
from advplug.rng import Stream
from advplug.store import Store
from advplug.tables.text import grid, titled
from advplug.victim import Victim

DRAWS = torch.Generator().manual_seed(0)
X = torch.rand(60, 1, 4, 4, generator=DRAWS).mul(0.4).add(0.3)
WEIGHT = torch.randn(4, 16, generator=DRAWS)


INFO = DatasetInfo(("a", "b"), 1, (8, 8), {})


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ WEIGHT.T


Y = Net()(X).argmax(1)


class Stairs(Net):
    """Gradients vanish: every pixel is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 255).round() / 255)


class Plugin:
    values: Any = None

    @staticmethod
    @advplug.hookimpl
    def advplug_metrics() -> list[contracts.Spec]:
        return [contracts.Spec("odd", f"{__name__}:odd", contracts.MetricCaps(("odd",)), "odd")]

    @staticmethod
    @advplug.hookimpl
    def advplug_defenses() -> list[contracts.Spec]:
        caps = contracts.DefenseCaps(("wrap",), stochastic=True)
        return [contracts.Spec("coin", f"{__name__}:coin", caps, "answers 0 in seven of ten cases")]


class _Point:
    @staticmethod
    def load() -> type:
        return Plugin


def odd():
    return lambda evidence: {"odd": Plugin.values}


def coin():
    def forward(inner, x, rng):
        logits = inner(x)
        lost = torch.rand(len(x), 1, generator=rng) < 0.7
        return torch.where(lost, torch.eye(4)[:1], logits)

    return (contracts.Wrap(forward, stochastic=True),)


@pytest.fixture
def with_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    known = load([(Source("odd", "odd", "1"), _Point)])
    assert not known.broken
    monkeypatch.setattr(session, "registry", lambda: known)
    yield known
    Plugin.values = None


def test_masked_gradients_show_at_every_budget_of_a_sweep():
    result = advplug.evaluate(Stairs(), "pgd:steps=5", dataset=(X, Y), eps=["1/50", "1/40", "1/30", "1/20"])
    assert [t.verdict for t in result.threats] == ["not trustworthy"] * 4
    assert all("zero-gradients" in [f.name for f in c.flags] for c in result.cells)


@pytest.mark.parametrize(
    "wrong", [float("nan"), 0.5, np.float32(1), "many", Estimate(float("inf"), None, None, 3)], ids=repr
)
@pytest.mark.usefixtures("with_plugin")
def test_a_metric_that_returns_nonsense_costs_its_value_only(wrong: Any):
    Plugin.values = wrong
    (cell,) = advplug.evaluate(Net(), "fgsm", dataset=(X, Y), eps="1/50").cells
    assert cell.status == "ok"
    assert cell.metrics["odd"] is None
    assert any("metric 'odd' failed" in note for note in cell.notes)


def test_the_name_of_a_strong_attack_is_no_evidence():
    verdicts = [
        advplug.evaluate(Net(), f"apgd:steps={steps}", dataset=(X, Y), eps="1/50").threats[0].verdict
        for steps in (1, 20, 100)
    ]
    assert verdicts == ["upper bound", "upper bound", "trusted"]
    short = advplug.evaluate(Net(), "autoattack:queries=10", dataset=(X, Y), eps="1/50").threats[0]
    assert short.verdict == "upper bound"


def test_what_one_image_a_pass_cannot_show_is_unchecked():
    (threat,) = advplug.evaluate(Net(), "pgd:steps=3", dataset=(X, Y), eps="1/50", batch_size=1, n=20).threats
    assert set(threat.unchecked) == {"batch-dependent", "gradient-mismatch", "black-box-beats-white-box"}


def test_without_an_audit_earlier_ones_do_not_count(tmp_path: Path):
    def run(audit: Any) -> tuple[str, ...]:
        result = advplug.evaluate(Net(), "fgsm", dataset=(X, Y), eps="1/50", output=tmp_path, audit=audit)
        return result.threats[0].unchecked

    assert "batch-dependent" not in run("quick")
    assert "batch-dependent" in run("none")


@pytest.mark.usefixtures("with_plugin")
def test_images_that_a_randomised_victim_mostly_gets_wrong_are_attacked_too():
    some = X[Y > 0], Y[Y > 0]
    bare, defended = advplug.evaluate(Net(), "pgd:steps=10,draws=8", "coin", dataset=some, eps="1/4").cells
    assert bare.metrics["robust_accuracy"].value == 0
    assert defended.metrics["clean_accuracy"].value == pytest.approx(0.3, abs=0.1)
    assert defended.metrics["adaptive_robust_accuracy"].value < 0.1


def test_noise_keeps_to_the_batch_size():
    sizes = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    victim = Victim(Counted(), 4, batch_size=7)
    batch = Batch(X, Y, torch.arange(len(X)))
    noise(draws=2)(victim, batch, Threat(Ball("linf", Fraction(1, 50))), Stream(0))
    assert max(sizes) == 7


@pytest.mark.parametrize("twice", ["eps=1/10,eps=1/5", "target=1,target=2", "norm=l2,norm=linf"])
def test_a_part_of_the_threat_given_twice_is_refused(twice: str):
    with pytest.raises(UsageError, match="is given twice"):
        advplug.evaluate(Net(), f"pgd:{twice}", dataset=(X, Y))


def test_a_target_that_only_looks_like_a_number():
    with pytest.raises(UsageError, match="a class number or the name of one"):
        advplug.evaluate(Net(), "pgd:target='²'", dataset=(X, Y))


def test_fresh_deletes_nothing_of_the_users(tmp_path: Path):
    (tmp_path / "crafted" / "folder").mkdir(parents=True)
    mine, ours = tmp_path / "crafted" / "mine.txt", tmp_path / "crafted" / "0a-1_10.npy"
    mine.touch()
    ours.touch()
    Store(tmp_path, fresh=True).close()
    assert mine.exists()
    assert not ours.exists()


def test_the_exact_test_of_thousands_of_pairs_takes_no_time():
    assert paired_p_value(5000, 5000) == pytest.approx(0.504, abs=1e-3)
    assert paired_p_value(3, 20_000) == 1
    assert paired_p_value(8, 1) == pytest.approx(10 / 512)


@pytest.mark.parametrize("text", ["MPS backend out of memory (MPS allocated: 9 GB)", "CUBLAS_STATUS_ALLOC_FAILED when"])
def test_running_out_of_memory_is_seen_on_every_backend(text: str):
    assert out_of_memory(RuntimeError(text))


@pytest.mark.usefixtures("with_plugin")
def test_the_least_likely_class_of_another_model_is_no_target():
    defended = advplug.evaluate(Net(), "pgd:steps=3,target=least-likely", "coin", dataset=(X, Y), eps="1/50").cells[1]
    assert defended.metrics["static_robust_accuracy"] is None
    assert defended.metrics["bare_robust_accuracy"] is not None


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Conditions under which a sweep fails."""
    conditions: list[Any] = []
    real = work.run_sweep

    def run(sweep: Any, *rest: Any) -> Any:
        if any(condition(sweep) for condition in conditions):
            raise CellFailure("planted")
        return real(sweep, *rest)

    monkeypatch.setattr(work, "run_sweep", run)
    return conditions


@pytest.mark.usefixtures("with_plugin")
def test_the_static_attack_comes_once_the_baseline_has_succeeded(tmp_path: Path, failing: list[Any]):
    def run() -> Any:
        return advplug.evaluate(Net(), "pgd:steps=3", "coin", dataset=(X, Y), eps="1/50", output=tmp_path)

    failing.append(lambda sweep: not sweep.victim.defense)
    assert [c.status for c in run().cells] == ["failed", "ok"]
    failing.clear()
    first = run()
    assert [c.status for c in first.cells] == ["ok", "ok"]
    assert first.cells[1].metrics["static_robust_accuracy"] is not None
    failing.append(lambda sweep: True)
    assert run().to_json()["cells"] == first.to_json()["cells"]


def test_a_group_in_which_an_attack_failed_is_not_trusted(failing: list[Any]):
    failing.append(lambda sweep: sweep.attack.label == "apgd-t")
    (threat,) = advplug.evaluate(Net(), ["apgd", "apgd-t"], dataset=(X, Y), eps="1/50").threats
    assert (threat.attacks, threat.verdict) == (("apgd",), "upper bound")


def test_a_title_is_not_cut_into_words_to_fit_a_narrow_table():
    title = "Attacks (dataset fake:n=20,train=40,size=16,classes=2, model cnn:epochs=1)"
    assert grid(title, ["eps"], [["1/10"]]).splitlines()[0] == title


def test_what_reads_the_same_stands_once() -> None:
    made = titled("Cells", {"eps": str, "clean %": lambda _: "65.3"}, [1, 2, 1], ("clean %",))
    assert [line.split()[0] for line in made.splitlines()[4:]] == ["1", "2"]
    assert "clean % 65.3" in made


def test_names_between_colons_stay_as_they_are() -> None:
    assert "npz:a.npz,classes=bird:cat:dog" in grid("", ["dataset"], [["npz:a.npz,classes=bird:cat:dog"]])


def test_a_users_model_is_known_by_the_modules_beside_it(tmp_path, monkeypatch):
    from advplug.builtin.usercode import source_digest

    monkeypatch.chdir(tmp_path)
    (tmp_path / "top.py").write_text("import torch\nfrom middle import net\n")
    (tmp_path / "middle.py").write_text("from layers.inner import net\n")
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "inner.py").write_text("net = 1\n")
    (tmp_path / "stranger.py").write_text("x = 1\n")
    before = source_digest("top")
    (tmp_path / "stranger.py").write_text("x = 2\n")
    assert source_digest("top") == before
    (tmp_path / "layers" / "inner.py").write_text("net = 2\n")
    assert source_digest("top") != before


@pytest.mark.parametrize(
    ("changed", "asked"),
    [
        ("pk/__init__.py", "pk.models"),
        ("pk/layers.py", "pk.models"),
        ("pk/layers.py", "pk.deep.m"),
        ("beside.py", "pk.models"),
        ("beside.py", "pk"),
        ("pk/deep/own.py", "pk.deep.m"),
    ],
)
def test_a_users_package_is_known_by_all_of_it_and_by_the_modules_beside_it(tmp_path, monkeypatch, changed, asked):
    from advplug.builtin.usercode import source_digest

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pk" / "deep").mkdir(parents=True)
    (tmp_path / "pk" / "__init__.py").write_text("import beside\n")
    (tmp_path / "pk" / "models.py").write_text("from pk.layers import act\n")
    (tmp_path / "pk" / "layers.py").write_text("act = 1\n")
    (tmp_path / "pk" / "deep" / "__init__.py").write_text("")
    (tmp_path / "pk" / "deep" / "m.py").write_text("from ..layers import act\nfrom .own import x\n")
    (tmp_path / "pk" / "deep" / "own.py").write_text("x = 1\n")
    (tmp_path / "beside.py").write_text("y = 1\n")
    (tmp_path / "stranger.py").write_text("z = 1\n")
    before = source_digest(asked)
    (tmp_path / "stranger.py").write_text("z = 2\n")
    assert source_digest(asked) == before
    with (tmp_path / changed).open("a") as file:
        file.write("more = 1\n")
    assert source_digest(asked) != before


def test_code_that_was_changed_since_it_was_imported_is_imported_anew(tmp_path, monkeypatch):
    """Its results are stored under the digest of the new code: they have to be the new code's."""
    from advplug.builtin.usercode import build

    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner_of_a_notebook.py").write_text("bias = 1.0\n")
    (tmp_path / "net_of_a_notebook.py").write_text(
        "import torch\nfrom inner_of_a_notebook import bias\n\n\ndef make():\n    net = torch.nn.Linear(1, 1)\n"
        "    torch.nn.init.constant_(net.bias, bias)\n    return net\n"
    )
    first = build("net_of_a_notebook:make", INFO)
    assert build("net_of_a_notebook:make", INFO).bias.item() == 1
    (tmp_path / "inner_of_a_notebook.py").write_text("bias = 22.0\n")
    second = build("net_of_a_notebook:make", INFO)
    assert (first.bias.item(), second.bias.item()) == (1, 22)


def test_code_that_the_user_imported_and_changed_is_imported_anew(tmp_path, monkeypatch):
    from advplug.builtin.usercode import build

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    text = "import torch\n\n\ndef make():\n    net = torch.nn.Linear(1, 1)\n    torch.nn.init.constant_(net.bias, {})\n"
    file = tmp_path / "net_that_was_known.py"
    file.write_text(text.format("1.0") + "    return net\n")
    importlib.import_module("net_that_was_known")
    file.write_text(text.format("33.0") + "    return net\n")
    assert build("net_that_was_known:make", INFO).bias.item() == 33


def test_a_module_of_the_same_name_elsewhere_is_another(tmp_path, monkeypatch):
    from advplug.builtin.usercode import build

    for folder, bias in (("one", 1.0), ("two", 22.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net_of_a_project.py").write_text(
            "import torch\n\n\ndef make():\n    net = torch.nn.Linear(1, 1)\n"
            f"    torch.nn.init.constant_(net.bias, {bias})\n    return net\n"
        )
        monkeypatch.chdir(tmp_path / folder)
        assert build("net_of_a_project:make", INFO).bias.item() == bias


def test_an_installed_package_stays_imported():
    """Others use it, and importing it twice may fail."""
    from advplug.builtin.usercode import build
    from advplug.vision import import_torchvision

    torchvision = import_torchvision()
    before = sys.modules["torchvision.models"]
    assert build("torchvision.models:squeezenet1_1", INFO) is not None
    assert sys.modules["torchvision.models"] is before
    assert sys.modules["torchvision"] is torchvision


def test_a_large_package_is_read_once(tmp_path, monkeypatch):
    from advplug.builtin import usercode

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pk").mkdir()
    for i in range(30):
        (tmp_path / "pk" / f"m{i}.py").write_text("import pk.m0\nimport os\n")
    (tmp_path / "pk" / "__init__.py").write_text("")
    walked = []
    walk = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: walked.append(self) or walk(self, pattern))
    usercode.source_digest("pk.m3")
    assert len(walked) <= 3


def test_provenance_says_where_and_how_a_cell_was_computed():
    import advplug

    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    result = advplug.evaluate(module, "pgd:steps=2", dataset=(x, torch.arange(20) % 2), audit="none")
    computed = result.cells[0].provenance["computed"]
    assert computed["device"] == "cpu"
    assert computed["passes"] == "float32+contiguous"
    assert computed["versions"]["torch"] == torch.__version__


def test_a_defense_stacked_twice_reports_both_times():
    result = advplug.evaluate(
        "cnn:epochs=1", "fgsm", "prune:epochs=0+prune:epochs=0", dataset="fake", n=8, baseline=False, audit="none"
    )
    first, second = result.cells[0].provenance["facts"].items()
    assert (first[0], second[0]) == ("prune:epochs=0", "prune:epochs=0 #2")
    assert second[1]["parameters_before"] == first[1]["parameters_after"]
