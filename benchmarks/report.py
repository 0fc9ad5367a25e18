"""Size and time of the report on a made-up study: 100 cells with 8 image triples each.

    python benchmarks/report.py [--cells 100] [--quick] [--output FILE]

The images have 32 x 32 pixels: noise in colour, which no format makes smaller, and gentle ones in colour and in grey.
Seconds are those of the processor, with matplotlib imported, and of the clock from start to end of a process. Exits
with 1 if a page takes more than 3 MB, or 10 s of the processor.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import kept
from advplug.builtin.metrics import accuracy
from advplug.estimate import rate
from advplug.evidence import Evidence
from advplug.results import Cell, Passes, RunInfo, RunResult, Seconds, ThreatRow
from advplug.store import Store
from advplug.stored.samples import Sample

MODELS, ATTACKS = 5, 5
KINDS = ("noise", "colour", "grey")
ROBUST = rate(60, 100)


def build(folder: Path, cells: int = 100, kind: str = "noise") -> int:
    """Writes a folder of `cells` cells, 8 images each, and returns how many there are: 5 models, undefended and
    defended, 5 attacks, and budgets in steps of 1/255 until it is enough."""
    rng = np.random.default_rng(0)
    per_budget = MODELS * 2 * ATTACKS
    found = [
        _cell(f"model{m}", defense, f"attack{a}", f"{b}/255")
        for b in range(1, -(-cells // per_budget) + 1)
        for m in range(MODELS)
        for defense in ("none", "jpeg")
        for a in range(ATTACKS)
    ][:cells]
    clean = _images(rng, kind)
    samples = {c.key: _sample(clean, rng) for c in found}
    seen = _evidence()
    threats = {
        (c.model, c.defense, c.eps): ThreatRow("made-up", c.model, c.defense, "linf", c.eps, "untargeted", 0,
                                               ("attack0",), rate(95, 100), ROBUST, None, "trusted")
        for c in found
    }  # fmt: skip
    with Store(folder) as store:
        store.put("sweep", [(c, seen) for c in found], samples=samples)
        store.put_shown(RunResult(RunInfo({}, 0, "cpu", ""), (), tuple(threats.values())))
    return len(found)


def _cell(model: str, defense: str, attack: str, eps: str) -> Cell:
    key, measured = f"{model}/{defense}/{attack}/{eps}", dict(accuracy()(_evidence()))
    spent = {"passes": Passes(2000, 2000, 2000), "seconds": Seconds(60.0, 5.0, 20.0, 1.0)}
    named = (key, "made-up", model, defense, attack, "linf", eps, "untargeted", 0)
    return Cell(*named, "ok", metrics=measured, **spent)


def _evidence() -> Evidence:
    index = np.arange(100)
    clean = np.ones((100, 1), dtype=bool)
    return Evidence(index, index % 10, clean, clean[:, 0], (index < 40)[:, None], steps=index % 20)


def _images(rng: np.random.Generator, kind: str) -> np.ndarray:
    """8 images uint8 (8, C, 32, 32), either every pixel by itself or changing slowly."""
    if kind == "noise":
        return rng.integers(20, 236, (8, 3, 32, 32), dtype=np.uint8)
    coarse = rng.integers(20, 236, (8, 1 if kind == "grey" else 3, 5, 5)).astype(float)
    place = np.linspace(0, 4, 32)
    low = np.minimum(place.astype(int), 3)
    part = place - low
    rows = coarse[:, :, low] * (1 - part)[:, None] + coarse[:, :, low + 1] * part[:, None]
    return np.asarray((rows[..., low] * (1 - part) + rows[..., low + 1] * part).round().astype(np.uint8))


def _sample(clean: np.ndarray, rng: np.random.Generator) -> Sample:
    index = np.arange(8)
    signs = 8 * rng.integers(-1, 2, clean.shape)
    return Sample(index, index, clean, (clean + signs).astype(np.uint8), index, (index + 1) % 10, index >= 0)


def measure(folder: Path) -> dict[str, float]:
    """Images shown of a cell, MB of the page, seconds of the processor and of the clock of the process."""
    code = (
        "import sys, time, pathlib, matplotlib.figure, matplotlib.backends.backend_svg\n"
        "from advplug.report.page import write\n"
        "begun = time.process_time(); write(pathlib.Path(sys.argv[1])); print(time.process_time() - begun)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    page = folder / "report.html"
    fewer = re.search(r"Of 8 images kept of a cell (\d) are shown", page.read_text())
    return {
        "images": int(fewer[1]) if fewer else 8,
        "megabytes": page.stat().st_size / 1e6,
        "processor_seconds": float(done.stdout),
        "clock_seconds": time.perf_counter() - begun,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = kept.parser(__doc__, "report", "10 cells")
    parser.add_argument("--cells", type=int, help="default 100")
    given = parser.parse_args(arguments)
    cells = given.cells or (10 if given.quick else 100)
    head, found = kept.header(1), {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            amount = build(Path(name), cells, kind)
            found[kind] = {"cells": amount, **measure(Path(name))}
    for kind, told in found.items():
        size = f"{told['cells']:4} cells  {told['images']} images each  {told['megabytes']:.2f} MB"
        seconds = f"{told['processor_seconds']:.1f} s of the processor  {told['clock_seconds']:.1f} s of the clock"
        print(f"{kind:7} {size}  {seconds}")
    return kept.finish("report", head | {"kinds": found}, kept.place("report", given))


if __name__ == "__main__":
    sys.exit(main())
