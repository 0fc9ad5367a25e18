"""Looks whether every link of the built site leads somewhere, and that pages fetch nothing from elsewhere.

    python docs/check_links.py site

Addresses of other sites in links are left alone: the check uses no network. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page names (`ids`), leads to (`links`) and fetches (`fetched`)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.ids.update(told[name] for name in ("id", "name") if name in told)
        if tag == "a" and "href" in told:
            self.links.append(told["href"])
        if tag in FETCHED and FETCHED[tag] in told and told.get("rel") != "canonical":
            self.fetched.append(told[FETCHED[tag]])


@cache
def page(path: Path) -> Page:
    return Page(path)


def faults(site: Path) -> Iterator[str]:
    """One line for each thing that is wrong. Raises OSError where a page cannot be read."""
    site = site.resolve()
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site)
        for target in page(path).fetched:
            if urlsplit(target).netloc:
                yield f"{name} fetches {target}"
        for target in dict.fromkeys((*page(path).links, *page(path).fetched)):
            wrong = _wrong(site, path, target)
            if wrong:
                yield f"{name} links to {target}: {wrong}"


def _wrong(site: Path, path: Path, target: str) -> str | None:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None
    if parts.path.startswith("/"):
        return "no place on a disk"
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not place.is_relative_to(site):
        return "outside of the site"
    if not place.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and anchor != "__top" and place.suffix == ".html" and anchor not in page(place).ids:
        return "no such place on the page"
    return None


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python docs/check_links.py FOLDER, the built site")
    site = Path(sys.argv[1])
    found = list(faults(site))
    for line in found:
        sys.stderr.write(f"{line}\n")
    count = len(list(site.rglob("*.html")))
    if found or not count:
        sys.exit(f"{len(found)} links of {count} pages are wrong" if count else f"there are no pages in {site}")
    sys.stderr.write(f"the links of {count} pages lead somewhere\n")


if __name__ == "__main__":
    main()
