"""Pages that are followed from top to bottom: files are written, code and commands run, outputs compared."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from conftest import ROOT, advplug, install

WALKS = ("howto/own-model.md", "howto/own-data.md", "howto/adaptive-attack.md", "howto/ci-gate.md")
LONG_WALKS = ("tutorial.md",)
"""Followed by slow tests; the others only see whether the commands can be planned."""
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"^[+-]?\d[\d,]*(\.\d+)?$")


@dataclass(frozen=True)
class Block:
    """What stands between two fences; `title` is a file's name."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def write_files(page: Path, folder: Path) -> None:
    """Writes the blocks that have a file's name."""
    for block in blocks_of(page):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)


def command_lines(text: str) -> list[str]:
    """Commands of a block, without comments; a backslash continues a line."""
    return [line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def follow(page: Path, folder: Path, run: Callable[..., Any]) -> None:
    """Does what the page says, in `folder`, which is the current one. `run(*arguments)` is the command line.

    Blocks without a language hold commands that succeed; those named sh commands that may end with 1, as gates do, or
    that are for the reader alone. A text block shows lines of what the last command printed.
    """
    names: dict[str, Any] = {"__name__": "page"}
    printed, site = "", folder / "site-packages"
    write_files(page, folder)
    for block in blocks_of(page):
        if block.language == "python" and not block.title:
            exec(compile(block.text, page.name, "exec"), names)
        elif block.language == "text" and printed:
            missing = list(not_printed(block.text, printed))
            assert not missing, f"{page.name} shows {missing}, printed was:\n{printed}"
        elif block.language in ("", "sh"):
            for line in command_lines(block.text):
                first, *arguments = shlex.split(line)
                if line.startswith("pip install -e ") and block.language == "":
                    install(folder / arguments[-1], site)
                elif first == "advplug":
                    done = advplug(*arguments, site=site) if site.is_dir() else run(*arguments)
                    code, out, err = told(done)
                    assert code == 0 or (code == 1 and block.language == "sh"), err
                    printed = f"{out}\n{err}"
                else:
                    assert block.language == "sh", f"no one runs: {line}"


def told(done: Any) -> tuple[int, str, str]:
    """Code, output and error of either kind of run."""
    return (done.code, done.out, done.err) if hasattr(done, "out") else (done.returncode, done.stdout, done.stderr)


def not_printed(shown: str, printed: str) -> Iterator[str]:
    """Lines of `shown` that are not among those printed, in their order, up to what machines may differ in."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip() and not any(alike(line, other) for other in lines):
            yield line


def alike(shown: str, printed: str) -> bool:
    """The same words; numbers may be off by 10, which for most is percent, or by a third. Rules are one."""
    pairs = zip_longest(*([*_words(line)] for line in (shown, printed)), fillvalue="")
    return all(a == b or _near(a, b) for a, b in pairs)


def _words(line: str) -> list[str]:
    return re.sub(r"─+", "─", re.sub(r"([\[\],:;%])(?=\s|$|\])", r" \1", line.replace("[", "[ "))).split()


def _near(a: str, b: str) -> bool:
    if not (NUMBER.match(a) and NUMBER.match(b)):
        return False
    x, y = (float(text.replace(",", "")) for text in (a, b))
    return abs(x - y) <= max(10, 0.34 * max(abs(x), abs(y)))


def page_path(name: str) -> Path:
    return ROOT / "docs" / name
