"""The tutorial and the guides are followed step by step; every mistake of the FAQ trips what it says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from cli_tools import run
from walks import LONG_WALKS, WALKS, alike, follow, not_printed, page_path, write_files

FAQ = page_path("faq.md")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("mine", "coarse", "mistakes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*WALKS, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_WALKS)])
def test_the_page_can_be_followed(name: str, folder: Path) -> None:
    follow(page_path(name), folder, run)


def sections() -> dict[str, str]:
    """The questions of the FAQ that have a command, with their texts."""
    found = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", FAQ.read_text(), re.MULTILINE | re.DOTALL)
    return {title: text for title, text in found if "**Caught by**" in text}


def caught_by(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text.partition("**Caught by**")[2].partition("\n\n")[0])


def test_the_questions_name_checks_that_exist() -> None:
    from advplug.health import CHECKS
    from advplug.health.poisons import CHECKS as POISON_CHECKS

    assert len(sections()) >= 14
    verdicts = {"upper bound"}
    for title, text in sections().items():
        names = caught_by(text)
        assert names, title
        assert set(names) <= {*CHECKS, *POISON_CHECKS, *verdicts}, title


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", sections())
def test_the_mistake_is_caught(title: str, folder: Path) -> None:
    text = sections()[title]
    write_files(FAQ, folder)
    (block,) = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    arguments = shlex.split(block.replace("\\\n", " "))[1:]
    result = run(*arguments, "--json", "-o", "found").json
    rows = [*result["threats"], *result["cells"], *result.get("poisonings", [])]
    found = {flag["name"] for row in rows for flag in row["flags"]} | {t.get("verdict") for t in rows}
    assert set(caught_by(text)) & found, found


def test_outputs_are_compared_by_words_and_nearly_by_numbers() -> None:
    assert alike(" none   1/10   98.0 [93.0, 99.4]   trusted", "none 1/10 97.0 [92.1, 98.9] trusted")
    assert not alike("none 1/10 98.0 trusted", "none 1/10 98.0 upper bound")
    assert not alike("none 1/10 98.0", "none 1/20 98.0")
    assert not alike("passes 2,000", "passes 4,000")
    assert not alike("a 50.0", "a 80.0")
    assert list(not_printed("b 1\na 1", "a 1\nb 1")) == ["a 1"]
    assert list(not_printed("a 1\n\nb 1", "a 1\nc 1\nb 1")) == []
