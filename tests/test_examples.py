"""The example for students runs as it stands, finds what its text says, and is a notebook."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, python

EXAMPLES = ROOT / "examples"
FOOLED = EXAMPLES / "fooled.py"


@pytest.fixture(scope="module")
def notebook() -> Any:
    spec = importlib.util.spec_from_file_location("notebook", EXAMPLES / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shares(text: str, start: str) -> list[int]:
    """The percentages of the line that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [int(found) for found in re.findall(r"(\d+) %", line)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs_and_finds_what_it_says() -> None:
    quiet = ("-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive")
    done = python(*quiet, str(FOOLED), cwd=EXAMPLES, MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    told = done.stdout
    (clean,), (attacked,) = shares(told, "clean accuracy"), shares(told, "under attack")
    assert clean >= 95
    assert attacked <= 10
    (bare,), (static,) = shares(told, "attacked, without JPEG"), shares(told, "the same attacked images, with JPEG")
    (adaptive,) = shares(told, "images made for the network with JPEG")
    assert static >= bare + 40, "seems to help"
    assert adaptive <= static - 30, "and does not"
    assert "trusted" in told
    assert "jpeg:quality=20: " in told
    assert ", upper bound" in told
    _, usual = shares(told, "trained as usual")
    _, hardened = shares(told, "trained on attacked images")
    assert hardened >= usual + 30


def test_the_example_is_a_notebook(notebook: Any, tmp_path: Path) -> None:
    assert notebook.main([str(FOOLED), "-o", str(tmp_path / "fooled.ipynb")]) == 0
    made = json.loads((tmp_path / "fooled.ipynb").read_text())
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    cells = made["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) >= 16
    texts = ["".join(cell["source"]) for cell in cells]
    assert texts[0].startswith("# Fooled by a defense\n\nA network")
    code = [text for cell, text in zip(cells, texts, strict=True) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    assert all(not re.search("^#( |$)", t, re.MULTILINE) or t.startswith("#") for t in texts)
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.parse(FOOLED.read_text())), "no line is lost"
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(made))


def test_a_second_conversion_is_the_same(notebook: Any) -> None:
    assert notebook.notebook(FOOLED.read_text()) == notebook.notebook(FOOLED.read_text())


@pytest.mark.parametrize(("text", "said"), [
    ("import os\n# %%\n", "has to begin with a cell"), ("", "has to begin with a cell"),
    ("# %% [markdown]\n# fine\nx = 1\n", "unlike 'x = 1'"),
])  # fmt: skip
def test_what_is_no_example_is_told(
    notebook: Any, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        notebook.main([str(tmp_path / "x.py")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_told(notebook: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        notebook.main([str(tmp_path / "none.py")])
    assert "No such file" in capsys.readouterr().err
