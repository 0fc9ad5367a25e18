"""Explanations: on a linear model in closed form, and of a real run that is built again."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("captum", reason="explanations need captum (pip install 'advplug[explain]')")

from advplug.report.explain import METHODS, _maps, coloured, explanations
from advplug.report.page import write
from advplug.victim import Victim
from cli_tools import CNN, QUICK, evaluate, run
from linear import Affine
from page_reader import numbers, parse, pixels, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_maps_of_a_linear_model_are_its_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 16)
    victim = Victim(Affine(weight, torch.zeros(3)), 3)
    x = torch.rand(2, 1, 4, 4)
    labels = torch.tensor([2, 0])
    with victim.frozen():
        maps = dict(_maps(victim, x, labels))
    assert tuple(maps) == METHODS
    own = weight[labels].reshape(2, 4, 4).double().numpy()
    np.testing.assert_allclose(maps["saliency"], np.abs(own), rtol=1e-5)
    # The mean of samples of weight x (pixel - baseline), baselines black or the mean image: between the two.
    inside = x[:, 0].double().numpy()
    mean = inside.mean(axis=0)
    ends = np.sort(np.stack([own * inside, own * (inside - mean)]), axis=0)
    assert (maps["GradientShap"] >= ends[0] - 0.1).all()
    assert (maps["GradientShap"] <= ends[1] + 0.1).all()
    # Four by four pixels are sixteen patches of one: a black pixel takes weight x pixel away.
    found, true = maps["LIME"].ravel(), (own * inside).ravel()
    assert np.corrcoef(found, true)[0, 1] > 0.95


def test_orange_speaks_for_and_blue_against_and_white_is_nothing() -> None:
    shown = coloured(np.array([[[2.0, -2.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert shown.shape == (2, 3, 2, 2)
    assert shown[0, :, 0, 0].tolist() == [213, 94, 0]
    assert shown[0, :, 0, 1].tolist() == [0, 114, 178]
    assert shown[0, :, 1, 0].tolist() == [255, 255, 255]
    assert (shown[0, :, 1, 1] > shown[0, :, 0, 0]).all()
    assert (shown[1] == 255).all()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    evaluate("-m", CNN, "-a", "fgsm", "-d", "jpeg", "-e", "0.3", *QUICK, output=folder)
    return folder


def test_a_run_is_explained_clean_and_attacked_side_by_side(out: Path) -> None:
    done = run("report", out, "--explain", "--device", "cpu", "--offline")
    assert (done.code, done.err) == (0, "")
    text = (out / "report.html").read_text()
    section = parse(text).one("section", id="explanations")
    grids = section.all("details")
    assert [g.one("summary").text.split(" on ")[0] for g in grids] == [CNN, f"{CNN}+jpeg"]
    for grid in grids:
        assert [tr.one("th").text for tr in grid.all("tr", class_="strip")] == ["image, answer", *METHODS]
        assert grid.one("table", class_="images").one("thead").text.split().count("attacked") == 4
        assert all(len(pixels(i)) == 8 for i in grid.all("img"))
        (table,) = (t for t in grid.all("table") if "images" not in t.attributes.get("class", ""))
        assert len(rows(table)) == 4
        found = numbers(table)
        assert all(-1 <= n[m] <= 1 for n in found for m in METHODS if m in n)
    assert run("report", out, "--explain", "-o", out / "again.html").code == 0
    assert (out / "again.html").read_text() == text


def test_other_weights_than_those_evaluated_are_not_explained(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    with sqlite3.connect(tmp_path / "out" / "results.sqlite") as db:
        for key, text in db.execute("SELECT key, cell FROM cell").fetchall():
            made = json.loads(text)
            made["provenance"]["weights_sha256"] = "0" * 64
            db.execute("UPDATE cell SET cell=? WHERE key=?", (json.dumps(made), key))
    db.close()
    page = parse(write(tmp_path / "out", explain=explanations).read_text())
    section = page.one("section", id="explanations")
    assert not section.all("details")
    assert section.text.count("the weights that are made now are not those that were evaluated") == 2
