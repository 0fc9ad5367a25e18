"""Training by several processes: the same weights in all of them, those of one process, one cache and one voice."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import together_script
from advplug.artifacts import Artifacts
from advplug.errors import UsageError
from advplug.training import launch
from cli_tools import CNN, QUICK, TINY, run, without_times
from conftest import ROOT

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: advplug[accelerate]"
)
pytestmark = pytest.mark.timeout(600)  # several processes that import torch, on whatever cores there are
ENVIRONMENT = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
Results = list[dict[str, Any]]


def launched(processes: int, *arguments: str | Path, cwd: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """The processes of a launcher, as it starts them on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outside = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], text=True, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=outside | common | variables
            | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each printed; all must end well."""
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    return told


# --- what a launcher says --------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_launchers_are_understood(environment: pytest.MonkeyPatch) -> None:
    assert launch.launched() == launch.Launch(1, "no")
    environment.setenv("WORLD_SIZE", "4")  # some schedulers set this one alone
    assert launch.launched().processes == 1
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "here")):
        environment.setenv(name, value)
    environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch.launched() == launch.Launch(4, "bf16")
    environment.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match="in float32 or bf16, not in fp16"):
        launch.launched()


@needs_accelerate
def test_keys_are_those_of_a_plain_run_unless_weights_are_others(environment: pytest.MonkeyPatch) -> None:
    assert launch.asked() is None
    with launch.asked_for("accelerate"):
        assert launch.asked() == launch.Launch()
        assert launch.recipe() == {}
    environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with launch.asked_for(None):
        assert launch.recipe() == {}
    with launch.asked_for("accelerate"):
        assert launch.recipe() == {"trained_by": {"processes": 1, "precision": "bf16"}}
        assert not launch.helps()
    assert launch.asked() is None


def test_a_launch_that_nobody_asked_for_is_told(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "here")):
        environment.setenv(name, value)
    ran = run("eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "started 2 processes of this; add --train-with accelerate" in ran.err
    assert not (tmp_path / "out").exists()


def test_bad_requests(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run("eval", "-m", CNN, "-a", "fgsm", "--dataset", TINY, "--train-with", "magic")
    assert ran.code == 2
    assert "'magic' is not 'accelerate'" in ran.err
    environment.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UsageError, match=r"pip install 'advplug\[accelerate\]'"), launch.asked_for("accelerate"):
        pass


# --- the loop --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """Of two processes, and of one in bf16."""
    pytest.importorskip("accelerate")
    folders = [tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("bf16")]
    script = Path(together_script.__file__)
    both = launched(2, script, folders[0], cwd=folders[0])
    other = launched(1, script, folders[1], cwd=folders[1], ACCELERATE_MIXED_PRECISION="bf16")
    ended(both + other)
    read = [[torch.load(f, weights_only=True) for f in sorted(folder.glob("*.pt"))] for folder in folders]
    return read[0], read[1]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return together_script.alone()


def test_all_processes_end_with_the_same_weights(results: tuple[Results, Results]) -> None:
    first, second = results[0]
    for kind in ("sgd", "adamw", "float32"):
        for name, tensor in first[kind]["state"].items():
            assert torch.equal(tensor, second[kind]["state"][name]), (kind, name)
        assert first[kind]["losses"] == second[kind]["losses"]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_they_are_those_of_one_process(kind: str, results: tuple[Results, Results], alone: dict[str, Any]) -> None:
    made, expected = results[0][0][kind], alone[kind]
    assert sum(made["losses"][-3:]) < 0.6 * sum(made["losses"][:3])  # of the last epoch and the first
    torch.testing.assert_close(made["losses"], expected["losses"], rtol=1e-9, atol=1e-12)
    assert made["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():  # running statistics among them, and their counters
        torch.testing.assert_close(made["state"][name], tensor, rtol=1e-8, atol=1e-11)


def test_a_layer_that_no_image_needs_stays_as_it_is(results: tuple[Results, Results]) -> None:
    fresh, made = together_script.net().state_dict(), results[0][0]["sgd"]["state"]
    assert torch.equal(made["never.weight"], fresh["never.weight"])  # neither moved nor decayed
    assert not torch.equal(made["rare.weight"], fresh["rare.weight"])


def test_float32_is_equal_up_to_rounding(results: tuple[Results, Results], alone: dict[str, Any]) -> None:
    made, expected = results[0][0]["float32"], alone["float32"]
    torch.testing.assert_close(made["losses"], expected["losses"], rtol=1e-3, atol=1e-4)
    assert set(made["dtypes"]) == set(expected["dtypes"]) == {torch.float32}


def test_processes_draw_differently_and_the_main_one_as_ever(
    results: tuple[Results, Results], alone: dict[str, Any]
) -> None:
    first, second = (made["drawn"] for made in results[0])
    assert torch.equal(first, alone["drawn"])
    assert not (first == second).any()


def test_failures_are_met_by_all(results: tuple[Results, Results]) -> None:
    first, second = (made["failures"] for made in results[0])
    assert first == second
    assert first[0].startswith("training needs at least 2 images")
    assert "the loss became nan in epoch 1 of 4, step 1 of 3" in first[1]


def test_batches_are_shared_out_whole(results: tuple[Results, Results]) -> None:
    first, second = (made["sizes"] for made in results[0])
    assert first == [[4, 4], [4, 4, 4]]  # 17 images: the last one joins the batch before
    assert second == [[4, 5], [4, 4, 4]]
    assert [made["told"] for made in results[0]] == ["from 0", "from 0"]


def test_bf16_works_in_bf16_and_learns(results: tuple[Results, Results], alone: dict[str, Any]) -> None:
    (made,) = (found["float32"] for found in results[1])
    expected = alone["float32"]
    assert set(made["dtypes"]) == {torch.bfloat16}
    assert {t.dtype for t in made["state"].values() if t.is_floating_point()} == {torch.float32}
    assert made["losses"][-1] < 0.5 * made["losses"][0]
    assert made["losses"] != expected["losses"]
    torch.testing.assert_close(made["losses"][0], expected["losses"][0], rtol=2e-2, atol=2e-2)


# --- the command line ------------------------------------------------------------------------------

COMMAND = ("eval", "-m", "cnn:epochs=1,batch_size=10", "-d", "prune", "-a", "fgsm", "--dataset", TINY, "--device",
           "cpu", *QUICK, "--json", "-o", "out")  # fmt: skip


@needs_accelerate
def test_two_processes_train_once_print_once_and_come_to_the_same(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (out, err), helper = ended(
        launched(2, "-m", "advplug", *COMMAND, "--train-with", "accelerate", cwd=tmp_path, ADVPLUG_CACHE=str(cache))
    )
    assert helper == ("", "")
    assert "Traceback" not in err
    result = json.loads(out)
    assert [c["status"] for c in result["cells"]] == ["ok", "ok"]
    assert all(c["provenance"]["trained_by"]["processes"] == 2 for c in result["cells"])
    found = Artifacts(cache / "artifacts").ls()
    assert len(found) == 2

    environment.setenv("ADVPLUG_CACHE", str(tmp_path / "other"))
    environment.chdir(tmp_path)
    plain = run(*COMMAND, "-o", "plain")
    assert plain.code == 0, plain.err
    for entry in found:
        same = next(e for e in Artifacts().ls() if e.label == entry.label)
        assert same.key != entry.key
        ours, theirs = (
            a.get_or_make(k, pytest.fail).tensors  # type: ignore[arg-type]
            for a, k in ((Artifacts(cache / "artifacts"), entry.key), (Artifacts(), same.key))
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    for one, two in zip(result["cells"], plain.json["cells"], strict=True):
        assert one["metrics"]["clean_accuracy"] == two["metrics"]["clean_accuracy"]


@needs_accelerate
def test_one_process_in_float32_is_a_plain_run(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.chdir(tmp_path)
    plain = run(*COMMAND)
    again = run(*COMMAND, "--train-with", "accelerate")
    assert again.code == 0, again.err
    assert without_times(again.json) == without_times(plain.json)
    assert "training" not in again.err


@needs_accelerate
@pytest.mark.slow
def test_accelerates_own_launcher_says_the_precision(tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                "--dynamo_backend", "no", "--mixed_precision", "bf16", "-m", "advplug")  # fmt: skip
    outside = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, *launcher, *COMMAND, "--train-with", "accelerate"], cwd=tmp_path, capture_output=True,
        text=True, check=False, env=outside | {"HF_HOME": str(tmp_path), "ADVPLUG_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [c["status"] for c in cells] == ["ok", "ok"]
    assert all(c["provenance"]["trained_by"] == {"processes": 1, "precision": "bf16"} for c in cells)


@needs_accelerate
def test_not_beside_ray(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.chdir(tmp_path)
    ran = run(*COMMAND, "--train-with", "accelerate", "--executor", "ray")
    assert ran.code == 2
    assert "use it without --executor" in ran.err or "Ray is not installed" in ran.err
