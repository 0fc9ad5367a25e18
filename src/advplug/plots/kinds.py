"""Single figures of a stored run, by kind; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from advplug.errors import AdvplugError, UsageError
from advplug.estimate import Estimate
from advplug.parse import parse_reference, parse_stack
from advplug.plans import Bound, bind, bind_stack
from advplug.plots.curves import COLOURS, MARKS, Axis, canvases, drawn, legend, numbers, panels, style
from advplug.plots.poisons import ROUNDS, axis_of_attacks
from advplug.registry import registry
from advplug.results import Cell, RunResult, ThreatRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Canvas
    from matplotlib.figure import Figure

Threat = tuple[str, str, str, str, int]
"""dataset, norm, eps, goal, seed"""
_ORIGINS = (("static", "s"), ("bare", "D"), ("adaptive", "o"))
"""Where images were crafted, and the marker for it."""


def figure_of(result: RunResult, kind: str) -> Figure:
    """The figure of that kind, a panel a threat. Raises UsageError where the run holds nothing to draw in it."""
    made = _KINDS[kind](result)
    if made is None:
        raise UsageError(f"the run holds nothing for {kind}: {_NEEDS[kind]}")
    return made


def _curve(result: RunResult) -> Figure | None:
    return _lines(result, Axis("eps"))


def _sweep(result: RunResult) -> Figure | None:
    labels = dict.fromkeys(t.defense for t in result.threats if t.defense != "none")
    stacks = _bound(labels, lambda label: bind_stack(registry(), parse_stack(label)))
    kinds: dict[tuple[str, ...], dict[str, tuple[Bound, ...]]] = {}
    for label, stack in stacks.items():
        kinds.setdefault(tuple(part.entry.name for part in stack if part.entry), {})[label] = stack
    axes = [axis for own in kinds.values() if len(own) > 1 and (axis := numbers(own))]
    # Of several defenses beside each other the one of most values.
    axis = max(axes, key=lambda axis: len(axis.values or ()), default=None)
    return _lines(result, axis) if axis else None


def _success(result: RunResult) -> Figure | None:
    labels = dict.fromkeys(p.attack for p in result.poisonings)
    attacks = _bound(labels, lambda label: (bind(registry(), "attack", parse_reference(label)),))
    return _lines(result, axis_of_attacks(attacks)) if len(attacks) > 1 else None


def _rounds(result: RunResult) -> Figure | None:
    return _lines(result, ROUNDS)


def _bound(labels: Iterable[str], make: Callable[[str], tuple[Bound, ...]]) -> dict[str, tuple[Bound, ...]]:
    """What labels of a run stand for. Raises UsageError for objects of the user's own, which labels do not tell."""
    try:
        return {label: make(label) for label in labels}
    except AdvplugError as error:
        raise UsageError(f"the run's parameters cannot be read off its labels: {error}") from error


def _lines(result: RunResult, axis: Axis) -> Figure | None:
    shown = panels(result, axis)
    return drawn(shown, axis) if shown else None


# --- panels by threat --------------------------------------------------------------------------------


def _threat(row: ThreatRow | Cell) -> Threat:
    return row.dataset, row.norm, row.eps, row.goal, row.seed


def _victim(row: ThreatRow | Cell) -> str:
    return row.model if row.defense == "none" else f"{row.model} ({row.defense})"


def _title(threat: Threat) -> str:
    dataset, norm, eps, goal, seed = threat
    told = goal == "untargeted" or goal.startswith("minimise:")  # the axis names what is lowered
    extra = ("" if told else f", {goal}") + (f", seed {seed}" if seed else "")
    return f"{dataset}, {norm} {eps}{extra}"


def _grouped(rows: Iterable[Any]) -> dict[Threat, list[Any]]:
    groups: dict[Threat, list[Any]] = {}
    for row in rows:
        groups.setdefault(_threat(row), []).append(row)
    return groups


def _error(e: Estimate, scale: float = 100) -> list[list[float]]:
    """Distances to both ends of the interval, in percent unless told otherwise, as matplotlib wants them."""
    low, high = (e.value if end is None else end for end in (e.low, e.high))
    return [[scale * max(e.value - low, 0.0)], [scale * max(high - e.value, 0.0)]]


def _pareto(result: RunResult) -> Figure | None:
    """Clean against worst-case accuracy of every victim; the step line joins those that none beats in both."""
    groups = _grouped(t for t in result.threats if t.clean_accuracy and t.worst_case_accuracy)
    if not groups:
        return None
    with style():
        figure, places = canvases(len(groups))
        for place, (threat, rows) in zip(places, groups.items(), strict=True):
            _pareto_panel(place, rows)
            place.set_title(_title(threat), fontsize=9)
    return figure


def _pareto_panel(canvas: Canvas, rows: Sequence[ThreatRow]) -> None:
    for number, row in enumerate(rows):
        clean, robust = row.clean_accuracy, row.worst_case_accuracy
        assert clean is not None
        assert robust is not None
        marker, fill = MARKS[row.verdict]
        canvas.errorbar(
            100 * clean.value, 100 * robust.value, xerr=_error(clean), yerr=_error(robust), marker=marker or ".",
            fillstyle=fill, markersize=7, color=COLOURS[number % len(COLOURS)], elinewidth=0.7, linestyle="",
            label=_victim(row), markerfacecoloralt="white", zorder=5,
        )  # fmt: skip
    best = front([(r.clean_accuracy.value, r.worst_case_accuracy.value) for r in rows
                  if r.verdict != "not trustworthy" and r.clean_accuracy and r.worst_case_accuracy])  # fmt: skip
    if len(best) > 1:
        xs, ys = zip(*best, strict=True)
        canvas.step([100 * x for x in xs], [100 * y for y in ys], where="pre", color="#777777", linewidth=1,
                    linestyle="--", label="best trade-off", zorder=1)  # fmt: skip
    canvas.set_xlabel("clean accuracy, %")
    canvas.set_ylabel("worst-case accuracy, %")
    canvas.set_xlim(-3, 103)
    canvas.set_ylim(-3, 103)
    canvas.grid(alpha=0.25, linewidth=0.5)
    legend(canvas, {r.verdict for r in rows})


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other one equals or beats in both, by ascending first coordinate."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found[::-1]


def _heatmap(result: RunResult) -> Figure | None:
    """Robust accuracy of every victim under every attack, and the worst case beside them."""
    groups = _grouped(c for c in result.cells if c.status == "ok" and c.metrics.get("robust_accuracy"))
    if not groups:
        return None
    worst = {(_threat(t), _victim(t)): t.worst_case_accuracy for t in result.threats}
    tall = max(len({_victim(c) for c in cells}) for cells in groups.values())
    with style():
        figure, places = canvases(len(groups), (6.4, 1.8 + 0.4 * tall))
        for place, (threat, cells) in zip(places, groups.items(), strict=True):
            victims = list(dict.fromkeys(map(_victim, cells)))
            attacks = list(dict.fromkeys(c.attack for c in cells))
            found = {(_victim(c), c.attack): c.metrics["robust_accuracy"] for c in cells}
            grid = [[found.get((v, a)) for a in attacks] for v in victims]
            own = [worst.get((threat, v)) for v in victims]
            if len(attacks) > 1 and any(own):
                grid = [[*row, e] for row, e in zip(grid, own, strict=True)]
                attacks.append("worst case")
            _matrix(place, grid, victims, [_short(a) for a in attacks])
            place.set_title(f"robust accuracy in %, {_title(threat)}", fontsize=9)
    return figure


def _short(attack: str) -> str:
    """A transfer attack by what its images were crafted on."""
    source = parse_reference(attack).get("from") if attack.startswith("transfer:") else None
    return f"from {source}" if source else attack


def _matrix(canvas: Canvas, grid: list[list[Estimate | None]], rows: list[str], columns: list[str]) -> None:
    values = [[math.nan if e is None else 100 * e.value for e in row] for row in grid]
    canvas.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    canvas.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
    canvas.set_yticks(range(len(rows)), rows, fontsize=7)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            # White on the dark half of the colours, black on the light one.
            colour = "black" if math.isnan(value) or value > 60 else "white"
            text = "-" if math.isnan(value) else f"{value:.1f}"
            canvas.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)


def _static_adaptive(result: RunResult) -> Figure | None:
    """Of every defended victim, what the strongest attack leaves by where its images were crafted: accuracy, or the
    similarity of images and their own texts where that is what attacks lower.

    A static figure far above the adaptive one is a defense that hides from attacks made without it.
    """
    groups = _grouped(c for c in result.cells if c.status == "ok" and any(c.metrics.get(f"static_{w}") for w in _LEFT))
    if not groups:
        return None
    threats = {(_threat(t), _victim(t)): t for t in result.threats}
    tall = max(len({_victim(c) for c in cells}) for cells in groups.values())
    with style():
        figure, places = canvases(len(groups), (6.4, 1.8 + 0.4 * tall))
        for place, (threat, cells) in zip(places, groups.items(), strict=True):
            what = next(w for w in _LEFT if any(c.metrics.get(f"static_{w}") for c in cells))
            victims = list(dict.fromkeys(map(_victim, cells)))
            for y, victim in enumerate(victims):
                own = [c for c in cells if _victim(c) == victim]
                _dumbbell(place, y, own, threats.get((threat, victim)), what)
            place.set_yticks(range(len(victims)), victims, fontsize=7)
            place.set_ylim(len(victims) - 0.5, -0.5)
            if what != "similarity":
                place.set_xlim(-3, 103)
            place.set_xlabel(_LEFT[what][0])
            place.set_title(_title(threat), fontsize=9)
            place.grid(alpha=0.25, linewidth=0.5)
        _one_entry_each(figure, places)
    return figure


_LEFT = {"robust_accuracy": ("accuracy, %", 100), "similarity": ("cosine of images and their own texts", 1)}
"""What attacks leave some of, as metrics call it: the name of the axis, and its scale."""


def _dumbbell(canvas: Canvas, y: int, cells: Sequence[Cell], row: ThreatRow | None, what: str) -> None:
    """A line from the least to the most that is left, with a marker a place of crafting."""
    scale, clean = _LEFT[what][1], None
    if row is not None:
        clean = row.clean_similarity if what == "similarity" else row.clean_accuracy
    found: dict[str, Estimate] = {}
    for origin, _ in _ORIGINS:
        figures = [c.metrics.get(f"{origin}_{what}") for c in cells]
        least = min((f for f in figures if f is not None), key=lambda f: f.value, default=None)
        if least is not None:
            found[origin] = least
    values = [scale * e.value for e in found.values()]
    canvas.plot([min(values), max(values)], [y, y], color="#bbbbbb", linewidth=3, solid_capstyle="butt", zorder=1)
    if clean is not None:
        canvas.plot([scale * clean.value], [y], marker="|", markersize=14, color="#000000", linestyle="", label="clean")
    for number, (origin, marker) in enumerate(_ORIGINS):
        if origin in found:
            canvas.errorbar([scale * found[origin].value], [y], xerr=_error(found[origin], scale), marker=marker,
                            markersize=6, color=COLOURS[number], elinewidth=0.7, linestyle="",
                            label=f"{origin} attack")  # fmt: skip


def _one_entry_each(figure: Figure, canvases: Iterable[Canvas]) -> None:
    """One legend below all panels, in which every victim has drawn the same markers."""
    entries = {
        label: handle for canvas in canvases for handle, label in zip(*canvas.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), fontsize=7, loc="outside lower center", ncols=4, frameon=False)


_KINDS: Mapping[str, Callable[[RunResult], Figure | None]] = {
    "curve": _curve,
    "sweep": _sweep,
    "pareto": _pareto,
    "heatmap": _heatmap,
    "static-adaptive": _static_adaptive,
    "success": _success,
    "rounds": _rounds,
}
_NEEDS = {
    "curve": "it needs finished threats, with several budgets to be a curve",
    "sweep": "it needs one defense with several values of one number, like denoise:sigma=1 and denoise:sigma=2",
    "pareto": "it needs finished threats with an accuracy",
    "heatmap": "it needs attacked cells with an accuracy",
    "static-adaptive": "it needs a defended model, evaluated beside the undefended one",
    "success": "it needs one attack on training data with several values of one number, as ba:count=7 and ba:count=70",
    "rounds": "it needs a training that chooses what to trust, as safeclip does",
}
