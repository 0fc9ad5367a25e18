"""The picture of a run: what is drawn along which axis, from hand-made results and from a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from advplug.errors import AdvplugError, UsageError
from advplug.estimate import Estimate, rate
from advplug.plots.curves import Axis, axis_of, draw, panels, plot_path
from advplug.results import Cell, RunInfo, RunResult, ThreatRow, Verdict
from advplug.session import Request, plan
from cli_tools import TINY, run


def axis(*defenses: str, budgets: tuple[str, ...] = ()) -> Axis:
    return axis_of(plan(Request(models=("cnn",), attacks=("pgd",), defenses=defenses, budgets=budgets)))


def test_one_number_of_a_defense_is_the_axis() -> None:
    found = axis("denoise:sigma=0.5", "denoise:sigma=2")
    assert found == Axis("denoise sigma", {"denoise:sigma=0.5": 0.5, "denoise:sigma=2": 2.0})
    # A default counts as what it is.
    assert axis("jpeg", "jpeg:quality=30").values == {"jpeg": 75.0, "jpeg:quality=30": 30.0}
    stacked = axis("bit-depth+jpeg:quality=50", "bit-depth+jpeg:quality=30")
    assert stacked.name == "jpeg quality"


def test_budgets_are_the_axis_where_no_number_of_a_defense_is() -> None:
    assert axis(budgets=("2/255", "8/255")) == Axis("eps")
    assert axis("jpeg", "bit-depth", budgets=("2/255", "8/255")) == Axis("eps")
    assert axis("denoise:method=median", "denoise:method=gaussian", budgets=("2/255", "8/255")) == Axis("eps")


@pytest.mark.parametrize("defenses", [(), ("jpeg",), ("jpeg", "bit-depth"), ("denoise:sigma=1,spread=1", "denoise")])
def test_nothing_that_varies_is_nothing_to_draw(defenses: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="give several budgets"):
        axis(*defenses)


# --- lines from results ------------------------------------------------------------------------------


def share(value: float) -> Estimate | None:
    return rate(value * 50, 50)


def threat(defense: str, eps: str, robust: float | None, verdict: Verdict | None = "trusted") -> ThreatRow:
    figure = None if robust is None else share(robust)
    return ThreatRow("d", "m", defense, "linf", eps, "untargeted", 0, ("pgd",), share(0.9), figure, None, verdict)


def cell(defense: str, attack: str, static: float, adaptive: float) -> Cell:
    metrics = {"static_robust_accuracy": share(static), "adaptive_robust_accuracy": share(adaptive)}
    return Cell("k", "d", "m", defense, attack, "linf", "1/10", "untargeted", 0, "ok", metrics=metrics)


def result(*threats: ThreatRow, cells: tuple[Cell, ...] = ()) -> RunResult:
    return RunResult(RunInfo({}, 0, "cpu", ""), cells, threats)


def points(lines: object) -> dict[str, list[tuple[float, float]]]:
    return {line.label: [(p.x, p.y.value) for p in line.points] for line in lines}  # type: ignore[attr-defined]


def test_a_security_curve_begins_at_the_clean_accuracy() -> None:
    rows = (threat("none", "1/10", 0.1), threat("none", "1/20", 0.4), threat("jpeg", "1/20", 0.5, "upper bound"))
    (panel,) = panels(result(*rows), Axis("eps"))
    assert panel.title == "m on d, linf"
    assert points(panel.lines) == {"undefended": [(0, 0.9), (0.05, 0.4), (0.1, 0.1)], "jpeg": [(0, 0.9), (0.05, 0.5)]}
    assert [p.verdict for p in panel.lines[1].points] == [None, "upper bound"]


def test_a_sweep_shows_static_adaptive_and_the_worst_and_leaves_out_what_failed() -> None:
    rows = [threat("none", "1/10", 0.0)]
    rows += [threat(d, "1/10", r) for d, r in (("s=3", 0.2), ("s=1", 0.1), ("s=2", None))]
    cells = (cell("s=1", "pgd", 0.6, 0.3), cell("s=1", "apgd", 0.7, 0.2), cell("s=3", "pgd", 0.5, 0.4))
    (panel,) = panels(result(*rows, cells=cells), Axis("d s", {"s=1": 1.0, "s=2": 2.0, "s=3": 3.0}))
    assert points(panel.lines) == {
        "undefended, clean": [(0, 0.9)],
        "undefended, robust": [(0, 0.0)],
        "clean": [(1, 0.9), (3, 0.9)],
        "static attack": [(1, 0.6), (3, 0.5)],
        "adaptive attack": [(1, 0.2), (3, 0.4)],
        "robust: the worst of all": [(1, 0.1), (3, 0.2)],
    }


def test_the_file_tells_each_points_verdict_and_is_the_same_each_time(tmp_path: Path) -> None:
    shown = result(threat("none", "1/10", 0.1), threat("none", "1/20", 0.4, "not trustworthy"))
    written = []
    for name in ("a.svg", "b.svg"):
        draw(shown, Axis("eps"), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    text = written[0].decode()
    for told in ("m on d, linf", "verdict: trusted", "verdict: not trustworthy", "accuracy, %", "undefended"):
        assert told in text
    assert "verdict: upper bound" not in text
    draw(shown, Axis("eps"), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    rows = [replace(threat("none", eps, 0.4), dataset="npz:$DATA/a_b.npz,test=$DATA/c") for eps in ("1/20", "1/10")]
    draw(result(*rows), Axis("eps"), tmp_path / "curve.svg")
    assert "m on npz:$DATA/a_b.npz,test=$DATA/c, linf" in (tmp_path / "curve.svg").read_text()


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"draws \.svg, \.png, \.pdf files, not 'x\.gif'"):
        plot_path(tmp_path / "x.gif")
    with pytest.raises(UsageError, match="does not exist; create it first"):
        plot_path(tmp_path / "missing" / "x.svg")
    with pytest.raises(AdvplugError, match="no cell was computed"):
        draw(result(threat("none", "1/10", None, None)), Axis("eps"), tmp_path / "x.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(AdvplugError, match="cannot be written"):
        draw(result(threat("none", "1/10", 0.1)), Axis("eps"), tmp_path / "folder.svg")


def test_one_command_sweeps_a_filter_and_draws_it(tmp_path: Path) -> None:
    file = tmp_path / "sigma.svg"
    sweep = [f"--defense=denoise:method=bilateral,sigma={sigma}" for sigma in (0.5, 1.5)]
    done = run("eval", "-m", "cnn", "-a", "pgd:steps=5", "-n", "20", "--audit", "none", *sweep,
               "--plot", str(file), "-o", str(tmp_path / "run"))  # fmt: skip
    assert done.code == 0, done.err
    text = file.read_text()
    for told in ("denoise sigma", "static attack", "adaptive attack", "robust: the worst of all"):
        assert told in text
    refused = run("eval", "-m", "cnn", "-a", "pgd", "--plot", str(file), "-o", str(tmp_path / "other"))
    assert refused.code == 2
    assert "give several budgets" in refused.err
    assert not (tmp_path / "other").exists()


def test_where_everything_failed_that_is_told_and_not_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GREEDY", "0")
    ran = run("eval", "--dataset", TINY, "-m", "py:usernets:Greedy", "-a", "noise", "-e", "1/10", "-e", "1/5",
              "-n", "4", "--audit", "none", "--plot", "x.svg", "-q")  # fmt: skip
    assert ran.code == 3
    assert ran.err.startswith("Error: 2 of 2 cells failed: ")
    assert not Path("x.svg").exists()
