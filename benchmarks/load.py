"""A matrix of 500 cells of tiny models: what advplug itself takes for a cell, and whether that stays so as cells grow.

    python benchmarks/load.py [--sizes 100 500] [--quick] [--output FILE]

Two linear nets, bare and with pixels rounded to 5 to 8 bits, meet many attacks of one step at one budget each, on forty
images of 8 x 8 pixels, so that next to nothing of a cell is arithmetic; all of it counts as overhead here. A matrix is
run for its first half, then whole, then again with nothing to do; then its status is told and its report written.
Seconds are those of one CPU, as other work on a machine slows the clock on the wall; both are kept. Exits with 1 where
a bar is missed: 50 ms a cell, and no step more than 1.5 times as long a cell in the largest matrix as in the smallest.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kept

OVERHEAD, GROWTH = 0.05, 1.5
"""Seconds a cell; times as long a cell in a larger matrix."""
MODELS = ("py:load:linear#seed=0", "py:load:linear#seed=1")
BITS = (5, 6, 7, 8)
VICTIMS = len(MODELS) * (1 + len(BITS))
DATASET = "fake:n=40,train=40,size=8,channels=1,classes=4"


def linear(seed: int = 0) -> Any:
    """A net of 256 weights for the images of DATASET."""
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))


def matrix(cells: int) -> str:
    """The file of a matrix of so many cells, a multiple of VICTIMS."""
    attacks = [f"- ifgsm: {{steps: 1, alpha: {k}/10000}}" for k in range(1, cells // VICTIMS + 1)]
    defenses = ", ".join(f"'bit-depth:bits={b}'" for b in BITS)
    models = ", ".join(f"'{model}'" for model in MODELS)
    head = f"datasets: '{DATASET}'\nmodels: [{models}]\ndefenses: [{defenses}]\neps: 8/255\naudit: none\n"
    return head + "\n".join(["attacks:", *attacks, ""])


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, and seconds of CPU and on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def run(text: str, folder: Path) -> Any:
    """`advplug run` of a matrix, its results in `folder`."""
    from advplug.session import Request, execute
    from advplug.studies.plan import plan_file, spec_text

    path = folder.with_suffix(".yaml")
    path.write_text(text)
    planned = plan_file(path, Request(models=(), output=folder, device="cpu", cache=folder.parent / "cache"))
    return execute(planned.request, planned.sweeps, spec=spec_text(planned.matrix, ""))


def measured(cells: int, folder: Path) -> dict[str, Any]:
    """One matrix, from nothing to its report."""
    from advplug.report.page import write
    from advplug.stored.status import status

    output = folder / str(cells)
    half, first = timed(lambda: run(matrix(cells // 2 // VICTIMS * VICTIMS), output))
    whole, second = timed(lambda: run(matrix(cells), output))
    again, resume = timed(lambda: run(matrix(cells), output))
    told, status_took = timed(lambda: status(output))
    page, report = timed(lambda: write(output))
    assert len(whole.cells) == cells
    assert all(cell.status == "ok" for cell in whole.cells)
    assert 0 < len(half.cells) < cells
    assert {c.key for c in half.cells} <= {c.key for c in whole.cells}
    assert again.cells == whole.cells
    assert again.run.passes == 0
    assert told.counts["done"] == cells
    took = {name: first[name] + second[name] for name in first}
    return {
        "cells": cells,
        "run": took,
        "resume": resume,
        "status": status_took,
        "report": report,
        "report_bytes": page.stat().st_size,
        "store_bytes": (output / "results.sqlite").stat().st_size,
    }


STEPS = ("run", "resume", "status", "report")


def judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a cell, how each step grows a cell from the smallest matrix to the largest, and what misses a bar."""
    small, large = rows[0], rows[-1]
    overhead = large["run"]["cpu"] / large["cells"]
    growth = {name: large[name]["cpu"] / large["cells"] * small["cells"] / small[name]["cpu"] for name in STEPS}
    growth["store"] = large["store_bytes"] / large["cells"] * small["cells"] / small["store_bytes"]
    missed = [f"{1000 * overhead:.0f} ms a cell"] if overhead > OVERHEAD else []
    missed += [f"{name} takes {times:.2f} times as long a cell" for name, times in growth.items() if times > GROWTH]
    return {"seconds_a_cell": overhead, "growth": growth, "missed": missed}


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    from advplug.report.page import write  # noqa: F401 - importing is no part of what is measured

    parser = kept.parser(__doc__, "load", "20 and 40 cells")
    parser.add_argument("--sizes", type=int, nargs="+", help="default 100 500")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head = kept.header(1)
    sizes = options.sizes or ([20, 40] if options.quick else [100, 500])
    with tempfile.TemporaryDirectory() as folder:
        run(matrix(2 * VICTIMS), Path(folder) / "first")  # what is done once a process
        rows = [measured(cells, Path(folder)) for cells in sorted(sizes)]
    result: dict[str, Any] = head | {"rows": rows, **judged(rows)}
    for row in rows:
        took = ", ".join(f"{name} {row[name]['cpu']:.1f} s" for name in STEPS)
        print(f"{row['cells']} cells: {took}; store {row['store_bytes'] / 1e6:.1f} MB")
    print(f"{1000 * result['seconds_a_cell']:.1f} ms a cell (bar {1000 * OVERHEAD:.0f})")
    print("growth a cell: " + ", ".join(f"{name} x{times:.2f}" for name, times in result["growth"].items()))
    return kept.finish("load", result, kept.place("load", options))


if __name__ == "__main__":
    sys.exit(main())
