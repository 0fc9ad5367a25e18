"""The 1000 ImageNet classes, so that a pretrained head can be matched to folder names. Imports no torch.

The order of the WordNet ids is the order of the classes in every ImageNet classifier of torchvision and
timm; the names are torchvision's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def class_table() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) of each class, in the order of the logits."""
    text = resources.files("advplug.builtin").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple((line[:9], line[10:]) for line in text.splitlines())


@functools.cache
def _positions() -> dict[str, int]:
    known: dict[str, int] = {}
    for position, (_, name) in enumerate(class_table()):
        lower = _plain(name).lower()
        if lower in known:  # a Cardigan is a dog, a cardigan is not: only the exact spelling tells
            known.pop(lower)
        else:
            known[lower] = position
    for position, (wnid, name) in enumerate(class_table()):
        known[wnid] = known[_plain(name)] = position
    return known


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def column(name: str) -> int | None:
    """The logit of the class called `name`: a WordNet id, a class name, or 'id name' as some folders have it."""
    known, plain = _positions(), _plain(name)
    wnid = plain[:9] if plain[:1] == "n" and plain[1:9].isdigit() else ""
    return next((known[key] for key in (wnid, plain, plain.lower()) if key in known), None)


def columns(classes: Sequence[str]) -> tuple[int, ...] | None:
    """The logits of `classes` in a 1000-class head, or None where one is unknown or two are the same."""
    found = [column(name) for name in classes]
    known = tuple(c for c in found if c is not None)
    return known if known and len(set(known)) == len(found) else None
