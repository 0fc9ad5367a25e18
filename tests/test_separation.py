"""`leakage: yes` of a matrix file: evaluated images in the training data end the run, and their absence is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cli_tools import run
from conftest import ROOT


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def npz(path: str, x: np.ndarray) -> None:
    np.savez(path, x=x, y=np.arange(len(x)) % 2)


def matrix(**keys: object) -> Path:
    """A matrix file on train.npz and test.npz; training and evaluation images differ unless files say otherwise."""
    own = {"datasets": "npz:train=train.npz,test=test.npz", "models": "cnn:epochs=1", "attacks": "noise",
           "eps": "8/255", "audit": "none", "leakage": "yes"}  # fmt: skip
    path = Path("m.yaml")
    path.write_text(yaml.safe_dump({**own, **keys}))
    return path


def test_that_there_is_none_stands_with_the_results() -> None:
    npz("train.npz", pixels(30, 0))
    npz("test.npz", pixels(10, 1))
    ran = run("run", matrix(n=6), "-o", "out")
    said = "npz:train=train.npz,test=test.npz: none of 6 evaluation images found among 30 training images"
    assert ran.code == 0, ran.err
    assert f"leakage: {said}" in ran.out
    (found,) = run("run", "m.yaml", "-o", "out", "--json").json["run"]["leakage"]
    assert (found["dataset"], found["train"], found["evaluation"]) == (said.partition(": ")[0], 30, 6)
    assert any("sources" in what for what in found["unchecked"])
    assert json.loads(run("export", "out", "--format", "json").out)["run"]["leakage"] == [found]
    assert run("report", "out", "-o", "page.html").code == 0
    assert "none of 6 evaluation images found among 30 training images" in Path("page.html").read_text()


def test_a_planted_copy_ends_the_run_before_anything_is_trained() -> None:
    training, evaluation = pixels(30, 0), pixels(10, 1)
    training[7] = evaluation[3]
    npz("train.npz", training)
    npz("test.npz", evaluation)
    ran = run("run", matrix(), "-o", "out")
    assert ran.code == 1
    (line,) = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert "npz:train=train.npz,test=test.npz: 1 of 10 evaluation images are in the training data" in line
    assert "(same pixels)" in line
    assert not Path("out").exists()


def test_only_evaluated_images_count_and_only_where_it_is_asked_for() -> None:
    training, evaluation = pixels(30, 0), pixels(10, 1)
    npz("test.npz", evaluation)
    npz("train.npz", training)
    kept = run("run", matrix(n=4), "-o", "a", "--json").json["cells"][0]["provenance"]["images"]["indices"]
    judged = {i for part in kept.split(",") for i in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}
    training[:6] = evaluation[[i for i in range(10) if i not in judged]]
    npz("train.npz", training)
    assert run("run", matrix(n=4), "-o", "b").code == 0
    assert run("run", matrix(), "-o", "c").code == 1
    told = run("run", matrix(leakage="no"), "-o", "d")
    assert told.code == 0
    assert "leakage" not in told.out


def test_data_that_cannot_be_read_are_named() -> None:
    Path("photos/a").mkdir(parents=True)
    Path("photos/b").mkdir()
    for i in range(10):
        Path(f"photos/{'ab'[i % 2]}/{i}.png").write_bytes(b"no image")
    ran = run("run", matrix(datasets="folder:photos,size=8", models="cnn:epochs=1"), "-o", "out")
    assert ran.code == 2
    assert "folder:photos,size=8: " in ran.err
    assert len(ran.err.splitlines()) == 1


def test_the_study_of_captions_finds_a_copy_that_was_saved_anew() -> None:
    pytest.importorskip("advplug_clip")
    rows = []
    for i in range(12):
        coarse = Image.fromarray(pixels(1, i)[0])
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(f"{i}.png")
        rows.append(f"{i}.png,what is number {i}\n")
    Image.open("3.png").save("again.jpg", quality=90)
    Path("test.csv").write_text("image,caption\n" + "".join(rows[:6]))
    Path("train.csv").write_text("image,caption\n" + "".join(rows[6:]) + "again.jpg,something else\n")
    data = "captions:train.csv,test=test.csv,size=32"
    ran = run("run", ROOT / "recipes" / "s3-caption-pgd.yaml", "--scale", "smoke", "--dataset", data, "-n", "6")
    assert ran.code == 1
    assert "1 of 6 evaluation images are in the training data: again.jpg and 3.png (near copy)" in ran.err
