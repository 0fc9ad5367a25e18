"""Runs the benchmarks one after the other, each in a process of its own, and prints what they came to beside the bars.

    python benchmarks/all.py [NAME ...] [--quick | --resume]

Results go to benchmarks/results/NAME.json, and docs/benchmarks.md is written anew from them. A benchmark that fails is
named at the end, the others run all the same, and its older result stays. --quick shows in some minutes that they all
run; its figures are of too few images to be kept or judged. --resume goes on after an interrupt: what this very code
has measured on such a processor is not measured again. With ADVPLUG_DATA set, real images and weights are used.
Threads are one unless OMP_NUM_THREADS says otherwise. Exits with 1 where a bar was missed or a benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars
import kept

HERE = Path(__file__).parent
SCRIPTS = {name: HERE / f"{name}.py" for name in bars.JUDGES}


@dataclass(frozen=True)
class Outcome:
    """How one benchmark went: its bars, or why there are none."""

    name: str
    seconds: float | None
    """None where an earlier result was taken."""
    judged: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [bar for bar in self.judged if not bar["holds"]]


def run(name: str, script: Path, results: Path, quick: bool) -> Outcome:
    """One benchmark; its result replaces the older one in `results` when it is whole."""
    print(f"\n== {name}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    made = results / f"{name}.part"
    made.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--output", str(made), *(["--quick"] if quick else [])]
    begun = time.perf_counter()
    done = subprocess.run(command, check=False)
    seconds = time.perf_counter() - begun
    result = json.loads(made.read_text()) if made.exists() else {}
    judged = result.get("bars") if "date" in result else None
    # A traceback ends with 1, too: without a whole result, or where no bar was missed, it is no verdict.
    honest = isinstance(judged, list) and done.returncode == int(not all(bar["holds"] for bar in judged))
    if not honest or judged is None:
        rest = f"; what there is of its result is in {made}" if result else ""
        return Outcome(name, seconds, failed=f"ended with exit code {done.returncode} without a whole result{rest}")
    made.replace(results / f"{name}.json")
    return Outcome(name, seconds, judged)


def earlier(name: str, results: Path) -> Outcome | None:
    """What is kept already, if the same code measured it on such a processor."""
    path = results / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    if not isinstance(result, dict) or not kept.same(result):
        return None
    return Outcome(name, None, bars.of(name, result) if name in bars.JUDGES else result["bars"])


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a bar."""
    lines = []
    for o in outcomes:
        lines.append(f"{o.name}, {took(o)}" + (f": FAILED, it {o.failed}" if o.failed else ""))
        lines += [f"  {'     ' if bar['holds'] else 'MISS '}{bars.text(bar)} ({bar['on']})" for bar in o.judged]
    return "\n".join(lines)


def took(outcome: Outcome) -> str:
    return "measured before" if outcome.seconds is None else f"{outcome.seconds:.0f} s"


def hardware() -> str:
    """The machine in words."""
    head = kept.header()
    return f"{head['cpu']} ({', '.join(head['cpu flags'])}), {head['cores']} cores, load {head['load']}"


def run_all(scripts: Mapping[str, Path], results: Path, quick: bool, resume: bool = False) -> int:
    """Runs them in turn, prints the table, and gives the exit code; a missed bar of a quick run does not count."""
    print(f"{hardware()}; {len(scripts)} benchmarks{', quick' if quick else ''}")
    outcomes = [
        (earlier(name, results) if resume else None) or run(name, script, results, quick)
        for name, script in scripts.items()
    ]
    failed, missed = [o.name for o in outcomes if o.failed], sum(len(o.missed) for o in outcomes)
    names, judged = ", ".join(failed), sum(len(o.judged) for o in outcomes)
    print(f"\n{table(outcomes)}\n")
    before = sum(o.seconds is None for o in outcomes)
    print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} benchmarks ran"
        + (f", {before} of them before" if before else "")
        + (f"; failed: {names}" if failed else "")
    )
    print(f"{missed} of {judged} bars missed" + (", which does not count in a quick run" if quick else ""))
    return int(bool(failed) or (missed > 0 and not quick))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all unless given")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="only to see that they run; nothing is kept")
    how.add_argument("--resume", action="store_true", help="leave out what this code has measured on this processor")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    unknown = [name for name in given.names if name not in SCRIPTS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    chosen = {name: SCRIPTS[name] for name in given.names or SCRIPTS}
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            return run_all(chosen, Path(folder), quick=True)
    code = run_all(chosen, kept.RESULTS, quick=False, resume=given.resume)
    subprocess.run([sys.executable, str(HERE.parent / "docs" / "generate.py")], check=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
