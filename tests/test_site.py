"""The documentation as a site: its reference, its navigation, its links, and that it works from a disk."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from advplug import hooks
from advplug.cli import cli
from browser import DESKTOP, PHONE, Browser, browser, needs_browser
from conftest import ROOT, python

DOCS = ROOT / "docs"
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed: make docs installs it"
)


def module(name: str) -> Any:
    """A module of `docs`."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    found: dict[str, str] = module("reference").pages()
    return found


def test_the_reference_has_every_plugin_and_every_parameter(pages: dict[str, str]) -> None:
    from advplug.registry import registry

    known = module("generate").own(registry())
    for kind in hooks.KINDS:
        text = pages[f"reference/{kind}s.md"]
        for entry in known.entries(kind):
            assert f"`{entry.name}`" in text, entry.name
            for p in entry.params():
                assert f"| `{p.name}` |" in text, (entry.name, p.name)
    assert re.search(r"\| `quality` \| int \| `75` \| ≥ 1 and ≤ 100 \| JPEG quality", pages["reference/defenses.md"])
    assert "https://arxiv.org/abs/1706.06083" in pages["reference/attacks.md"]


def test_the_reference_has_every_command_and_every_flag(pages: dict[str, str]) -> None:
    text = pages["reference/cli.md"]

    def look(command: click.Command, path: str) -> None:
        (section,) = re.findall(rf"^## {path} \{{.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        for option in command.params:
            assert all(o in section for o in option.opts if isinstance(option, click.Option)), (path, option.opts)
        for name, below in getattr(command, "commands", {}).items():
            look(below, f"{path} {name}")

    look(cli, "advplug")


def test_the_reference_needs_neither_torch_nor_mkdocs() -> None:
    code = (
        "import sys; sys.path.insert(0, 'docs'); import reference; reference.pages(); "
        "print([m for m in ('torch', 'mkdocs') if m in sys.modules])"
    )
    assert python("-c", code, cwd=ROOT).stdout == "[]\n"


def listed(entry: Any) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
    for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from listed(value)


def test_the_navigation_has_every_page_and_the_makefile_checks_the_site(pages: dict[str, str]) -> None:
    """Studies are found by themselves, and so are the pages of plugins."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    written = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    elsewhere = {"changelog.md", "contributing.md", "license.md", *pages}
    studies = {p for p in written if p.startswith("studies/") and p != "studies/index.md"}
    assert set(listed(config["nav"])) == (written | elsewhere) - studies
    assert config["strict"] is True
    assert set(config["validation"]["links"].values()) == {"warn"}
    assert "docs/check_links.py site" in (ROOT / "Makefile").read_text()


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.html").write_text('<h1 id="there">b</h1><a href="../a.html">a</a>')
    (tmp_path / "a.html").write_text(
        '<a href="below/b.html#there">fine</a><a href="https://example.org/">fine</a><a href="#">fine</a>'
        '<a href="below/b.html#gone">no</a><a href="c.html">no</a><a href="/b.html">no</a><a href="../x">no</a>'
        '<img src="missing.png"><script src="https://example.org/x.js"></script>'
    )
    found = list(module("check_links").faults(tmp_path))
    assert found == [
        "a.html fetches https://example.org/x.js",
        "a.html links to below/b.html#gone: no such place on the page",
        "a.html links to c.html: no such file",
        "a.html links to /b.html: no place on a disk",
        "a.html links to ../x: outside of the site",
        "a.html links to missing.png: no such file",
    ]
    done = python(str(DOCS / "check_links.py"), str(tmp_path))
    assert done.returncode == 1
    assert "6 links of 2 pages are wrong" in done.stderr


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.timeout(600)
def test_the_site_is_built_strictly_and_its_links_lead_somewhere(site: Path) -> None:
    assert list(module("check_links").faults(site)) == []
    for name in ("index.html", "plugins/clip.html", "changelog.html", "reference/attacks.html"):
        assert (site / name).is_file()
    assert not list(site.rglob("*.py"))
    text = (site / "attacks.html").read_text()
    assert "generated --" not in text
    assert "<td><code>aa.apgd-ce</code></td>" in text


@pytest.mark.slow
@needs_mkdocs
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["[gone](gone.md)", "[gone](attacks.md#gone)", "[gone](/attacks.md)"])
def test_a_broken_link_ends_the_build(fault: str, tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("plugins/*/README.md", "benchmarks/results/**/*.svg", "recipes/*", "benchmarks/*.py"):
        for file in ROOT.glob(name):
            (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    with (tmp_path / "docs" / "verdicts.md").open("a") as out:
        out.write(f"\n{fault}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "verdicts.md" in done.stderr
    assert fault.partition("(")[2].rstrip(")") in done.stderr


def shown(tab: Browser, page: Path, size: tuple[int, int]) -> None:
    tab.open(page, size)
    assert [line for line in tab.console if "error" in line or "exception" in line] == [], page
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == [], page
    wide = tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{page} can be moved sideways at {size[0]} pixels"


@pytest.mark.slow
@needs_mkdocs
@needs_browser
@pytest.mark.timeout(600)
def test_the_site_works_from_a_disk_and_on_a_phone(site: Path) -> None:
    with browser() as tab:
        for page in sorted(site.rglob("*.html")):
            for size in (DESKTOP, PHONE):
                shown(tab, page, size)
        tab.open(site / "index.html")
        tab.run("document.querySelector('.md-search__input').focus()")
        tab.type("caption-pgd")
        tab.run("document.querySelector('.md-search__input').dispatchEvent(new Event('keyup'))")
        found = tab.run(
            "new Promise((done) => { const look = () => {"
            " const n = document.querySelectorAll('.md-search-result__item').length;"
            " n ? done(n) : setTimeout(look, 50) }; look(); setTimeout(() => done(0), 20000) })"
        )
        assert found > 0
