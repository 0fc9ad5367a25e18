"""Words in texts: whether a caption names a class. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def word_of(name: str) -> str:
    """A class's name as a text has it."""
    return " ".join(name.replace("_", " ").split())


def naming(word: str) -> Callable[[str], bool]:
    """Whether a text names `word` by itself or in the plural: a three and threes, not thirty-three."""
    parts = r"\s+".join(re.escape(part) for part in word.split())
    pattern = re.compile(rf"(?<![\w-]){parts}(?:e?s)?(?![\w-])", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def named_most(texts: Sequence[str], classes: Sequence[str]) -> int | None:
    """Which of the classes most of the texts name, the first of several that are named equally often; None: none."""
    counts = [sum(map(naming(word_of(name)), texts)) for name in classes]
    return counts.index(max(counts)) if any(counts) else None
