"""Checkpoint files: every way in which one can be wrong ends in one clear line, and no code in one ever runs."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advplug import weights
from advplug.errors import UsageError
from conftest import python

STATE = {"conv.weight": torch.rand(4, 3, 2, 2), "conv.bias": torch.rand(4), "n": torch.tensor(5)}


class Evil:
    """A pickle of it would create a file on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 2), bn=nn.BatchNorm2d(4)))


def saved(path: Path, content: Any, older: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not older)
    return path


@pytest.mark.parametrize("older", [False, True])
def test_torch_checkpoints_of_both_formats(tmp_path: Path, older: bool) -> None:
    state = {f"module.{n}": v for n, v in STATE.items()}
    content = {
        "state_dict": OrderedDict(state),
        "epoch": 3,
        "best": torch.ones(1),
        "names": ["a"],
        "more": [{1}, 1j, b"x", Counter("a")],
    }
    path = saved(tmp_path / "a.th", content, older)
    assert weights.shapes(path, "state_dict", "module.") == {n: tuple(v.shape) for n, v in STATE.items()}
    loaded = weights.load(path, "state_dict", "module.")
    assert all(torch.equal(loaded[n], v) for n, v in STATE.items())


def test_parameters_count_as_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", dict(net().named_parameters()))
    assert weights.shapes(path)["conv.weight"] == (4, 3, 2, 2)
    assert not weights.load(path)["conv.weight"].requires_grad


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"  # told by content, not by name
    save_file(STATE, path)
    assert weights.shapes(path) == {n: tuple(v.shape) for n, v in STATE.items()}
    assert all(torch.equal(v, STATE[n]) for n, v in weights.load(path).items())
    with pytest.raises(UsageError, match="leave key= out"):
        weights.load(path, "state_dict")


def test_shapes_need_no_torch(tmp_path: Path) -> None:
    for path in (saved(tmp_path / "a.pt", STATE), saved(tmp_path / "b.pt", STATE, older=True)):
        code = "import pathlib, sys; from advplug import weights; print(weights.shapes(pathlib.Path(sys.argv[1])))"
        done = python("-c", code + "; assert 'torch' not in sys.modules", str(path))
        assert "(4, 3, 2, 2)" in done.stdout, done.stderr


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("where", ["inside", "alone"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, older: bool, where: str) -> None:
    trap = tmp_path / "ran"
    content = {"w": torch.ones(1), "x": Evil(trap)} if where == "inside" else Evil(trap)
    path = saved(tmp_path / "evil.pt", content, older)
    for read in (weights.shapes, weights.load):
        with pytest.raises(UsageError, match=r"nothing was run.*weights_only=True.*safetensors.torch.save_file"):
            read(path)
    assert not trap.exists()


def test_code_outside_torch_checkpoints_never_runs(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(UsageError, match="nothing was run"):
        weights.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UsageError, match="a pickle, but no torch checkpoint"):
        weights.load(path)
    assert not trap.exists()


def test_whole_models_and_namespaces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no named tensors .*; save model.state_dict\(\) instead"):
        weights.load(saved(tmp_path / "a.pt", net()))
    for content, name in (
        ({"w": torch.ones(1), "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
        ({"w": torch.ones(1), "best": np.float64(1)}, r"numpy\.\S+\.scalar"),
        ({"w": torch.ones(1), "d": defaultdict(list)}, "collections.defaultdict"),
    ):
        with pytest.raises(UsageError, match=rf"only run code can restore \({name}\)"):
            weights.load(saved(tmp_path / "a.pt", content))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    def check(content: bytes, words: str, name: str = "w.pt") -> None:
        (tmp_path / name).write_bytes(content)
        for read in (weights.shapes, weights.load):
            with pytest.raises(UsageError, match=words) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)

    check(b"\n <!DOCTYPE html><html>Google Drive - Virus scan warning</html>", "HTML or XML page.*fetch it again")
    check(b"", "is empty")
    check(b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull")
    check(b"just some text", "no checkpoint that can be read")
    for older in (False, True):
        whole = saved(tmp_path / "good.pt", STATE, older).read_bytes()
        for share in (0.2, 0.5, 0.97):
            words = "truncated|no checkpoint that can be read" + ("|damaged" if older else "")
            (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(UsageError, match=words):
                weights.load(tmp_path / "cut.pt")
    save_file(STATE, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    check(whole[:-1], f"truncated: {len(whole) - 1} bytes instead of {len(whole)}", "w.safetensors")
    check(whole[:60], "no readable safetensors file", "w.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but such files are about
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(UsageError, match="TorchScript archive"):
        weights.load(tmp_path / "script.pt")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no weights file .*wieghts.pt; did you mean 'weights.pt'\?"):
        weights.load(tmp_path / "wieghts.pt")
    with pytest.raises(UsageError, match=r"there is no folder .*gone"):
        weights.load(tmp_path / "gone" / "weights.pt")
    with pytest.raises(UsageError, match="is a folder"):
        weights.load(tmp_path)


def test_entries_and_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"model": STATE, "epoch": 1})
    with pytest.raises(UsageError, match="no tensors at its top level; write key=model"):
        weights.load(path)
    with pytest.raises(UsageError, match="no entry 'net'; it has model, epoch"):
        weights.load(path, "net")
    with pytest.raises(UsageError, match=r"no name begins with 'module.', the first is 'conv.weight'"):
        weights.load(path, "model", "module.")
    with pytest.raises(UsageError, match="holds no named tensors"):
        weights.load(saved(tmp_path / "b.pt", [torch.ones(1)]))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pt", net().state_dict()
    model = net()
    weights.fill(model, {n: v for n, v in state.items() if "batches" not in n}, path)
    assert torch.equal(model.conv.weight, state["conv.weight"])
    with pytest.raises(UsageError, match=r"6 missing.*6 unexpected.*write strip=module\.$"):
        weights.fill(model, {f"module.{n}": v for n, v in state.items() if "batches" not in n}, path)
    with pytest.raises(UsageError, match=r"1 missing \(such as conv.bias\), 0 unexpected.*another architecture"):
        weights.fill(model, {n: v for n, v in state.items() if n != "conv.bias"}, path)
    with pytest.raises(UsageError, match="0 missing, 1 unexpected"):
        weights.fill(model, {**state, "fc.weight": torch.ones(1)}, path)
    weights.fill(model, {**state, "aux.weight": torch.ones(1)}, path, ignore=("aux.",))
    with pytest.raises(UsageError, match=r"1 of 7 tensors have another shape, conv.bias is 5 in the file and 4"):
        weights.fill(model, {**state, "conv.bias": torch.ones(5)}, path)


def test_hashes_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"abc")
    assert weights.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abcd")
    assert (
        weights.sha256(path)
        == weights.digest(path)
        != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
