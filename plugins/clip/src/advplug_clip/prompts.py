"""Prompt templates: the sentences that class names are put into (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from advplug.errors import UsageError, did_you_mean
from advplug_clip.captions import DIGITS, PROMPTS

if TYPE_CHECKING:
    from advplug_clip.scorer import Groups

SETS = ("digits", "simple", "openai")
"""Of a handwritten digit; a photo of it; the 80 for ImageNet, which come with open_clip."""
SIMPLE = ("a photo of a {}.",)
NUMERALS = "0123456789"
NAMING = (*SIMPLE, "an image of a {}", "a picture of a {}", "the {}", "{}")
"""What images of a class are called where data have no captions; of digits, `PROMPTS`."""
_ARTICLE = re.compile(r"\ba \{\}")


def check(templates: str | None) -> None:
    """Raises UsageError where `templates` is neither a set's name nor a sentence with one {}."""
    if templates is None or templates in SETS or templates.count("{}") == 1:
        return
    if "{}" in templates:
        raise UsageError(f"templates='{templates}' has {{}} more than once; a class is named once in a sentence")
    hint = did_you_mean(templates, SETS) or f"; write {', '.join(SETS)} or a sentence such as 'a photo of a {{}}'"
    raise UsageError(f"templates='{templates}' is no set of templates and has no {{}} for the class{hint}")


def prompts(templates: str | None, classes: Sequence[str]) -> Groups:
    """The sentences of each class. None stands for `digits` where the classes are digits, else for `simple`.

    Underscores in a class's name are read as spaces.
    """
    if templates is None:
        templates = "digits" if _digits(classes) else "simple"
    if templates == "digits":
        return tuple(tuple(_spelled(sentence, name) for sentence in PROMPTS) for name in _names(classes))
    return _filled(_sentences(templates), classes)


def class_captions(classes: Sequence[str]) -> Groups:
    """What the images of each class are called in training, in several sentences, where they have no captions."""
    return prompts("digits", classes) if _digits(classes) else _filled(NAMING, classes)


def _digits(classes: Sequence[str]) -> bool:
    return set(classes) <= {*DIGITS, *NUMERALS}


def _names(classes: Sequence[str]) -> list[str]:
    return [" ".join(name.replace("_", " ").split()) for name in classes]


def _filled(sentences: Sequence[str], classes: Sequence[str]) -> Groups:
    return tuple(tuple(sentence.replace("{}", name) for sentence in sentences) for name in _names(classes))


def _sentences(templates: str) -> tuple[str, ...]:
    if templates == "openai":
        from advplug.vision import import_torchvision

        import_torchvision()
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(make("{}") for make in OPENAI_IMAGENET_TEMPLATES)
    return SIMPLE if templates == "simple" else (templates,)


def _spelled(sentence: str, name: str) -> str:
    """As the captions of digits have it: an eight, but a one."""
    an = name[:1] in set("aeio") and name != "one"
    return (_ARTICLE.sub("an {}", sentence) if an else sentence).replace("{}", name)
