"""`advplug plot`: every kind of figure, its numbers read back from what is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advplug.errors import UsageError
from advplug.estimate import Estimate, rate
from advplug.plots.kinds import figure_of, front
from advplug.results import RunResult
from advplug.stored.runs import read
from cli_tools import run
from conftest import python
from run_folders import INFO, UNTRUSTED, cell, evidence, poisoned, poisoning, stored, threat

N = 50
HALF, ROUNDED = "denoise:sigma=0.5", "denoise:sigma=2"


def curves(canvas: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of the lines of a panel that the legend names."""
    lines = [line for line in canvas.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata().round(6)] for line in lines}


def bars(canvas: Any) -> dict[str, tuple[float, float]]:
    """The middle of every errorbar by its name in the legend."""
    return {c.get_label(): tuple(map(float, c.lines[0].get_xydata()[0].round(6))) for c in canvas.containers}


def drawn(result: RunResult, kind: str) -> Any:
    """The only panel."""
    panels = [p for p in figure_of(result, kind).axes if p.get_title()]
    assert len(panels) == 1
    return panels[0]


def words(file: Path) -> list[str]:
    """The texts of an SVG."""
    return [e.text or "" for e in ET.fromstring(file.read_text()).iter() if e.tag.endswith("}text")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model bare and behind two strengths of one defense, under two attacks; what is left at two budgets."""
    weak, strong = evidence(range(20)), evidence(range(35))
    filtered = evidence(range(30), static=np.isin(np.arange(N), range(10))[:, None])
    return stored(
        tmp_path_factory.mktemp("plot") / "run",
        (cell(weak), weak),
        (cell(strong, attack="square:queries=100"), strong),
        (cell(filtered, defense=HALF), filtered),
        (cell(filtered, defense=ROUNDED), filtered),
        (cell(defense=ROUNDED, attack="square:queries=100", status="failed", reason="x"), None),
        (cell(strong, eps="1/5"), strong),
        threats=(
            threat(worst=0.3),
            threat(eps="1/5", worst=0.1, verdict="upper bound"),
            threat(clean=0.8, worst=0.4, defense=HALF),
            threat(clean=0.7, worst=0.5, defense=ROUNDED, **UNTRUSTED),
        ),
    )


def test_a_curve_goes_through_the_accuracies(folder: Path, tmp_path: Path) -> None:
    panel = drawn(read(folder), "curve")
    assert curves(panel) == {
        "undefended": [(0, 90), (0.1, 30), (0.2, 10)],
        HALF: [(0, 80), (0.1, 40)],
        ROUNDED: [(0, 70), (0.1, 50)],
    }
    file = tmp_path / "curve.svg"
    assert run("plot", folder, "--kind", "curve", "-o", file).code == 0
    told = words(file)
    assert {"cnn on digits, linf", "undefended", HALF, "verdict: upper bound", "verdict: not trustworthy"} <= set(told)
    first = file.read_bytes()
    assert run("plot", folder, "-k", "curve", "-o", file).code == 0
    assert file.read_bytes() == first


def test_a_sweep_goes_along_the_number_of_the_defense(folder: Path) -> None:
    # The budget at which the defense was not evaluated has no panel.
    panel = drawn(read(folder), "sweep")
    assert panel.get_title() == "cnn on digits, linf 1/10"
    assert panel.get_xlabel() == "denoise sigma"
    found = curves(panel)
    assert found["clean"] == [(0.5, 80), (2, 70)]
    assert found["static attack"] == [(0.5, 80), (2, 80)]
    assert found["adaptive attack"] == [(0.5, 40), (2, 40)]
    assert found["robust: the worst of all"] == [(0.5, 40), (2, 50)]


def test_a_sweep_is_found_among_other_defenses_and_has_no_panel_of_single_values(folder: Path) -> None:
    result = read(folder)
    others = [threat(defense=name, worst=0.2) for name in ("jpeg:quality=50", "jpeg:quality=70", "bit-depth")]
    lone = threat(dataset="fake", defense=HALF, worst=0.2)
    third = threat(defense="denoise:method=bilateral,sigma=3", worst=0.2)
    mixed = RunResult(INFO, result.cells, (*result.threats, *others, lone, third))
    panel = drawn(mixed, "sweep")
    assert panel.get_title() == "cnn on digits, linf 1/10"
    assert [x for x, _ in curves(panel)["clean"]] == [0.5, 2, 3]
    # JPEG has as many values as the filter, which comes first.
    assert drawn(RunResult(INFO, (), mixed.threats[:-1]), "sweep").get_xlabel() == "denoise sigma"


def test_a_pareto_front_leaves_out_what_is_not_trustworthy(folder: Path) -> None:
    result = read(folder)
    tenth = RunResult(INFO, result.cells, tuple(t for t in result.threats if t.eps == "1/10"))
    panel = drawn(tenth, "pareto")
    assert bars(panel) == {"cnn": (90, 30), f"cnn ({HALF})": (80, 40), f"cnn ({ROUNDED})": (70, 50)}
    (_, _, (across, up)) = panel.containers[0].lines
    clean, robust = rate(45, N), rate(15, N)
    assert clean is not None
    assert robust is not None
    np.testing.assert_allclose(across.get_segments()[0][:, 0], [100 * (clean.low or 0), 100 * (clean.high or 0)])
    np.testing.assert_allclose(up.get_segments()[0][:, 1], [100 * (robust.low or 0), 100 * (robust.high or 0)])
    assert curves(panel)["best trade-off"] == [(80, 40), (90, 30)]


def test_the_front_is_what_no_other_point_beats() -> None:
    assert front([(0.9, 0.1), (0.8, 0.3), (0.7, 0.2), (0.6, 0.5), (0.6, 0.4), (0.8, 0.3)]) == [
        (0.6, 0.5), (0.8, 0.3), (0.9, 0.1),
    ]  # fmt: skip
    assert front([]) == []


def test_a_heatmap_writes_its_numbers_into_its_fields(folder: Path, tmp_path: Path) -> None:
    result = read(folder)
    figure = figure_of(result, "heatmap")
    panel = next(p for p in figure.axes if p.get_title() == "robust accuracy in %, digits, linf 1/10")
    victims = [t.get_text() for t in panel.get_yticklabels()]
    attacks = [t.get_text() for t in panel.get_xticklabels()]
    assert victims == ["cnn", f"cnn ({HALF})", f"cnn ({ROUNDED})"]
    assert attacks == ["pgd", "square:queries=100", "worst case"]
    texts = {t.get_position(): t.get_text() for t in panel.texts}
    rows = [[texts[x, y] for x in range(3)] for y in range(3)]
    assert rows == [["60.0", "30.0", "30.0"], ["40.0", "-", "40.0"], ["40.0", "-", "50.0"]]
    values = np.ma.filled(panel.images[0].get_array(), np.nan)
    np.testing.assert_allclose(values, [[60, 30, 30], [40, np.nan, 40], [40, np.nan, 50]])
    file = tmp_path / "heatmap.svg"
    assert run("plot", folder, "-k", "heatmap", "-o", file).code == 0
    assert [t for t in words(file) if re.fullmatch(r"\d+\.\d|-", t)] == [n for row in rows for n in row] + ["30.0"]


def test_a_heatmap_names_transferred_images_by_their_source() -> None:
    seen = evidence(range(25))
    cells = tuple(cell(seen, attack=f"transfer:from={m},attack=pgd") for m in ("cnn-a", "cnn-b"))
    panel = drawn(RunResult(INFO, cells, ()), "heatmap")
    assert [t.get_text() for t in panel.get_xticklabels()] == ["from cnn-a", "from cnn-b"]


def test_static_and_adaptive_stand_on_one_line(folder: Path) -> None:
    panel = drawn(read(folder), "static-adaptive")
    assert [t.get_text() for t in panel.get_yticklabels()] == [f"cnn ({HALF})", f"cnn ({ROUNDED})"]
    marks = [(c.get_label(), *map(float, c.lines[0].get_xydata()[0])) for c in panel.containers]
    assert marks == [("static attack", 80, 0), ("adaptive attack", 40, 0),
                     ("static attack", 80, 1), ("adaptive attack", 40, 1)]  # fmt: skip
    clean = [tuple(line.get_xydata()[0].round(6)) for line in panel.get_lines() if line.get_label() == "clean"]
    assert clean == [(80, 0), (70, 1)]
    joined = [line.get_xydata()[:, 0].tolist() for line in panel.get_lines() if line.get_color() == "#bbbbbb"]
    assert joined == [[40, 80], [40, 80]]
    assert panel.yaxis_inverted()
    names = [t.get_text() for t in panel.figure.legends[0].get_texts()]
    assert sorted(names) == ["adaptive attack", "clean", "static attack"]


def test_similarities_stand_there_as_they_are(tmp_path: Path) -> None:
    def attacked(attack: str, static: float, adaptive: float) -> Any:
        values = {"static_similarity": static, "adaptive_similarity": adaptive, "adversarial_similarity": adaptive}
        made = {name: Estimate(value, value - 0.02, value + 0.02, N) for name, value in values.items()}
        bare = replace(cell(defense=HALF, attack=attack, goal="minimise:similarity"), metrics=made)
        return bare, None

    clean = {"clean_similarity": Estimate(0.7, 0.68, 0.72, N), "worst_case_similarity": Estimate(0.3, 0.28, 0.32, N)}
    row = replace(threat(defense=HALF), goal="minimise:similarity", worst_case_accuracy=None, **clean)
    cells = attacked("caption-pgd", 0.6, 0.4), attacked("caption-pgd:steps=50", 0.62, 0.3)
    panel = drawn(read(stored(tmp_path / "run", *cells, threats=(row,))), "static-adaptive")
    assert bars(panel) == {"static attack": (0.6, 0), "adaptive attack": (0.3, 0)}
    assert curves(panel)["clean"] == [(0.7, 0)]
    assert panel.get_xlabel() == "cosine of images and their own texts"
    assert panel.get_xlim()[1] < 1
    assert panel.get_title() == "digits, linf 1/10"


def poisons(path: Path, *made: tuple[str, int], **more: Any) -> Path:
    return stored(path, poisonings=[(poisoning(e := poisoned(hits), attack=a, **more), e) for a, hits in made])


def test_success_goes_along_the_number_of_the_attack(tmp_path: Path) -> None:
    run_folder = poisons(tmp_path / "run", ("ba:count=70", 30), ("ba:count=7", 4), verdict="upper bound")
    panel = drawn(read(run_folder), "success")
    assert panel.get_xlabel() == "ba count"
    assert curves(panel) == {
        "triggered as wanted, undefended": [(7, 10), (70, 75)],
        "clean accuracy, undefended": [(7, 100), (70, 100)],
        "triggered as wanted, clean model": [(7, 0), (70, 0)],
    }
    file = tmp_path / "success.svg"
    assert run("plot", run_folder, "-k", "success", "-o", file).code == 0
    assert {"ba count", "cnn on digits", "share, %", "verdict: upper bound"} <= set(words(file))


def test_rounds_show_what_a_training_trusted(tmp_path: Path) -> None:
    rounds = [{"trusted": 60, "poisons": 1, "precision": 0.95, "recall": 0.5},
              {"trusted": 80, "poisons": 2, "precision": 0.98, "recall": 0.75}]  # fmt: skip
    facts = {"facts": {"safeclip": {"rounds": rounds}}}
    run_folder = poisons(tmp_path / "run", ("ba", 4), defense="safeclip", provenance=facts)
    panel = drawn(read(run_folder), "rounds")
    assert curves(panel) == {
        "clean share of the trusted": [(1, 95), (2, 98)],
        "trusted share of the clean": [(1, 50), (2, 75)],
        "trusted share of the poisons": [(1, round(100 / 7, 6)), (2, round(200 / 7, 6))],
    }
    assert run("plot", run_folder, "-k", "rounds", "-o", tmp_path / "rounds.png").code == 0
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("curve", "it needs finished threats"),
        ("sweep", "one defense with several values of one number"),
        ("pareto", "it needs finished threats with an accuracy"),
        ("heatmap", "it needs attacked cells"),
        ("static-adaptive", "it needs a defended model"),
        ("success", "one attack on training data with several values"),
        ("rounds", "a training that chooses what to trust"),
    ],
)
def test_a_run_without_it_is_told_what_a_kind_needs(kind: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        figure_of(RunResult(INFO, (), ()), kind)


def test_what_cannot_be_drawn_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments, told in (
        ((folder, "-k", "curve", "-o", tmp_path / "x.gif"), "advplug draws .svg, .png, .pdf files"),
        ((folder, "-k", "rounds", "-o", tmp_path / "x.svg"), "the run holds nothing for rounds"),
        ((tmp_path, "-k", "curve", "-o", tmp_path / "x.svg"), "holds no results.sqlite"),
        ((folder, "-k", "pie", "-o", tmp_path / "x.svg"), "'pie' is not one of 'curve'"),
    ):
        ran = run("plot", *arguments)
        assert ran.code == 2
        assert told in ran.err
        assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_objects_of_ones_own_cannot_be_read_off_a_label() -> None:
    rows = tuple(threat(defense=d) for d in ("mine(1)", "mine(2)"))
    with pytest.raises(UsageError, match="cannot be read off its labels"):
        figure_of(RunResult(INFO, (), rows), "sweep")


def test_drawing_needs_no_torch(folder: Path) -> None:
    done = python(
        "-c",
        "import sys; from pathlib import Path\n"
        "from advplug.plots.kinds import figure_of; from advplug.stored.runs import read\n"
        "for kind in ('curve', 'sweep', 'pareto', 'heatmap'): figure_of(read(Path(sys.argv[1])), kind)\n"
        "assert 'torch' not in sys.modules",
        str(folder),
    )
    assert done.returncode == 0, done.stderr
