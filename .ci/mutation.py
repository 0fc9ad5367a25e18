"""Mutation check: changes the code in small ways and demands that tests fail on most of them.

`python .ci/mutation.py [PART ...]` runs mutmut on each part of src/advplug, prints a line for it, and ends with exit
code 1 where too few mutants were killed. A mutant is killed by a failing test; one that no test reaches, or that ran
out of time, is not. `mutmut results` names the survivors, `mutmut show NAME` shows one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LEAST = 0.8
"""The share of mutants that has to be killed in each part."""
PARTS = ("ball", "estimate", "health", "matrix")
KILLED = (1, 3)
"""Exit codes of pytest: failed tests, an internal error."""
FOLDER = Path("mutants")


def mutate(part: str) -> None:
    """Runs the tests on every mutant of a part. Exits with what mutmut said where it cannot."""
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", f"advplug.{part}.*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"mutmut failed on {part}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def counted(part: str) -> tuple[int, int]:
    """(killed, all) mutants of a module or package."""
    root = FOLDER / "src" / "advplug"
    files = [*root.glob(f"{part}.py.meta"), *root.glob(f"{part}/*.meta")]
    codes = [code for path in files for code in json.loads(path.read_text())["exit_code_by_key"].values()]
    return sum(code in KILLED for code in codes), len(codes)


def main() -> int:
    """Exit code 1 where a part lies below `LEAST`."""
    os.nice(19)
    short = False
    for part in sys.argv[1:] or PARTS:
        mutate(part)
        killed, total = counted(part)
        enough = killed >= LEAST * total > 0
        short |= not enough
        left = "" if enough else f", fewer than {LEAST:.0%}"
        sys.stdout.write(f"{part}: {killed} of {total} mutants killed ({100 * killed / max(total, 1):.1f} %){left}\n")
        sys.stdout.flush()
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
