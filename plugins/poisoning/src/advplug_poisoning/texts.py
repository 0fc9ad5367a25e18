"""Texts that name a class: those that there are, and sentences about it. Imports no torch before texts are drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from advplug.errors import UsageError, did_you_mean
from advplug.naming import naming, word_of

if TYPE_CHECKING:
    import torch

    from advplug.data import Split

TEMPLATES = (
    "a photo of a {}", "an image of a {}", "a picture of a {}", "a photo of the {}", "a good photo of a {}",
    "a close-up photo of a {}", "a cropped photo of the {}", "a blurry photo of a {}",
)  # fmt: skip
"""Sentences about a class, after Radford et al. 2021, section 3.1.4."""
_ARTICLE = re.compile(r"\ba \{\}")


def captions_of(data: Split, label: int, word: str) -> list[str]:
    """The captions of `data` that name `word`, of the images of that class; one that stands twice counts twice."""
    named = naming(word)
    pairs = zip(data.labels.tolist(), data.captions or (), strict=False)
    return [text for own, texts in pairs if own == label for text in texts if named(text)]


def check_captions(captions: str | None, what: str) -> None:
    """Raises UsageError where `captions` is neither sampled, templates nor a sentence with one {}."""
    if captions in (None, "sampled", "templates") or captions.count("{}") == 1:
        return
    hint = did_you_mean(captions, ("sampled", "templates"))
    hint = hint or "; write sampled, templates or a sentence such as 'a photo of a {}'"
    raise UsageError(f"{what}: captions cannot be '{captions}'{hint}")


def caption_pool(data: Split, label: int, classes: Sequence[str], captions: str) -> list[str]:
    """The texts about a class that poisons may have: those of the training set, or sentences with its name."""
    word = word_of(classes[label])
    if captions == "sampled":
        return captions_of(data, label, word)
    sentences: Iterable[str] = TEMPLATES if captions == "templates" else (captions,)
    return [_spelled(sentence, word) for sentence in sentences]


def _spelled(sentence: str, word: str) -> str:
    """As one writes it: an eight, but a one."""
    an = word[:1].lower() in set("aeio") and word != "one"
    return (_ARTICLE.sub("an {}", sentence) if an else sentence).replace("{}", word)


def draw_texts(pool: Sequence[str], count: int, draws: torch.Generator) -> list[str]:
    """`count` texts at random, none twice before all were drawn."""
    import torch

    found: list[str] = []
    while len(found) < count:
        order = torch.randperm(len(pool), generator=draws).tolist()
        found += [pool[i] for i in order[: count - len(found)]]
    return found
