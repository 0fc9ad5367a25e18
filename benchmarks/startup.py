"""How long the command line takes to answer, beside `python -c "import click"`.

    python benchmarks/startup.py [--rounds 15] [--quick] [--output FILE]

Every command runs once a round, in turn, so that a busy machine slows all of them alike; medians are
compared. Exits with 1 if `advplug --help` takes more than 3 times as long as importing click.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import kept

BASE = "python -c 'import click'"


def commands(folder: str) -> dict[str, list[str]]:
    """The commands by the name they are shown with."""
    found = shutil.which("advplug", path=str(Path(sys.executable).parent)) or shutil.which("advplug")
    if found is None:
        raise SystemExit("advplug is not installed beside this Python: pip install -e .")
    dry = ["eval", "--model", "resnet18", "--attack", "ifgsm", "--defense", "prune", "--dry-run", "-o", folder]
    return {
        BASE: [sys.executable, "-c", "import click"],
        "advplug --help": [found, "--help"],
        "advplug list": [found, "list"],
        "advplug info attack pgd": [found, "info", "attack", "pgd"],
        "advplug eval --dry-run": [found, *dry],
        "advplug doctor --quick": [found, "doctor", "--quick"],
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each command and round; one round more, unmeasured, fills the caches."""
    with tempfile.TemporaryDirectory() as folder:
        todo = commands(folder)
        seconds: dict[str, list[float]] = {name: [] for name in todo}
        for turn in range(rounds + 1):
            for name, command in todo.items():
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                taken = time.perf_counter() - start
                if done.returncode not in ((0, 1) if "doctor" in name else (0,)):
                    raise SystemExit(f"{name} failed: {done.stderr.strip()}")
                if turn:
                    seconds[name].append(taken)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = kept.parser(__doc__, "startup", "2 rounds")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args(arguments)
    rounds = max(1, options.rounds or (2 if options.quick else 15))
    head = kept.header()
    seconds = measure(rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'command':<28} {'median':>9} {'fastest':>9} {'ratio':>7}")
    for name, median in medians.items():
        print(f"{name:<28} {median:>8.3f}s {min(seconds[name]):>8.3f}s {median / medians[BASE]:>7.2f}")
    ratio = medians["advplug --help"] / medians[BASE]
    found = {"rounds": rounds, "ratio": ratio, "medians": medians, "seconds": seconds}
    return kept.finish("startup", head | found, kept.place("startup", options))


if __name__ == "__main__":
    sys.exit(main())
