"""The command line under test: in this process, or in a fork of a process that has torch imported already.

Run as a script this file is that process: it reads one JSON request a line and answers with one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = "fake:n=20,train=40,size=8,channels=1,classes=4"
"""A dataset on which a model trains in a tenth of a second."""
CNN = "cnn:epochs=1"
QUICK = ("--audit", "none")


@dataclass(frozen=True)
class Ran:
    """How a command ended: exit code (negative: the signal that killed it), standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: str | Path) -> Ran:
    """`advplug ARGUMENTS` in this process."""
    from advplug import cli

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["advplug", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return Ran(code, out.getvalue(), err.getvalue())


def evaluate(*arguments: str | Path, dataset: str = TINY, output: str | Path = "out") -> Any:
    """`advplug eval --json` on the tiny dataset; it must end well."""
    ran = run("eval", "--dataset", dataset, "-o", output, "--json", *arguments)
    assert ran.code == 0, ran.err
    return ran.json


def stored(folder: str | Path) -> dict[str, tuple[str, str, bytes | None, str]]:
    """The rows of a results file by key: status, cell, evidence, time of writing; {} where there is no file yet."""
    path = Path(folder) / "results.sqlite"
    if not path.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        try:
            rows = db.execute("SELECT key, status, cell, evidence, finished FROM cell").fetchall()
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
    return {key: tuple(rest) for key, *rest in rows}


def without_times(result: Mapping[str, Any]) -> dict[str, Any]:
    """The cells and threats of a result, less what differs from run to run."""
    cells = [{k: v for k, v in c.items() if k != "seconds"} for c in result["cells"]]
    return {"cells": cells, "threats": result["threats"]}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# --- forks of a process that has imported torch ----------------------------------------------------


class Child:
    """A command that runs in a process of its own, its output in files."""

    def __init__(self, nursery: Nursery, pid: int, folder: Path) -> None:
        self.pid, self._nursery, self._folder = pid, nursery, folder
        self._code: int | None = None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # it stays a zombie until `wait`, so the number is its own

    def wait(self) -> Ran:
        if self._code is None:
            self._code = self._nursery.ask({"wait": self.pid})
        return Ran(self._code, *((self._folder / name).read_text() for name in ("stdout", "stderr")))


class Nursery:
    """Forks children that run the command line, without the seconds that importing torch takes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._process.kill)

    def ask(self, request: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))

    def start(self, folder: Path, *arguments: str | Path, file_limit: int = 0, **variables: str) -> Child:
        """Starts `advplug ARGUMENTS` in `folder`, which then holds its `stdout` and `stderr`."""
        request = {
            "folder": str(folder),
            "arguments": list(map(str, arguments)),
            "variables": variables,
            "file_limit": file_limit,
        }
        return Child(self, self.ask(request), folder)


@functools.cache
def nursery() -> Nursery:
    return Nursery()


def _child(folder: str, arguments: list[str], variables: dict[str, str], file_limit: int) -> int:
    from advplug import cli

    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ.update(variables)
    sys.argv = ["advplug", *arguments]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    try:
        cli.main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(stop.code or 0)
    return 99


def _serve() -> None:
    import torch

    for name in (
        "sklearn.datasets", "safetensors.torch", "pydantic", "torch._dynamo", "torch_pruning", "usernets",
        "advplug.api", "advplug.cli", "advplug.console", "advplug.attacks.engine", "advplug.defenses.pruning",
        "advplug.runner", "advplug.table", "advplug.builtin.nets",
    ):  # fmt: skip
        importlib.import_module(name)
    from advplug.registry import registry

    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    registry()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(_child(**request))
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
