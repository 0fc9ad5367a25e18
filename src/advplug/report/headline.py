"""What the page begins with: each victim in large figures, with verdicts and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from advplug.report.parts import (
    DASH,
    UNDEFENDED,
    Data,
    Value,
    budget,
    difference,
    grouped,
    judged,
    share_of,
    similarity,
    under,
    victim,
)
from advplug.results import Poisoning, ThreatRow

CARDS, BUDGETS = 8, 3
"""Shown in the headline at most."""
VERDICTS = {
    "trusted": "strong attacks that know the defense were run, and every required check passed",
    "upper bound": "a stronger attack, more steps or a check that was not run may show less robustness",
    "not trustworthy": "a check found that the evaluation went wrong, so the number says little of the model",
    "not measured": "nothing was judged",
}
"""As docs/verdicts.md has it, for one who reads the page alone."""


@dataclass(frozen=True)
class Line:
    """One number of a card, with what it is, its verdict, and how it stands to the undefended model."""

    label: str
    value: Value
    verdict: Value | None = None
    against: Value = DASH


@dataclass(frozen=True)
class Card:
    """One victim under one kind of threat, or after one attack on its training data, in large figures."""

    title: str
    threat: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Headline:
    """What the page begins with; `left` says what was left to the tables, `verdicts` what those that occur mean."""

    lead: tuple[str, ...]
    cards: tuple[Card, ...]
    left: str
    verdicts: tuple[tuple[Value, str], ...]


def headline(data: Data) -> Headline:
    """Clean and worst-case accuracy of each victim, with verdicts; then success of attacks on training data."""
    threats = [t for t in data.result.threats if _worst(t) is not DASH]
    poisoned = [p for p in data.result.poisonings if _success(p)[1] is not DASH]
    named = ("dataset", "model", "defense", "norm", "shape", "goal", "seed")
    victims = list(grouped(threats, lambda t: tuple(getattr(t, name) for name in named)).values())
    cards: list[Card] = [*map(_card, victims), *map(_poison_card, poisoned)]
    shown = sum(line.verdict is not None for card in cards[:CARDS] for line in card.lines)
    judged_rows: list[ThreatRow | Poisoning] = [*threats, *poisoned]
    told = {row.verdict or "not measured" for row in judged_rows}
    total = len(threats) + len(poisoned)
    left = f"These are {shown} of {total} verdicts; the tables below have all." if shown < total else ""
    lead = (*((_LEAD_THREATS.format(_images(data)),) if threats else ()), *((_LEAD_POISONS,) if poisoned else ()))
    meanings = tuple((judged(name), VERDICTS[name]) for name in VERDICTS if name in told)
    return Headline(lead, tuple(cards[:CARDS]), left, meanings)


_LEAD_THREATS = (
    "Of {}: how many are right without attack (clean), and how many nothing that was run could break (worst case), "
    "with 95 % intervals in brackets."
)
_LEAD_POISONS = "After attacks on training data: how many images get the answer that the attacker wants."


def _images(data: Data) -> str:
    """How many images a cell had."""
    found = {e.n for e in data.evidence.values()}
    if not found:
        return "the images"
    return f"{min(found)} to {max(found)} images" if len(found) > 1 else f"{next(iter(found))} images"


def _card(rows: list[ThreatRow]) -> Card:
    rows = sorted(rows, key=lambda t: budget(t.eps).number or 0.0)
    if len(rows) > BUDGETS:
        rows = [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]
    first = rows[0]
    similar = first.worst_case_similarity is not None
    what = "similarity" if similar else "accuracy, %"
    clean = similarity(first.clean_similarity, True) if similar else share_of(first.clean_accuracy, True)
    lines = [Line(f"clean {what}", clean)]
    for t in rows:
        against = DASH if similar else difference(t.difference_to_baseline)
        lines.append(Line(f"worst-case {what}, at eps {t.eps}", _worst(t), judged(t.verdict), against))
    threat = f"{under(first)}" + (", undefended" if first.defense == UNDEFENDED else "")
    return Card(victim(first), threat, tuple(lines))


def _poison_card(p: Poisoning) -> Card:
    what, success = _success(p)
    lines = (
        Line("clean accuracy, %", share_of(p.metrics.get("clean_accuracy"), True)),
        Line(f"{what} as the attacker wants, %", success, judged(p.verdict)),
    )
    return Card(victim(p), f"{p.dataset}, trained under {p.attack}", lines)


def _success(p: Poisoning) -> tuple[str, Value]:
    """What is measured of an attack on training data, and the number."""
    found = share_of(p.metrics.get("attack_success_rate"), True)
    if found is not DASH:
        return "triggered images answered", found
    return "targets answered", share_of(p.metrics.get("poison_success_rate"), True)


def _worst(t: ThreatRow) -> Value:
    found = share_of(t.worst_case_accuracy, True)
    return similarity(t.worst_case_similarity, True) if found is DASH else found
