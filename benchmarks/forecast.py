"""What `advplug run --dry-run --calibrate` says that a matrix costs, against what it then takes.

    python benchmarks/forecast.py [MATRIX] [--quick] [--output FILE]

The matrix, recipes/demo.yaml unless another is named, is forecast and run with an empty cache, so that its trainings
count. Seconds are those of one CPU, as other work on a machine slows the clock on the wall. Exits with 1 where a
forecast is off by more than a factor 2.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kept

HERE = Path(__file__).parent
DEMO = HERE.parent / "recipes" / "demo.yaml"


def measured(folder: Path, matrix: Path = DEMO) -> dict[str, Any]:
    """Passes and seconds of CPU as forecast and as taken, with their ratio; `folder` is for results and weights."""
    import torch

    from advplug.costs import calibrate
    from advplug.costs.forecast import forecast
    from advplug.session import Request, certificates, execute
    from advplug.studies.plan import plan_file

    torch.set_num_threads(1)
    base = Request(models=(), output=folder / "out", device="cpu", cache=folder / "cache")
    planned = plan_file(matrix, base)
    cost = forecast(planned.sweeps, certificates(planned.request, planned.sweeps), {}, planned.request.audit)
    clock, calibrate.time.perf_counter = calibrate.time.perf_counter, time.process_time
    try:
        seconds = calibrate.timed(cost, planned.request)
    finally:
        calibrate.time.perf_counter = clock
    begun = time.process_time()
    result = execute(planned.request, planned.sweeps)
    taken = time.process_time() - begun
    assert not result.failed
    assert not seconds.unknown
    told = seconds.passes + seconds.training
    return {
        "cells": len(result.cells),
        "passes": {"forecast": cost.total.passes, "taken": result.run.passes,
                   "ratio": cost.total.passes / result.run.passes},
        "seconds": {"forecast": told, "of trainings": seconds.training, "taken": taken, "ratio": told / taken},
    }  # fmt: skip


def small(folder: Path) -> Path:
    """A matrix that takes a few seconds."""
    path = folder / "small.yaml"
    path.write_text("models: cnn\nattacks: [ifgsm]\neps: [4/255, 8/255]\nn: 64\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = kept.parser(__doc__, "forecast", "a matrix of two cells")
    parser.add_argument("matrix", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    head = kept.header(1)
    with tempfile.TemporaryDirectory() as folder:
        matrix = options.matrix or (small(Path(folder)) if options.quick else DEMO)
        found = measured(Path(folder), matrix)
    result = head | {"matrix": matrix.name, **found}
    for name in ("passes", "seconds"):
        told = found[name]
        print(f"{name}: {told['forecast']:,.0f} forecast, {told['taken']:,.0f} taken, ratio {told['ratio']:.2f}")
    return kept.finish("forecast", result, kept.place("forecast", options))


if __name__ == "__main__":
    sys.exit(main())
