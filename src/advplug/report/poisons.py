"""The section on attacks on training data: success, and poisons beside their originals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from advplug.evidence import Array
from advplug.report import figures
from advplug.report.images import amplified, called, strip, tile
from advplug.report.parts import (
    Data,
    Grid,
    Picture,
    Section,
    Strip,
    Value,
    difference,
    grouped,
    judged,
    percentage,
    share_of,
    tabulated,
    victim,
    word,
)
from advplug.results import Poisoning
from advplug.stored.samples import PoisonSample

BYTES = 400_000
"""All images of the section, as text; those of further attacks are left out."""


def poisonings(data: Data) -> Section | None:
    """Success of attacks on training data, beside what the clean model does on the same images."""
    made = [p for p in data.result.poisonings if p.status == "ok"]
    if not made:
        return None

    def metric(name: str, interval: bool = False) -> Callable[[Any], Value]:
        return lambda p: share_of(p.metrics.get(name), interval)

    columns: dict[str, Callable[[Any], Value]] = {
        "attack": lambda p: word(p.attack),
        "model": lambda p: word(p.model),
        "defense": lambda p: word(p.defense),
        "dataset": lambda p: word(p.dataset),
        "poisons": lambda p: word("-" if p.poisons is None else f"{p.poisons} of {p.training_images}"),
        "clean %": metric("clean_accuracy"),
        "triggered as wanted % [95 %]": metric("attack_success_rate", True),
        "by the clean model %": metric("clean_model_success_rate"),
        "against undefended, points": lambda p: difference(p.differences.get("attack_success_rate")),
        "triggered, still right %": metric("triggered_accuracy"),
        "targets as wanted % [95 %]": metric("poison_success_rate", True),
        "targets by the clean model %": metric("clean_model_poison_success_rate"),
        "verdict": lambda p: judged(p.verdict),
    }
    table = tabulated("Attacks on the training data", columns, made, ("dataset",), heads=3, id="poisonings-table")
    rows = [_success(p) for p in made]
    svg = figures.pairs(rows, ("clean model", "poisoned model"), "poison", "answers as the attacker wants, %")
    text = "How often images with the trigger, or the targets, get the answer that the attacker wants."
    lead, grids = _grids(data, made)
    return Section("poisonings", "Poisoned training data", lead, (Picture("Success", text, svg, table),), grids=grids)


def _success(p: Poisoning) -> tuple[str, float | None, float | None]:
    pair = ("clean_model_success_rate", "attack_success_rate")
    if p.metrics.get(pair[1]) is None:
        pair = ("clean_model_poison_success_rate", "poison_success_rate")
    one, other = (p.metrics.get(name) for name in pair)
    return f"{p.attack} on {victim(p)}", percentage(one), percentage(other)


# --- images ---


def _grids(data: Data, made: list[Poisoning]) -> tuple[tuple[str, ...], tuple[Grid, ...]]:
    """The images of each attack, and what is said of them."""
    found = [(p, data.poisons[p.key]) for p in made if p.key in data.poisons]
    attacks = grouped(found, lambda f: (f[0].dataset, f[0].attack, f[0].seed, f[1].poisoned.tobytes()))
    grids: list[Grid] = []
    left = 0
    for own in attacks.values():
        classes = data.classes.get(own[0][0].dataset, ())
        more = [_poisons(*own[0], classes), *_triggers(own, classes)]
        if sum(len(s.data) for g in (*grids, *more) for s in g.strips) > BYTES and grids:
            left += 1
            continue
        grids += more
    lead: tuple[str, ...] = (_LEAD,) if grids else ()
    if left:
        lead += (f"Images of {left} more attacks are left out, so that the page stays small.",)
    return lead, tuple(grids)


_LEAD = (
    "Below the figures: some training images before and after, with the class that each is said to be of, and test "
    "images on which the trigger has something to gain. Bold is what changed, or what the attacker wants."
)


def _poisons(made: Poisoning, s: PoisonSample, classes: tuple[str, ...]) -> Grid:
    before, after = called(s.before, classes), called(s.after, classes)
    changed = tuple(a != b for a, b in zip(before, after, strict=True))
    if s.captions is not None:
        before, after = s.captions.tolist()
        changed = tuple(a != b for a, b in zip(before, after, strict=True))
    told = f"{made.attack} on {made.dataset}" + (f", seed {made.seed}" if made.seed else "")
    strips = (
        Strip("original", f"Original training images; said to be: {', '.join(before)}", strip(s.original),
              tuple(before), (False,) * len(s)),
        Strip("poisoned", f"Poisoned training images; said to be: {', '.join(after)}", strip(s.poisoned),
              tuple(after), changed),
        *_apart(s.original, s.poisoned, "poisons and originals"),
    )  # fmt: skip
    header = tuple(f"no. {row}" for row in s.row.tolist())
    return Grid(f"Poisons of {told}", f"{len(s)} of {made.poisons}", header, strips, tile(s.original.shape[-1]), True,
                heading="training image")  # fmt: skip


def _apart(before: Array, after: Array, what: str) -> tuple[Strip, ...]:
    pixels, factor = amplified(before, after)
    same = np.array_equal(before, after)
    told = "no difference" if same else f"difference × {factor}"
    return (Strip(told, f"Absolute {told} of {what}", strip(pixels)),)


def _triggers(own: list[tuple[Poisoning, PoisonSample]], classes: tuple[str, ...]) -> tuple[Grid, ...]:
    """Test images with the trigger, and what each victim says of them."""
    first = own[0][1]
    if first.triggered is None or first.clean is None or first.index is None or first.y is None:
        return ()
    assert first.wanted is not None
    wanted = called(first.wanted, classes)
    strips = [Strip("without the trigger", "Test images", strip(first.clean))]
    for made, s in own:
        if s.answer is None or s.triggered is None:
            continue
        answers = called(s.answer, classes)
        hit = tuple(a == b for a, b in zip(answers, wanted, strict=True))
        label = f"with it, answers of {victim(made)}"
        strips.append(Strip(label, f"The same {label}: {', '.join(answers)}", strip(s.triggered), tuple(answers), hit))
    strips += _apart(first.clean, first.triggered, "images with and without the trigger")
    title = f"Trigger of {own[0][0].attack} on {own[0][0].dataset}; it asks for {', '.join(dict.fromkeys(wanted))}"
    small = tuple(f"no. {i}" for i in first.index.tolist())
    return (Grid(title, f"{len(wanted)} test images", tuple(called(first.y, classes)), tuple(strips),
                 tile(first.clean.shape[-1]), True, small),)  # fmt: skip
