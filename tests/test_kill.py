"""Kills at uniformly random times lose no finished cell, spoil no cached weights and leave no lock behind."""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from advplug.artifacts import Artifact, Artifacts
from cli_tools import CNN, TINY, Child, nursery, stored, wait_for, without_times

KILLS = 50
MATRIX = ("eval", "-m", CNN, "-a", "fgsm", "-a", "noise", "-a", "ifgsm:steps=2", "-d", "prune:epochs=1",
          "-e", "16/255", "--dataset", TINY, "-o", "out", "--json")  # fmt: skip
"""Two trainings, six sweeps, two audits."""
CELLS = 6


def start(folder: Path) -> Child:
    return nursery().start(folder, *MATRIX, ADVPLUG_CACHE=str(folder / "cache"))


def finished(folder: Path) -> dict[str, Any]:
    return {key: row for key, row in stored(folder / "out").items() if row[0] == "ok"}


def spoiled() -> Artifact:
    raise AssertionError("cached weights could not be read back")


def check_caches_and_locks(folder: Path) -> None:
    artifacts = Artifacts(folder / "cache" / "artifacts")
    for entry in artifacts.ls():
        assert artifacts.get_or_make(entry.key, spoiled).tensors
    names = [p.name for p in artifacts.root.glob("*")]
    assert not [n for n in names if ".spoiled." in n]
    for lock in (*artifacts.root.glob(".locks/*"), *folder.glob("out/.lock")):
        with FileLock(lock, timeout=0):
            pass


def folders(root: Path) -> Iterator[Path]:
    for number in range(1000):
        folder = root / str(number)
        folder.mkdir()
        yield folder


@pytest.mark.timeout(300)
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    draw = random.Random(20)
    fresh = folders(tmp_path)
    times, results = [], []
    for _ in range(3):
        folder = next(fresh)
        begin = time.monotonic()
        ran = start(folder).wait()
        times.append(time.monotonic() - begin)
        assert ran.code == 0, ran.err
        results.append(without_times(json.loads(ran.out)))
    assert results[0] == results[1] == results[2]
    whole = statistics.median(times)

    kills = cut = 0
    folder, known = next(fresh), {}
    while kills < KILLS:
        child = start(folder)
        time.sleep(draw.uniform(0, whole))
        if draw.random() < 0.5:  # what is finished at this very moment
            known |= finished(folder)
        child.send(signal.SIGKILL)
        ran = child.wait()
        now = finished(folder)
        assert known.items() <= now.items()
        cut += 0 < len(now) < CELLS
        known = now
        check_caches_and_locks(folder)
        if ran.code == -signal.SIGKILL:
            kills += 1
        else:  # it was through before the kill came
            assert ran.code == 0, ran.err
            assert without_times(json.loads(ran.out)) == results[0]
            folder, known = next(fresh), {}
    assert cut >= KILLS // 5  # many were in the middle of the cells

    last = start(folder).wait()
    assert last.code == 0, last.err
    assert without_times(json.loads(last.out)) == results[0]
    assert known.items() <= finished(folder).items()
    assert len(finished(folder)) == CELLS
    assert not list(folder.glob("out/crafted/*"))
    assert not list(folder.glob("cache/artifacts/*.part.*"))


def weights_being_written(folder: Path) -> bool:
    """A folder of the cache that lacks the file that is written last."""
    root = folder / "cache" / "artifacts"
    return root.is_dir() and any(not (p / "meta.json").exists() for p in root.glob("[!.]*"))


def cells_being_written(folder: Path) -> bool:
    return (folder / "out" / "results.sqlite-journal").exists()


@pytest.mark.parametrize(("being_written", "delay"), [(weights_being_written, 0), (cells_being_written, 0.3)])
def test_kills_in_the_middle_of_a_write(tmp_path: Path, being_written: Callable[[Path], bool], delay: float) -> None:
    draw, kills, fresh = random.Random(21), 0, folders(tmp_path)
    folder, known = next(fresh), {}
    for _ in range(12):
        child = start(folder)
        wait_for((folder / "stdout").exists)
        time.sleep(draw.uniform(0, delay))
        while not being_written(folder) and not (folder / "stdout").stat().st_size:
            pass
        child.send(signal.SIGKILL)
        ran = child.wait()
        check_caches_and_locks(folder)
        now = finished(folder)
        assert known.items() <= now.items()
        known = now
        kills += ran.code == -signal.SIGKILL
        if ran.code == 0 or kills == 6:
            last = start(folder).wait()
            assert last.code == 0, last.err
            assert known.items() <= finished(folder).items()
            check_caches_and_locks(folder)
            assert not list(folder.glob("cache/artifacts/*.part.*"))
            folder, known = next(fresh), {}
        if kills == 6:
            return
    raise AssertionError(f"only {kills} of 12 kills came in time")
