"""The weight cache: shared by processes, whole or absent, verified, and clear about what stops it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from advplug import artifacts
from advplug.artifacts import Artifact, Artifacts, default_root
from advplug.contracts import Tuned
from advplug.errors import CellFailure, UsageError

CHILD = """
import sys, time, torch
from pathlib import Path
from advplug import artifacts
from advplug.artifacts import Artifact, Artifacts
root, count, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def make():
    with count.open("a") as file:
        file.write("made\\n")
    time.sleep(0.7)
    return Artifact({"w": torch.full((3,), 7.0)}, facts={"n": 1})
if mode == "share":
    print("ready", flush=True)
    found = Artifacts(root).get_or_make("key", make, "shared")
    print(found.tensors["w"].sum().item(), found.facts["n"], found.sha256)
elif mode == "half":
    def hang(folder):
        print("ready", flush=True)
        time.sleep(60)
    artifacts._flush = hang
    Artifacts(root).get_or_make("key", make)
else:
    for i in range(100000):
        Artifacts(root).get_or_make(f"k{i % 50}", lambda: Artifact({"w": torch.full((20000,), float(i))}))
        if i == 0:
            print("ready", flush=True)
        if i % 50 == 49:
            Artifacts(root).clear()
"""


def child(root: Path, mode: str) -> subprocess.Popen[str]:
    """A process that has begun its work."""
    command = [sys.executable, "-c", CHILD, str(root), str(root.parent / "count"), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def model(width: int = 3) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))
    net[1].running_mean.uniform_()
    net[1].num_batches_tracked.fill_(5)
    return net


def explode() -> Artifact:
    raise AssertionError("made although it is there")


def test_a_model_comes_back_with_buffers_structure_and_facts(tmp_path: Path) -> None:
    store = Artifacts(tmp_path / "deep" / "cache")
    net = model()
    net.double()
    tuned = Tuned(net, {"kept/0": torch.tensor([0, 2])}, {"parameters": [30, 20], "note": "ü"})
    first = store.get_or_make("k", lambda: Artifact.of(tuned), "net")
    again = store.get_or_make("k", explode)
    assert again.sha256 == first.sha256 != ""
    assert again.facts == tuned.facts
    assert again.structure["kept/0"].tolist() == [0, 2]
    other = model().double()
    other.load_state_dict(again.tensors)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert value.dtype == again.tensors[name].dtype


def test_tied_and_strided_tensors_can_be_stored(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    store = Artifacts(tmp_path)
    store.get_or_make("k", lambda: Artifact({"a": shared, "b": shared, "t": shared.T}))
    back = store.get_or_make("k", explode).tensors
    assert torch.equal(back["t"], shared.T)
    assert torch.equal(back["a"], back["b"])


def test_state_that_is_no_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> str:
            return "text"

        def set_extra_state(self, state: str) -> None:
            pass

    with pytest.raises(CellFailure, match="'_extra_state' is no tensor"):
        Artifact.of(Tuned(Odd()))


def test_what_make_raises_leaves_nothing(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)

    def fail() -> Artifact:
        raise CellFailure("no")

    with pytest.raises(CellFailure):
        store.get_or_make("k", fail)
    assert store.ls() == []
    assert store.get_or_make("k", lambda: Artifact({"w": torch.ones(1)})).sha256


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    both = [child(root, "share"), child(root, "share")]
    answers = [process.communicate(timeout=60) for process in both]
    assert answers[0] == answers[1]
    assert answers[0][0].startswith("21.0 1 ")
    assert (tmp_path / "count").read_text() == "made\n"


def test_killed_in_the_middle_nothing_is_visible(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    process = child(root, "half")
    process.kill()
    process.communicate()
    left = [p.name for p in root.iterdir() if not p.name.startswith(".")]
    assert len(left) == 1  # written, but never renamed
    assert ".part." in left[0]
    store = Artifacts(root)
    assert store.ls() == []
    store.get_or_make("other", lambda: Artifact({"w": torch.ones(1)}))
    assert [p.name for p in root.iterdir() if not p.name.startswith(".")] == ["other"]  # swept


def test_kills_at_random_times_spoil_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "cache"
    for _ in range(2):
        process = child(root, "many")
        time.sleep(random.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for entry in Artifacts(root).ls():
            found = Artifacts(root).get_or_make(entry.key, explode)
            assert len(found.tensors["w"].unique()) == 1
    assert caplog.text == ""


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "meta", "empty"])
def test_spoiled_files_are_set_aside_and_made_again(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Artifacts(tmp_path)
    store.get_or_make("k", lambda: Artifact({"w": torch.zeros(50)}))
    path = tmp_path / "k" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-7] ^= 1
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:-9])
    elif harm == "remove":
        path.unlink()
    elif harm == "meta":
        (tmp_path / "k" / "meta.json").write_text("[1")
    else:
        (tmp_path / "k" / "meta.json").unlink()
    made = store.get_or_make("k", lambda: Artifact({"w": torch.ones(50)}))
    assert made.tensors["w"].sum() == 50
    assert store.get_or_make("k", explode).tensors["w"].sum() == 50
    assert len(caplog.records) == 1
    assert "cached weights k are spoiled" in caplog.text
    assert len(list(tmp_path.glob("k.spoiled.*"))) == 1
    assert [e.key for e in store.ls()] == ["k"]


def test_listing_and_clearing(tmp_path: Path) -> None:
    store = Artifacts(tmp_path / "c")
    assert store.ls() == []
    assert store.clear() == 0
    for i in range(3):
        store.get_or_make(f"k{i}", lambda: Artifact({"w": torch.zeros(10)}), f"label {i}")
    (tmp_path / "c" / "k9.part.abc").mkdir()
    entries = store.ls()
    assert sorted(e.label for e in entries) == ["label 0", "label 1", "label 2"]
    assert all(e.bytes == (tmp_path / "c" / e.key / "weights.safetensors").stat().st_size for e in entries)
    assert all(e.made.startswith("20") and e.made.endswith("+00:00") for e in entries)
    assert store.clear() == 3
    assert [p.name for p in (tmp_path / "c").iterdir()] == [".locks"]


def test_clearing_leaves_what_is_being_made(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)

    def make() -> Artifact:
        (tmp_path / "k.part.now").mkdir()
        assert Artifacts(tmp_path).clear() == 0
        assert (tmp_path / "k.part.now").exists()
        return Artifact({"w": torch.zeros(1)})

    store.get_or_make("k", make)
    assert [e.key for e in store.ls()] == ["k"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Artifacts(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", full)
        with pytest.raises(UsageError, match="no space is left; free some, or set ADVPLUG_CACHE") as caught:
            store.get_or_make("k", lambda: Artifact({"w": torch.zeros(1)}))
    assert str(tmp_path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [".locks"]
    assert store.get_or_make("k", lambda: Artifact({"w": torch.zeros(1)})).sha256


def test_a_folder_that_cannot_be_written_stops_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used: Not a directory; mend that, or set ADVPLUG_CACHE"):
        Artifacts(tmp_path / "file" / "cache").get_or_make("k", explode)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="Permission denied"):
            Artifacts(tmp_path / "shut").get_or_make("k", explode)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "artifacts" == Artifacts().root
    monkeypatch.delenv("ADVPLUG_CACHE")
    assert default_root().parts[-2:] == ("advplug", "artifacts")


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "a.b"])
def test_keys_are_plain_names(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        Artifacts(tmp_path).get_or_make(key, explode)
