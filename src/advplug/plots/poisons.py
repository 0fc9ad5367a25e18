"""Attacks on training data as a picture: success along a number of the attack, or what a training trusted by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advplug.errors import UsageError
from advplug.estimate import Estimate
from advplug.plans import Bound
from advplug.plots.curves import Axis, Line, Panel, Point, numbers
from advplug.poisons.plans import PoisonPlan
from advplug.results import Poisoning, RunResult


def axis_of_poisons(plans: Sequence[PoisonPlan]) -> Axis:
    """The number in which the attacks differ; the rounds of a training that chooses where there is one attack.

    Raises UsageError where the attacks differ otherwise.
    """
    return axis_of_attacks({p.attack.label: (p.attack,) for p in plans})


def axis_of_attacks(attacks: Mapping[str, tuple[Bound, ...]]) -> Axis:
    """The same of attacks by label."""
    if len(attacks) < 2:
        return ROUNDS
    found = numbers(attacks)
    if found is None or found.values is None:
        raise UsageError(
            "there is nothing to draw a line along: give one attack with several values of one number "
            "(-a ba:count=7 -a ba:count=70), or one attack and a defense that chooses what to train on"
        )
    return Axis(found.name, found.values, panels=_along_attack)


def _along_attack(result: RunResult, values: Mapping[str, float]) -> list[Panel]:
    """A panel a model: success by defense, beside the clean model's, and the undefended model's clean accuracy."""
    made = []
    for (dataset, model, seed), rows in _grouped(result.poisonings, lambda p: (p.dataset, p.model, p.seed)).items():
        panel = Panel(f"{model} on {dataset}" + (f", seed {seed}" if seed else ""))
        undefended = [p for p in rows if p.defense == "none"]
        for what, name in (("triggered", "attack_success_rate"), ("targets", "poison_success_rate")):
            for defense in dict.fromkeys(p.defense for p in rows):
                own = [p for p in rows if p.defense == defense]
                label = f"{what} as wanted, {'undefended' if defense == 'none' else defense}"
                panel.lines.append(Line(label, _points(own, values, name, True)))
        panel.lines.append(Line("clean accuracy, undefended", _points(undefended, values, "clean_accuracy")))
        reference = _points(undefended, values, "clean_model_success_rate")
        panel.lines.append(Line("triggered as wanted, clean model", reference))
        made.append(Panel(panel.title, [line for line in panel.lines if line.points]))
    return made


def _points(
    rows: Sequence[Poisoning], values: Mapping[str, float], name: str, judged: bool = False
) -> tuple[Point, ...]:
    found = sorted((p for p in rows if p.attack in values), key=lambda p: values[p.attack])
    figures = ((p, p.metrics.get(name)) for p in found)
    return tuple(Point(values[p.attack], e, p.verdict if judged else None) for p, e in figures if e is not None)


def _by_round(result: RunResult, values: Mapping[str, float]) -> list[Panel]:
    """A panel a victim that chose: precision and recall of what it trusted, and the share of the poisons in it."""
    made = []
    for p in result.poisonings:
        for name, facts in p.provenance.get("facts", {}).items():
            rounds = facts.get("rounds")
            if rounds:
                title = f"{p.model} on {p.dataset}, {p.attack}, {name}" + (f", seed {p.seed}" if p.seed else "")
                lines = {
                    "clean share of the trusted": [r["precision"] for r in rounds],
                    "trusted share of the clean": [r["recall"] for r in rounds],
                    "trusted share of the poisons": [_share(r["poisons"], p.poisons) for r in rounds],
                }
                made.append(Panel(title, [_line(label, found) for label, found in lines.items()]))
    return made


def _share(part: int, whole: int | None) -> float | None:
    return part / whole if whole else None


def _line(label: str, found: Sequence[float | None]) -> Line:
    points = ((i + 1, v) for i, v in enumerate(found) if v is not None)
    return Line(label, tuple(Point(float(x), Estimate(v, None, None, 0)) for x, v in points))


def _grouped(rows: Sequence[Poisoning], key: Callable[[Poisoning], Any]) -> dict[Any, list[Poisoning]]:
    groups: dict[Any, list[Poisoning]] = {}
    for row in rows:
        if row.status == "ok":
            groups.setdefault(key(row), []).append(row)
    return groups


ROUNDS = Axis("round", {}, panels=_by_round)
"""The rounds of trainings that chose what to trust."""
