"""What a report says, read from its HTML without a browser."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "input", "br", "link"}


@dataclass
class Node:
    """An element, with its children and texts in order."""

    tag: str
    attributes: dict[str, str]
    inside: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(i if isinstance(i, str) else f" {i.text} " for i in self.inside).split())

    def all(self, tag: str = "", **wanted: str) -> list[Node]:
        """The descendants of a tag with these attributes (`class_` for class, which may be one of several)."""
        found = []
        for node in (i for i in self.inside if isinstance(i, Node)):
            if (not tag or node.tag == tag) and all(node._has(k.rstrip("_"), v) for k, v in wanted.items()):
                found.append(node)
            found += node.all(tag, **wanted)
        return found

    def one(self, tag: str = "", **wanted: str) -> Node:
        (found,) = self.all(tag, **wanted)
        return found

    def _has(self, name: str, value: str) -> bool:
        mine = self.attributes.get(name)
        return mine is not None and (value in mine.split() if name == "class" else value == mine)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.path = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs})
        self.path[-1].inside.append(node)
        if tag not in VOID:
            self.path.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.path[-1].inside.append(Node(tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.path[-1].tag == tag, f"</{tag}> closes <{self.path[-1].tag}>"
        self.path.pop()

    def handle_data(self, data: str) -> None:
        self.path[-1].inside.append(data)


def parse(html: str) -> Node:
    """The page; every element has to be closed where it belongs."""
    reader = _Reader()
    reader.feed(html)
    assert reader.path == [reader.root]
    return reader.root


def rows(table: Node) -> list[dict[str, str]]:
    """A table, row by row, by the headings of its columns."""
    heads = [th.text for th in table.one("thead").all("th")]
    return [dict(zip(heads, (c.text for c in cells(tr)), strict=True)) for tr in table.one("tbody").all("tr")]


def cells(row: Node) -> list[Node]:
    return [n for n in row.inside if isinstance(n, Node)]


def numbers(table: Node) -> list[dict[str, float]]:
    """The exact numbers behind it."""
    heads = [th.text for th in table.one("thead").all("th")]
    return [
        {h: float(c.attributes["data-value"]) for h, c in zip(heads, cells(tr), strict=True)
         if "data-value" in c.attributes}
        for tr in table.one("tbody").all("tr")
    ]  # fmt: skip


def pixels(image: Node) -> np.ndarray:
    """(H, W, 4) of an image in the page: red, green, blue and opacity."""
    kind, data = image.attributes["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
