"""What mkdocs does beyond its own when it builds the site (`make docs`).

Pages from elsewhere in the repository join those of `docs`, links between them lead to their place in the site, other
files that are linked come along under `files/`, and the reference is made from what is installed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify  # type: ignore[import-untyped]

from reference import pages

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"plugins/{p.parent.name}/README.md": f"plugins/{p.parent.name}.md" for p in ROOT.glob("plugins/*/README.md")},
}
"""Pages outside of `docs`, by their path in the repository, and where the site has them."""
LICENCE = "license.md"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Studies and plugins are found, not listed; a page for missing addresses is the server's affair.

    Headings get the addresses that GitHub gives them, so that links work in both places.
    """
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    config.nav = [_found(entry) for entry in config.nav]
    config.theme.static_templates.discard("404.html")
    return config


def _found(entry: Any) -> Any:
    if isinstance(entry, dict) and "Studies" in entry:
        others = sorted(p.name for p in (HERE / "studies").glob("*.md") if p.name != "index.md")
        return {"Studies": ["studies/index.md", *(f"studies/{name}" for name in others)]}
    if isinstance(entry, dict) and "Plugins" in entry:
        return {"Plugins": [*entry["Plugins"], *sorted(v for v in ELSEWHERE.values() if v.startswith("plugins/"))]}
    return entry


def on_files(files: Files, config: Any) -> Files:
    for path, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    licence = (ROOT / "LICENSE").read_text()
    files.append(File.generated(config, LICENCE, content=f"# Licence\n\n```text\n{licence}```\n"))
    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    for linked in sorted(set(_linked_files())):
        files.append(File.generated(config, f"files/{linked}", abs_src_path=str(ROOT / linked)))
    return files


def _linked_files() -> Iterator[str]:
    """Files of the repository that a page links to and that are no page of the site, as paths from its root."""
    for source in (*HERE.rglob("*.md"), *(ROOT / path for path in ELSEWHERE)):
        for _, target, _ in LINK.findall(BLOCK.sub("", source.read_text())):
            place = (source.parent / target).resolve()
            if place.is_file() and place.is_relative_to(ROOT) and _page(place) is None:
                yield str(place.relative_to(ROOT))


def _page(place: Path) -> str | None:
    """Where the site has the file, if it is a page or lies in `docs`."""
    if place.is_relative_to(HERE):
        return place.relative_to(HERE).as_posix()
    path = place.relative_to(ROOT).as_posix()
    return {"README.md": "index.md", "LICENSE": LICENCE, **ELSEWHERE}.get(path)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between pages as the site needs them; marks of generated parts, and of tests behind a language, go."""
    sources = {uri: ROOT / path for path, uri in ELSEWHERE.items()}
    source = sources.get(page.file.src_uri, HERE / page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        place = (source.parent / match[2]).resolve()
        if not place.is_file() or not place.is_relative_to(ROOT):
            return match[0]  # generated pages; whatever else does not exist mkdocs complains of
        there = _page(place) or f"files/{place.relative_to(ROOT).as_posix()}"
        return f"{match[1]}{posixpath.relpath(there, here or '.')}{match[3] or ''})"

    parts = BLOCK.split(markdown)
    for number, part in enumerate(parts):
        if part.startswith("```"):
            parts[number] = re.sub(r"^```(\w+) (?!title=)[^\n]*", r"```\1", part)
        else:
            parts[number] = LINK.sub(moved, re.sub(r"^<!-- .* -->$", "", part, flags=re.MULTILINE))
    return "".join(parts)
