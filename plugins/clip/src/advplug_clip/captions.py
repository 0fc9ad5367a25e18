"""The small grammar that puts scenes of digits into words. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
COLOURS = {
    "red": (1.0, 0.15, 0.15), "orange": (1.0, 0.55, 0.1), "yellow": (1.0, 0.95, 0.2), "green": (0.2, 0.9, 0.25),
    "cyan": (0.2, 0.95, 0.95), "blue": (0.35, 0.5, 1.0), "pink": (1.0, 0.45, 0.8), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
"""RGB of the digits: bright, all of them."""
BACKGROUNDS = {
    "black": (0.0, 0.0, 0.0), "maroon": (0.38, 0.02, 0.08), "brown": (0.36, 0.22, 0.08),
    "navy": (0.02, 0.04, 0.38), "purple": (0.34, 0.06, 0.4), "teal": (0.02, 0.36, 0.36),
}  # fmt: skip
"""RGB of what is behind: dark, all of them."""
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACES = {
    "centre": ("in the middle", "at the center"),
    "top left": ("at the top left", "in the top left corner", "in the upper left corner"),
    "top right": ("at the top right", "in the top right corner", "in the upper right corner"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left corner"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right corner"),
}
PROMPTS = (
    "a photo of the digit {}",
    "an image of the number {}",
    "a handwritten {}",
    "the digit {}",
    "a picture of a {}",
)
"""What a short caption looks like: it names the digit and nothing else."""
TEMPLATES = 5
"""Ways to build a long caption."""
ATTRIBUTES = ("count", "size", "colour", "place", "background")
"""What a long caption may say beside the digit."""


@dataclass(frozen=True)
class Scene:
    """What is to be seen: `count` copies of a digit; the place is named where there is one of them."""

    digit: int
    colour: str
    size: str
    place: str | None
    background: str
    count: int = 1


def short_caption(scene: Scene, template: int) -> str:
    """The digit alone, in the words of `PROMPTS[template]`."""
    return _articles(PROMPTS[template].format(DIGITS[scene.digit]))


def long_caption(scene: Scene, template: int, words: Sequence[float], said: Collection[str] = ATTRIBUTES) -> str:
    """The digit with those attributes that are `said`; `words` are three numbers in [0, 1) that choose synonyms.

    With all attributes said, two scenes have the same caption only if they are the same.
    """
    several = scene.count > 1
    size = _pick(SIZES[scene.size], words[0]) if "size" in said else ""
    colour = scene.colour if "colour" in said else ""
    place = _pick(PLACES[scene.place], words[1]) if scene.place and "place" in said else ""
    ground = scene.background if "background" in said else ""
    behind = ground and _pick((f"on a {ground} background", f"on {ground}"), words[2])
    number = DIGITS[scene.count] if several and "count" in said else ""
    name = PLURALS[scene.digit] if several else DIGITS[scene.digit]
    a, one = (number, "") if several else ("a", "digit")
    parts: tuple[str, ...]
    match template:
        case 0:
            parts = (a, size, colour, name, place, behind)
        case 1:
            parts = ("a photo of", a, size, colour, name, place, behind)
        case 2:
            parts = ("the", number, size, colour, one, name, place, behind)
        case 3:
            parts = (a, size, "handwritten", name, f"in {colour}" if colour else "", place, behind)
        case _:
            parts = (f"a {ground} background with" if ground else "an image with", a, size, colour, name, place)
    return _articles(" ".join(p for p in parts if p))


def _pick(choices: Sequence[str], at: float) -> str:
    return choices[int(at * len(choices))]


def _articles(text: str) -> str:
    """`a orange` to `an orange`; `one` begins with a consonant when it is spoken."""
    words = text.split(" ")
    pairs = zip(words, [*words[1:], ""], strict=True)
    return " ".join("an" if w == "a" and n[:1] in set("aeio") and n != "one" else w for w, n in pairs)
