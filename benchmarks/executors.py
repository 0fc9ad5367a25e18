"""How much faster a run is on Ray's workers than in one process: 8 equal cells, one thread each, 2 workers.

    python benchmarks/executors.py [--steps N] [--rounds N] [--quick] [--output FILE]

Both are whole commands, from the start of Python to the end, the start of Ray included; the run's own seconds stand
beside them. The cells are one network of random weights under PGD that goes on to the last step, with 8 step sizes, so
that each takes as many passes as the others, in float32, so that no timing decides how they run. Starting Ray and
importing PyTorch in its workers costs a fixed time, so that short cells gain nothing: --steps 20 shows it. Exit code 1
where the ratio is above the bar. Needs the extra `ray`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import engine_models
import kept

HERE = Path(__file__).parent
CELLS, WORKERS = 8, 2
DATASET = "fake:n=128,size=32,channels=3,classes=10"
MODEL = "py:engine_models:ResNet20#weights=random.safetensors"


def command(steps: int, folder: str, *more: str) -> list[str]:
    pgd = f"pgd:steps={steps},keep_going=true,precision=float32"
    attacks = [f"{pgd},alpha={alpha}/2550" for alpha in range(1, CELLS + 1)]
    asked = [option for attack in attacks for option in ("-a", attack)]
    return [sys.executable, "-m", "advplug.cli", "eval", "--dataset", DATASET, "-m", MODEL, *asked, "-e", "8/255",
            "--audit", "none", "--device", "cpu", "-o", folder, "--json", "-q", *more]  # fmt: skip


def timed(steps: int, folder: Path, *more: str) -> tuple[float, float, Any]:
    """Seconds of the whole command, the run's own, and the cells without their seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    began = time.perf_counter()
    done = subprocess.run(command(steps, "out", *more), cwd=folder, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    cells = [{k: v for k, v in cell.items() if k != "seconds"} for cell in result["cells"]]
    return seconds, result["run"]["seconds"], cells


def measure(steps: int) -> dict[str, Any]:
    """One round of both, in folders of their own."""
    row: dict[str, Any] = {}
    cells = []
    for name, more in (("in-process", ()), ("ray", ("--executor", "ray"))):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            save_file(engine_models.ResNet20().state_dict(), Path(folder) / "random.safetensors")
            whole, own, made = timed(steps, Path(folder), *more)
        row[name] = {"command": round(whole, 2), "run": round(own, 2)}
        cells.append(made)
    same = cells[0] == cells[1]
    return row | {"ratio": round(row["ray"]["command"] / row["in-process"]["command"], 3), "same cells": same}


def main() -> int:
    parser = kept.parser(__doc__, "executors", "2 steps, one round")
    parser.add_argument("--steps", type=int, help="of PGD, so of each cell; default 600")
    parser.add_argument("--rounds", type=int, help="default 3")
    options = parser.parse_args()
    steps = options.steps or (2 if options.quick else 600)
    head = kept.header(1)
    rounds = []
    for number in range(options.rounds or (1 if options.quick else 3)):
        rounds.append(measure(steps))
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    ratio = statistics.median(row["ratio"] for row in rounds)
    result = head | {
        "cells": CELLS, "workers": WORKERS, "threads a cell": 1, "steps": steps, "ratio": ratio,
        "ray": importlib.metadata.version("ray"), "rounds": rounds,
    }  # fmt: skip
    return kept.finish("executors", result, kept.place("executors", options))


if __name__ == "__main__":
    sys.exit(main())
