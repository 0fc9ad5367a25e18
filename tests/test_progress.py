"""What is shown while a run goes on: bars on a terminal, lines in a log, nothing with -q."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advplug import console, progress
from advplug.console import console_progress
from advplug.progress import Share, Tally, duration
from cli_tools import CNN, QUICK, TINY, run

EVAL = ("eval", "-m", CNN, "-a", "fgsm", "-a", "noise", "--dataset", TINY, "-o", "out", *QUICK)
"""Two cells, one training."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path


class Heard(progress.Silent):
    """Remembers what it is told of cells."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, float | None]] = []

    def cells(self, done: int, total: int, left: float | None) -> None:
        self.told.append((done, total, left))


# --- the count ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_follows_the_forecast(clock: list[float]) -> None:
    """A quarter of the passes in 10 s: 30 s are left."""
    heard = Heard()
    tally = Tally(heard, {"a": Share(2, 100), "b": Share(1, 200), "audit": Share(0, 100)}, before=3)
    clock[0] = 10.0
    tally.settled("a")
    tally.settled("a")
    tally.settled("what was stored already")
    clock[0] = 30.0
    tally.settled("b")
    tally.settled("audit")
    assert heard.told == [(3, 6, None), (5, 6, 30.0), (6, 6, 10.0), (6, 6, 0.0)]


def test_little_is_too_little_to_tell_the_time_left(clock: list[float]) -> None:
    heard = Heard()
    tally = Tally(heard, {"a": Share(1, 4), "b": Share(1, 96)})
    clock[0] = 60.0
    tally.settled("a")
    assert heard.told == [(0, 2, None), (1, 2, None)]


def test_no_more_time_is_left_than_is_allowed(clock: list[float]) -> None:
    heard = Heard()
    tally = Tally(heard, {"a": Share(1, 10), "b": Share(1, 90)}, most=25.0)
    clock[0] = 20.0
    tally.settled("a")
    assert heard.told[-1] == (1, 2, 5.0)


def test_who_does_not_count_cells_is_not_told() -> None:
    Tally(progress.Silent(), {"a": Share()}).settled("a")


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 40, 119, 720, 7199, 12600)] == [
        "0 s",
        "40 s",
        "119 s",
        "12 min",
        "120 min",
        "3.5 h",
    ]


# --- in a log ---


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "EVERY", 0.0)
    ran = run(*EVAL)
    lines = ran.err.splitlines()
    assert lines[0] == "0 of 2 cells done"
    assert f"0 of 2 cells done; training {CNN} on {TINY}" in lines
    assert f"0 of 2 cells done; {CNN} | none | fgsm linf 8/255, 20 of 20" in lines
    (second,) = (line for line in lines if line.endswith("| noise linf 8/255, 20 of 20"))
    assert re.fullmatch(r"1 of 2 cells done, about \d+ s left; .*", second)
    assert "2 of 2 cells done" in lines
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_lines_are_rare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A minute in steps of a second, one line every ten."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console_progress(quiet=False) as shown:
        shown.stage("cnn | none | pgd", 60)
        for _ in range(60):
            now[0] += 1.0
            shown.advance()
        shown.note("a note comes at once")
    *lines, note = capsys.readouterr().err.splitlines()
    assert lines == [f"cnn | none | pgd, {n} of 60" for n in (10, 20, 30, 40, 50, 60)]
    assert note == "a note comes at once"


def test_several_budgets_count_each_image_once_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "EVERY", 0.0)
    ran = run(*EVAL, "-e", "1/255", "-e", "2/255")
    shown = [line.partition("; ")[2] for line in ran.err.splitlines()]
    start = f"{CNN} | none | fgsm linf at 2 budgets"
    assert [s for s in shown if s.startswith(start)] == [f"{start}, {n} of 40" for n in (0, 20, 40)]


def test_what_is_stored_already_is_counted_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*EVAL).code == 0
    monkeypatch.setattr(console, "EVERY", 0.0)
    ran = run(*EVAL, "-a", "ifgsm")
    assert ran.err.splitlines()[0] == "2 of 3 cells done"


# --- silence ---


@pytest.mark.parametrize("command", ["eval", "run"])
def test_quiet_means_nothing(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(console, "EVERY", 0.0)
    Path("m.yaml").write_text(f"models: {CNN}\nattacks: fgsm\ndatasets: '{TINY}'\naudit: none\n")
    ran = run(*EVAL, "-q") if command == "eval" else run("run", "m.yaml", "-q")
    assert (ran.code, ran.err) == (0, "")
    assert "fgsm" in ran.out


# --- on a terminal ---


def on_a_terminal(*arguments: str, seconds: float = 110) -> tuple[int, str, str]:
    """`advplug ARGUMENTS` with a terminal of 120 columns as its standard error: exit code, output, what was shown."""
    ours, theirs = pty.openpty()
    code = "import sys; from advplug.cli import main; sys.exit(main())"
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    shown, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        elif process.poll() is not None:
            break
    out, _ = process.communicate(timeout=10)
    os.close(ours)
    return process.returncode, out, shown.decode()


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_bars_on_a_terminal() -> None:
    code, out, shown = on_a_terminal(*EVAL, "-a", "pgd:steps=40")
    assert code == 0
    assert "robust %" in out
    assert "\x1b" not in out
    seen = {" ".join(line.split()) for line in re.split(r"[\r\n]+", CONTROL.sub("", shown))}
    cells = [line for line in seen if line.startswith("cells ")]
    images = [line for line in seen if line.startswith(f"{CNN} | none | ")]
    assert any(re.search(r" [012]/3 ", line) for line in cells)
    assert any(re.search(r" (0|20)/20 ", line) for line in images)
    for line in (*cells, *images):
        assert re.search(r" (\d+:\d\d:\d\d|-:--:--)$", line), line
    # The bars are gone at the end: the cursor went up and the lines were cleared.
    assert shown.count("\x1b[2K") >= 2
    assert shown.endswith("computes only what is missing\r\n")


def test_a_name_in_brackets_is_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from advplug.bars import Bars, columns

    screen = Console(force_terminal=True, width=100, color_system=None)
    with Progress(*columns(), console=screen) as bar:
        Bars(bar).stage("[red]mine[/red] | none | pgd", 10)
    assert "[red]mine[/red] | none | pgd" in capsys.readouterr().out


def test_quiet_on_a_terminal() -> None:
    code, out, shown = on_a_terminal(*EVAL, "-q")
    assert (code, shown) == (0, "")
    assert "fgsm" in out
