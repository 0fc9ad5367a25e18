"""What every benchmark says of itself in its result: when, on what and how it was measured, and which bars it held."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import bars

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What of a processor decides how fast PyTorch is on it."""


def header(threads: int | None = None) -> dict[str, Any]:
    """Date, hardware, versions, load of the machine and command of what is measured now.

    `threads` are those that PyTorch uses; unless given they are taken from OMP_NUM_THREADS, else all cores.
    """
    info = _cpuinfo()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": info["name"],
        "cpu flags": info["flags"],
        "cores": os.cpu_count(),
        "threads": threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "advplug": importlib.metadata.version("advplug"),
        "code": code(),
        "environment": {
            "ADVPLUG_DATA": "ADVPLUG_DATA" in os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_told(sys.argv[1:])]),
    }


UNMEASURED = {"all.py", "bars.py", "studies.py"}
"""Of the benchmarks, what decides on no figure."""


def code() -> str:
    """A digest of the code that figures depend on: of advplug, of its plugins and of the benchmarks."""
    of = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    of += [path for path in HERE.glob("*.py") if path.name not in UNMEASURED]
    digest = hashlib.sha256()
    for path in sorted(of):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def same(result: dict[str, Any]) -> bool:
    """Whether a whole result was measured as it would be now: by the same code, on such a processor and such data."""
    now = header(result.get("threads"))
    of = ("code", "cpu", "cpu flags", "cores", "python", "torch", "advplug", "environment")
    return "bars" in result and all(result.get(name) == now[name] for name in of)


def _told(arguments: list[str]) -> list[str]:
    """The arguments without where the result goes."""
    places = {i for i, a in enumerate(arguments) if a == "--output"}
    return [a for i, a in enumerate(arguments) if i not in places and i - 1 not in places and a[:9] != "--output="]


def _cpuinfo() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return {"name": platform.processor() or platform.machine(), "flags": []}
    lines = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    told = {key.strip(): value.strip() for key, value in lines.items()}
    have = told.get("flags", "").split()
    return {"name": told.get("model name", platform.machine()), "flags": [f for f in FLAGS if f in have]}


def parser(doc: str | None, name: str, quick: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; `quick` says what --quick does."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"only to see that it runs: {quick}")
    there = f"where the result goes; default: benchmarks/results/{name}.json, with other options nowhere"
    made.add_argument("--output", type=Path, metavar="FILE", help=there)
    return made


def place(name: str, options: argparse.Namespace) -> Path | None:
    """The file of the result, or None: a quick run, a part alone, or other settings replace no result that is kept."""
    given: Path | None = options.output
    usual = not any(value for option, value in vars(options).items() if option != "output")
    return given or (RESULTS / f"{name}.json" if usual else None)


def write(result: dict[str, Any], path: Path | None) -> None:
    """Keeps a result, or what there is of it so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def finish(name: str, result: dict[str, Any], path: Path | None) -> int:
    """Judges a whole result, prints its bars, and keeps both; the exit code, 1 where a bar was missed."""
    judged = bars.of(name, result)
    write(result | {"bars": judged}, path)
    print()
    for bar in judged:
        print(f"  {bars.text(bar)}")
    if path is not None:
        print(f"written to {path}")
    return int(not all(bar["holds"] for bar in judged))
