"""Where cells are computed: what can be asked for, in which order it is done, and what a cache hands to another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from advplug import executors
from advplug.artifacts import Artifact, Artifacts
from advplug.errors import UsageError
from advplug.executors import Placement
from advplug.runner import Runner, limits
from advplug.session import Request, certificates, plan_all
from advplug.store import Store
from advplug.work import AuditPlan, Job, Options, victims_of
from cli_tools import CNN, QUICK, TINY, run

REFUSED = [
    (("--executor", "rya"), "no executor is called 'rya'; did you mean 'ray'?"),
    (("--executor", "slurm"), "no executor is called 'slurm'; there are in-process and ray"),
    (("--address", "auto"), "--address goes with --executor ray"),
    (("--gpus-per-cell", "0.5"), "--gpus-per-cell goes with --executor ray"),
    (("--cpus-per-cell", "2"), "--cpus-per-cell goes with --executor ray"),
    (("--executor", "ray", "--gpus-per-cell", "2"), "takes a share of one GPU, 0 to 1, got 2"),
    (("--executor", "ray", "--gpus-per-cell", "-1"), "takes a share of one GPU, 0 to 1, got -1"),
    (("--executor", "ray", "--cpus-per-cell", "0"), "--cpus-per-cell must be at least 1, got 0"),
    (("--executor", "ray", "--device", "cuda:1"), "Ray chooses the GPU of each cell; use --device cuda"),
    (("--executor", "ray", "--device", "cpu", "--gpus-per-cell", "0.5"), "--device cpu uses no GPU"),
    (("--executor", "ray", "--device", "cuda", "--gpus-per-cell", "0"), "--device cuda needs a GPU for each cell"),
    (("--executor", "ray", "--address", "ray://head:10001"), "is a Ray Client address; run advplug on a machine of"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_what_cannot_be_asked_for(options: tuple[str, ...], told: str) -> None:
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", *options)
    assert ran.code == 2
    assert told in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not list(Path.cwd().iterdir())


def test_all_commands_that_compute_say_so() -> None:
    Path("m.yaml").write_text(f"models: {CNN}\nattacks: fgsm\ndatasets: '{TINY}'\n")
    for command in (("run", "m.yaml"), ("transfer", "--dataset", TINY, "-m", CNN, "-m", "cnn-a:epochs=1")):
        ran = run(*command, "--executor", "rya")
        assert (ran.code, ran.err) == (2, "Error: no executor is called 'rya'; did you mean 'ray'?\n")


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None if name == "ray" else known(name))
    ran = run("eval", "--dataset", TINY, "-m", CNN, "-a", "fgsm", "--executor", "ray", "-o", "out", "--fresh")
    assert (ran.code, ran.err) == (
        2,
        "Error: Ray is not installed; pip install 'advplug[ray]', or leave --executor out\n",
    )
    assert not Path("out").exists()


def test_placements_that_can_be_asked_for() -> None:
    for placement, device in (
        (Placement(), "cuda:1"),
        (Placement("ray"), "auto"),
        (Placement("ray", "auto", 0.5, 4), "cuda"),
        (Placement("ray", "10.0.0.1:6379", 0), "cpu"),
    ):
        placement.check(device)
    with pytest.raises(UsageError):
        Placement("In-Process").check("cpu")


# --- the order of work, and what is due ---


def runner_of(folder: Path, **asked: Any) -> Runner:
    request = Request(models=(CNN,), datasets=(TINY,), budgets=("8/255",), **asked)
    sweeps, poisons = plan_all(request)
    return Runner(sweeps, Store(folder), Options(), certificates=certificates(request, sweeps), poisonings=poisons)


def named(piece: Any) -> str:
    kind = "" if hasattr(piece, "attack") else "audit of " if isinstance(piece, AuditPlan) else "certificate of "
    return f"{kind}{piece.attack.label if not kind else 'it'} on {piece.victim.defense_label}"


def test_pieces_come_in_an_order_in_which_each_finds_what_it_needs(folder: Path) -> None:
    runner = runner_of(folder, attacks=("fgsm", "noise", "ba:count=4"), defenses=("smoothing",))
    with runner.store:
        pieces = runner.pieces()
        assert [named(p) for p in pieces] == [
            "fgsm on none",
            "noise on none",
            "audit of it on none",
            "fgsm on smoothing",
            "noise on smoothing",
            "audit of it on smoothing",
            "certificate of it on smoothing",
            "ba:count=4 on none",
            "ba:count=4 on smoothing",
        ]
        keys = [p.key for p in pieces]
        assert [[keys.index(before) for before in runner.after(p)] for p in pieces] == [
            [], [], [0, 1], [0], [1], [3, 4], [], [], [],
        ]  # fmt: skip
        assert [len(victims_of(p)) for p in pieces] == [1, 1, 1, 1, 1, 1, 1, 2, 2]
        assert limits(runner.sweeps) == {TINY: None}


def test_due_is_what_is_not_stored_with_what_others_need_of_it(folder: Path) -> None:
    asked = ("-m", CNN, "-a", "fgsm", "-d", "bit-depth", "-e", "8/255", "--dataset", TINY, "-o", "out")
    runner = runner_of(folder / "out", attacks=("fgsm",), defenses=("bit-depth",))
    with runner.store:
        base, audit, defended, _ = runner.pieces()
        assert runner.due(base) == Job(base, keep=True)
        assert runner.due(audit) is None  # nothing has been found that it could look at
        assert runner.due(defended) == Job(defended)  # no images of the baseline are at hand
    assert run("eval", *asked, *QUICK).code == 0
    runner = runner_of(folder / "out", attacks=("fgsm",), defenses=("bit-depth",))
    with runner.store:
        jobs = [runner.due(piece) for piece in runner.pieces()]
        assert [job is None for job in jobs] == [True, False, True, False]
        assert [len(job.found[0].y) for job in jobs if job and job.found[0]] == [20, 20]
    assert run("eval", *asked).code == 0
    runner = runner_of(folder / "out", attacks=("fgsm",), defenses=("bit-depth",))
    with runner.store:
        assert [runner.due(p) for p in runner.pieces()] == [None] * 4


# --- weights on their way to another cache ---


def never() -> Artifact:
    raise AssertionError("made again")


def test_weights_go_from_one_cache_to_another(folder: Path) -> None:
    here, there = Artifacts(folder / "here"), Artifacts(folder / "there")
    assert here.packed("key") is None
    assert not here.has("key")
    made = here.get_or_make("key", lambda: Artifact({"w": torch.arange(3.0)}, facts={"a": 1}), "label")
    files = here.packed("key")
    assert files is not None
    assert there.add("key", files)
    assert not there.add("key", files)
    found = there.get_or_make("key", never)
    assert found.tensors["w"].tolist() == [0, 1, 2]
    assert (found.facts, found.sha256) == ({"a": 1}, made.sha256)
    assert [(e.key, e.label) for e in there.ls()] == [("key", "label")]
    assert not list((folder / "there").glob("*.part.*"))


def test_weights_that_were_spoiled_on_the_way_are_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, there = Artifacts(folder / "here"), Artifacts(folder / "there")
    here.get_or_make("key", lambda: Artifact({"w": torch.zeros(1)}))
    files = here.packed("key")
    assert files is not None
    name = "weights.safetensors"
    there.add("key", {**files, name: files[name][:-1] + b"\1"})
    assert there.packed("key") is None
    assert there.get_or_make("key", lambda: Artifact({"w": torch.ones(1)})).tensors["w"].tolist() == [1]
    assert "are spoiled" in caplog.text
