"""Cells on a Ray cluster: the same results as in one process, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from advplug.errors import UsageError
from advplug.executors import Placement
from advplug.matrix import Sweep
from advplug.plans import VictimPlan
from advplug.session import Request, plan_all
from cli_tools import CNN, QUICK, TINY, evaluate, stored, wait_for
from conftest import ROOT
from usernets import Linear

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'advplug[ray]'")

LINEAR, HALTING = (f"py:usernets:{name}#weights=linear.safetensors" for name in ("Linear", "Halting"))
STACK = "prune:epochs=1+bit-depth"
CERTIFYING = "smoothing:sigma=0.25,votes=11,n0=10,n=60,draws=4,train=no"
MATRIX = ("-m", CNN, "-a", "fgsm", "-a", "pgd:steps=3", "-a", f"transfer:from=({LINEAR}),attack=(pgd:steps=3)",
          "-a", "ba:count=4", "-d", STACK, "-d", CERTIFYING, "-e", "8/255", "-e", "l2:0.5", "--dataset",
          TINY)  # fmt: skip
"""Two budgets, a stack that is tuned, a certificate, an attack that needs a further model, poisonings."""


# --- what needs no cluster ---


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "cells"),
    [
        ([node(2)], 1, 0, 2),
        ([node(2), node(3), node(8, alive=False)], 2, 0, 2),
        ([node(8, 2), node(8)], 1, 1, 2),
        ([node(8, 2), node(1, 4)], 1, 0.5, 5),
        ([node(8, 1)], 1, 1 / 3, 3),
    ],
)
def test_how_many_cells_run_at_a_time(nodes: list[Any], cpus: int, gpus: float, cells: int) -> None:
    from advplug.cluster.session import demand_slots

    assert demand_slots(nodes, cpus, gpus) == cells


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "told"),
    [
        ([node(2)], 1, 0.5, "no machine of this Ray cluster has a GPU"),
        ([node(2), node(3)], 4, 0, "a cell asks for 4 CPUs, and no machine of this Ray cluster offers more than 3"),
        ([node(2), node(1, 2)], 2, 1, "no machine of this Ray cluster offers 2 CPUs and 1 GPUs together"),
        ([node(4, alive=False)], 1, 0, "offers more than 0"),
    ],
)
def test_cells_for_which_no_machine_is_large_enough(nodes: list[Any], cpus: int, gpus: float, told: str) -> None:
    from advplug.cluster.session import demand_slots

    with pytest.raises(UsageError, match=told):
        demand_slots(nodes, cpus, gpus)


@pytest.mark.parametrize(
    ("asked", "device", "nodes", "share"),
    [
        (None, "auto", [node(2)], 0),
        (None, "auto", [node(2), node(2, 1)], 1),
        (None, "cpu", [node(2, 1)], 0),
        (None, "cuda", [node(2)], 1),
        (0.25, "auto", [node(2, 1)], 0.25),
        (0, "auto", [node(2, 1)], 0),
    ],
)
def test_the_share_of_a_gpu(asked: float | None, device: str, nodes: list[Any], share: float) -> None:
    from advplug.cluster.session import gpus_per_cell

    assert gpus_per_cell(Placement("ray", gpus_per_cell=asked), device, nodes) == share


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(Linear().state_dict(), "linear.safetensors")
    return tmp_path


def planned(*models: Any, **more: Any) -> list[Sweep]:
    asked = {"attacks": ("pgd:steps=3,eps=8/255",), "datasets": (TINY,), **more}
    return plan_all(Request(models=models, **asked))[0]


def test_plans_are_bound_anew_where_they_arrive(here: Path) -> None:
    from advplug.cluster.plans import bindings, pack, unpack

    attacks = ("pgd:steps=3,eps=8/255", f"transfer:from=({CNN}),attack=(pgd:steps=2,loss=margin)")
    sweeps = planned(CNN, LINEAR, attacks=attacks, defenses=(STACK,))
    data = pack(sweeps)
    bindings({})
    found = unpack(data)
    assert [s.key for s in found] == [s.key for s in sweeps]
    assert [s.baseline and s.baseline.key for s in found] == [s.baseline and s.baseline.key for s in sweeps]
    save_file({"weight": Linear().weight + 1}, "linear.safetensors")
    bindings({})
    changed = [a.key != b.key for a, b in zip(unpack(data), sweeps, strict=True)]
    assert changed == ["Linear" in s.victim.model.label for s in sweeps]  # the file is another one now
    Path("linear.safetensors").unlink()
    bindings({})
    with pytest.raises(UsageError, match=r"linear\.safetensors"):
        print([s.key for s in unpack(data)])


def test_objects_of_the_user_travel_once(here: Path) -> None:
    from advplug.cluster.plans import bindings, objects_of, pack, unpack
    from advplug.objects import bind_data, bind_module

    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    data = bind_data((torch.rand(500, 1, 8, 8), torch.arange(500) % 4))
    (sweep,) = planned(bind_module(module), datasets=(data,))
    objects = objects_of([sweep])
    assert set(objects) == {("model", "Sequential"), ("dataset", "tensors")}
    packed = pack(sweep)
    assert len(packed) < 4000
    bindings(objects)
    found: Sweep = unpack(packed)
    assert found.key == sweep.key
    assert found.victim.model.value.module is module


def test_what_a_victim_is_built_on(here: Path) -> None:
    from advplug.cluster.executor import built_on

    def based(*defenses: str) -> list[list[str]]:
        plans: dict[str, VictimPlan] = {}
        for sweep in planned(CNN, defenses=defenses):
            plans.setdefault(sweep.victim.key, sweep.victim)
        return [[base.defense_label for base in built_on(plan)] for plan in plans.values()]

    assert based("prune", "prune+bit-depth", "advtrain") == [[], ["none"], ["prune", "none"], []]


def test_what_goes_wrong_beside_the_work() -> None:
    from advplug.cluster.executor import explained

    ray_says = RuntimeError(
        "The remote function failed to import on the worker. This may be because needed library dependencies are not "
        "installed:\n\nTraceback (most recent call last):\nModuleNotFoundError: No module named 'advplug'"
    )
    for cause, lacking in ((ray_says, "advplug"), (ImportError("No module named 'advplug_art'"), "advplug_art")):
        told = explained(cause)
        assert isinstance(told, UsageError)
        assert str(told).startswith(
            f"a machine of the Ray cluster lacks packages (No module named '{lacking}'); install"
        )
    assert explained(ray.exceptions.RaySystemError("other")).args == ray.exceptions.RaySystemError("other").args


# --- a cluster of two nodes, each with a cache of its own ---


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with one CPU each; `caches` are their folders of weights."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    made.caches = [tmp_path_factory.mktemp(f"node{number}") for number in range(2)]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        for number, cache in enumerate(made.caches):
            variables = {"ADVPLUG_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
            head = {"include_dashboard": False, "no_monitor": True} if number == 0 else {}
            made.add_node(num_cpus=1, env_vars=variables, include_log_monitor=False, **head)
        yield made
    finally:
        made.shutdown()


class Driver:
    """`advplug ARGUMENTS` in a process of its own, which has a mark that its children inherit."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        paths = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "MARK": self.mark, "OMP_NUM_THREADS": "1"} | variables
        command = [sys.executable, "-m", "advplug.cli", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def reaches(self, file: Path, seconds: float = 180) -> None:
        """Waits until it has come so far that the file is there."""
        wait_for(lambda: file.exists() or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.wait()

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def left(self) -> dict[Path, str]:
        """What still runs of the processes that it started, by folder in /proc."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"MARK={self.mark}".encode() in (folder / "environ").read_bytes():
                    found[folder] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
            except OSError:  # gone meanwhile
                continue
        return found


def on(cluster: Any) -> tuple[str, ...]:
    return "--executor", "ray", "--address", cluster.address


def finished(folder: Path, *arguments: str, code: int = 0) -> Any:
    """The JSON of a command that ends well; nothing but its own lines is on standard error."""
    ended, out, err = Driver(folder, "eval", *arguments, "--json").wait()
    assert ended == code, err
    strange = [line for line in err.splitlines() if not line.startswith(("kept in", "failed", "Error")) and
               " cells done" not in line and " is begun again: " not in line]  # fmt: skip
    assert strange == []
    return json.loads(out)


def same(result: Any) -> Any:
    """A result without seconds, without what names the run, and without the passes of transferred images, which are
    crafted once in each process."""
    if isinstance(result, list):
        return [same(item) for item in result]
    if isinstance(result, dict):
        gone = {"seconds", "run", *(["passes"] if str(result.get("attack")).startswith("transfer") else [])}
        return {key: same(value) for key, value in result.items() if key not in gone}
    return result


def bits(folder: Path) -> dict[str, bytes | None]:
    return {key: evidence for key, (_, _, evidence, _) in stored(folder).items()}


def tables(folder: Path, name: str) -> Any:
    import contextlib
    import sqlite3

    with contextlib.closing(sqlite3.connect(folder / "results.sqlite")) as db:
        return dict(db.execute(f"SELECT key, {name} FROM {name}").fetchall())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_results_are_those_of_one_process(here: Path, cluster: Any) -> None:
    expected = evaluate(*MATRIX, output="expected")
    result = finished(here, *MATRIX, "-o", "out", *on(cluster))
    assert {c["status"] for c in result["cells"]} == {"ok"}
    assert [c["status"] for c in (*result["certificates"], *result["poisonings"])] == ["ok"] * 4
    assert same(result) == same(expected)
    assert bits(here / "out") == bits(here / "expected")
    for name in ("audit", "sample"):
        assert tables(here / "out", name) == tables(here / "expected", name)
    assert not list((here / "out" / "crafted").glob("*"))
    # Both nodes took part, and hold the weights, of which each was trained on one of them.
    kept = [{p.name for p in (cache / "artifacts").glob("[!.]*")} for cache in cluster.caches]
    assert kept[0] & kept[1]
    # The same command again computes nothing, in either way.
    again = finished(here, *MATRIX, "-o", "out", *on(cluster))
    assert same(again) == same(result)
    assert again["run"]["passes"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_killed_costs_its_cell_nothing_but_time(here: Path, cluster: Any) -> None:
    asked = ("-m", HALTING, "-a", "fgsm", "-a", "pgd:steps=3", "-d", "bit-depth", "-e", "8/255", "--dataset", TINY)
    driver = Driver(here, "eval", *asked, "-o", "out", "--json", *on(cluster))
    driver.reaches(here / "halted")
    os.kill(int((here / "halted").read_text()), signal.SIGKILL)
    code, out, err = driver.wait()
    assert code == 0, err
    assert "fgsm on" in err
    assert "is begun again: its worker died" in err
    assert same(json.loads(out)) == same(evaluate(*asked, output="expected"))
    assert bits(here / "out") == bits(here / "expected")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_loses_nothing_finished(here: Path, cluster: Any) -> None:
    asked = ("-m", LINEAR, "-m", HALTING, "-a", "fgsm", "-a", "pgd:steps=3", "-e", "8/255", "--dataset", TINY, *QUICK)
    driver = Driver(here, "eval", *asked, "-o", "out", *on(cluster))
    driver.reaches(here / "halted")
    wait_for(lambda: sum(row[0] == "ok" for row in stored(here / "out").values()) >= 2, 120)
    driver.process.kill()
    driver.wait()
    before = stored(here / "out")
    result = finished(here, *asked, "-o", "out", *on(cluster))
    after = stored(here / "out")
    assert {key: after[key] for key in before} == before
    assert [c["status"] for c in result["cells"]] == ["ok"] * 4
    assert same(result) == same(evaluate(*asked, output="expected"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_kills_its_worker_every_time_is_a_failure_of_its_cells_only(here: Path, cluster: Any) -> None:
    (here / "deadly.py").write_text(
        "import os\nfrom usernets import Linear\n\n\nclass Deadly(Linear):\n    def forward(self, x):\n"
        "        if x.requires_grad:\n            os.kill(os.getpid(), 9)\n        return super().forward(x)\n"
    )
    asked = ("-m", "py:deadly:Deadly", "-m", LINEAR, "-a", "fgsm", "-e", "8/255", "--dataset", TINY, *QUICK)
    result = finished(here, *asked, "-o", "out", *on(cluster), code=3)
    assert [c["status"] for c in result["cells"]] == ["failed", "ok"]
    assert result["cells"][0]["reason"].startswith("begun 4 times, and each time its worker died")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_allowance_ends_the_run_with_the_rest_pending(here: Path, cluster: Any) -> None:
    (here / "m.yaml").write_text(
        f"models: ['{LINEAR}']\nattacks: [fgsm, 'pgd:steps=3', noise]\neps: [8/255]\n"
        f"datasets: ['{TINY}']\naudit: none\n"
    )
    code, out, err = Driver(here, "run", "m.yaml", "-o", "out", "--max-passes", "1", *on(cluster)).wait()
    assert code == 0, err
    assert "3 of 3 cells pending" in out  # the look at the victim is all that was allowed
    code, out, err = Driver(here, "run", "m.yaml", "-o", "out", "--json", *on(cluster)).wait()
    assert code == 0, err
    assert [c["status"] for c in json.loads(out)["cells"]] == ["ok"] * 3


REFUSED: list[tuple[Sequence[str], str]] = [
    (("--gpus-per-cell", "0.5"), "no machine of this Ray cluster has a GPU; leave --gpus-per-cell and --device cuda"),
    (("--device", "cuda"), "no machine of this Ray cluster has a GPU; leave --gpus-per-cell and --device cuda out"),
    (("--cpus-per-cell", "3"), "a cell asks for 3 CPUs, and no machine of this Ray cluster offers more than 1"),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_no_machine_has_is_refused_at_once(here: Path, cluster: Any) -> None:
    asked = ("eval", "-m", LINEAR, "-a", "fgsm", "--dataset", TINY, "-o", "out")
    for options, told in REFUSED:
        code, _, err = Driver(here, *asked, *on(cluster), *options).wait()
        assert (code, len(err.splitlines())) == (2, 1), err
        assert told in err
    code, _, err = Driver(here, *asked, "--executor", "ray", "--address", "127.0.0.1:1").wait()
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "nothing answers at 127.0.0.1:1 (Connection refused); is Ray running there?" in err
    assert not (here / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_that_the_workers_lack_ends_the_run(here: Path, cluster: Any) -> None:
    home = here / "home"
    home.mkdir()
    Path("linear.safetensors").rename(home / "linear.safetensors")
    # The driver's home is another one than that of the nodes.
    model = "py:usernets:Linear#weights=~/linear.safetensors"
    asked = ("eval", "-m", model, "-a", "fgsm", "--dataset", TINY, *QUICK)
    code, _, err = Driver(here, *asked, *on(cluster), HOME=str(home)).wait()
    assert (code, len(err.splitlines())) == (2, 1), err
    assert err.startswith(f"Error: on the machine {platform.node()}: ")
    assert "linear.safetensors" in err


SCRIPT = """
import sys, threading, torch, advplug
from advplug.errors import UsageError

class Own(torch.nn.Module):
    def __init__(self, locked=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 4)
        self.lock = threading.Lock() if locked else None
    def forward(self, x):
        return self.layer(x.flatten(1))

x, y = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
asked = dict(dataset=loader, train=(x, y), eps="8/255", audit="none")
ray = dict(executor="ray", address=sys.argv[1])

def cells(**more):
    result = advplug.evaluate([Own(), "cnn:epochs=1"], "pgd:steps=3", "prune:epochs=1", **asked, **more)
    return [(c.status, c.reason, c.metrics) for c in result.cells]

assert cells(**ray) == cells()
try:
    advplug.evaluate(Own(locked=True), "fgsm", **asked, **ray)
except UsageError as error:
    print(error)
import ray as library
library.init(address=sys.argv[1], log_to_driver=False)
assert cells(executor="ray") == cells()
assert library.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_objects_are_sent_or_refused(here: Path, cluster: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, cluster.address], capture_output=True, text=True, check=False, cwd=here
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "the model 'Own' cannot be sent to Ray's workers (cannot pickle '_thread.lock' object"
    )


GPU = """
import ray, advplug
from advplug.errors import UsageError
ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
try:
    advplug.evaluate("cnn:epochs=1", "fgsm", dataset="fake:n=20,train=40,size=8,channels=1,classes=4", executor="ray")
except UsageError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_ray_is_told_of_but_torch_does_not_see(here: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, check=False, cwd=here)
    assert "device 'cuda' is not available here" in done.stdout, done.stderr


# --- a cluster that is started for the run ---


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_run_says_how_to_go_on_and_leaves_no_process_behind(here: Path) -> None:
    asked = ("eval", "-m", HALTING, "-a", "fgsm", "-e", "8/255", "--dataset", TINY, *QUICK, "-o", "out",
             "--executor", "ray")  # fmt: skip
    driver = Driver(here, *asked)
    driver.reaches(here / "halted")
    assert any("raylet" in command for command in driver.left().values())
    # Whoever reaches a port can run code, unless the cluster asks for a token.
    (raylet,) = (folder for folder, command in driver.left().items() if "raylet/raylet" in command)
    assert b"RAY_AUTH_MODE=token" in (raylet / "environ").read_bytes()
    driver.process.send_signal(signal.SIGINT)
    code, _, err = driver.wait()
    assert code == 130
    assert f"interrupted: finished cells are kept in out; to go on: advplug {' '.join(asked[:2])}" in err
    assert err.rstrip().endswith("--executor ray")
    end = time.monotonic() + 30
    while driver.left() and time.monotonic() < end:
        time.sleep(0.2)
    assert driver.left() == {}
    result = finished(here, *asked[1:])
    assert [c["status"] for c in result["cells"]] == ["ok"]


def test_the_workers_threads(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advplug.cluster import worker

    before = dict(os.environ)
    for name in worker.THREADS:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("ADVPLUG_CACHE", "/own")
    monkeypatch.delenv("ADVPLUG_OTHER", raising=False)
    shown = {"ADVPLUG_CACHE": "/driver", "ADVPLUG_OTHER": "1"}
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "folder").mkdir()
    worker._settle_in(worker.Surroundings("a", str(here / "folder"), ("/not/there",), shown, 3))
    try:
        assert {os.environ[name] for name in worker.THREADS} == {"3"}
        assert os.environ["ADVPLUG_CACHE"] == "/own"  # a machine's own word counts
        assert os.environ["ADVPLUG_OTHER"] == "1"
        assert Path.cwd() == here / "folder"
        assert sys.path[-1] == "/not/there"
        # What a run before this one has set is not the machine's own word.
        worker._settle_in(worker.Surroundings("b", "/not/there", (), {"ADVPLUG_OTHER": "2"}, 3))
        assert os.environ["ADVPLUG_OTHER"] == "2"
    finally:
        os.environ.clear()
        os.environ.update(before)
