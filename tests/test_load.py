"""The benchmark of many cells, on few of them; its figures at full size are in benchmarks/results/load.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advplug.session import Request
from advplug.studies.plan import plan_file
from conftest import benchmark_module


@pytest.fixture
def load() -> Iterator[Any]:
    with benchmark_module("load") as module:
        yield module


@pytest.mark.parametrize("cells", [20, 500])
def test_the_matrix_has_as_many_cells_as_it_says(load: Any, cells: int, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(load.matrix(cells))
    planned = plan_file(tmp_path / "m.yaml", Request(models=()))
    assert sum(len(s.budgets) for s in planned.sweeps) == cells
    assert all(s.refused is None for s in planned.sweeps)
    assert len({s.victim.key for s in planned.sweeps}) == load.VICTIMS


def test_a_small_matrix_completes_resumes_and_reports(load: Any, tmp_path: Path) -> None:
    row = load.measured(2 * load.VICTIMS, tmp_path)
    assert row["cells"] == 20
    assert all(row[step]["cpu"] > 0 for step in load.STEPS)
    assert row["resume"]["cpu"] < row["run"]["cpu"]
    assert "<html" in (tmp_path / "20" / "report.html").read_text()


def row(cells: int, run: float, resume: float, store: int) -> dict[str, Any]:
    steps = {"run": run, "resume": resume, "status": 0.1 * cells, "report": 1.0}
    return {"cells": cells, "store_bytes": store, **{name: {"cpu": s} for name, s in steps.items()}}


def test_bars(load: Any) -> None:
    good = load.judged([row(100, 4.0, 1.0, 1000), row(500, 20.0, 5.0, 5000)])
    assert good["seconds_a_cell"] == pytest.approx(0.04)
    assert good["growth"] == pytest.approx({"run": 1, "resume": 1, "status": 1, "report": 0.2, "store": 1})
    assert good["missed"] == []
    bad = load.judged([row(100, 4.0, 1.0, 1000), row(500, 30.0, 25.0, 5000)])
    assert bad["missed"] == ["60 ms a cell", "resume takes 5.00 times as long a cell"]
