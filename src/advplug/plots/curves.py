"""A run as a picture: accuracy along the budgets, or along one number of a defense, each point with its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from advplug.errors import AdvplugError, UsageError
from advplug.estimate import Estimate
from advplug.matrix import Sweep
from advplug.plans import Bound
from advplug.results import Cell, RunResult, ThreatRow, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Canvas
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
MARKS: Mapping[Verdict | None, tuple[str, Literal["full", "none"]]] = {
    "trusted": ("o", "full"),
    "upper bound": ("o", "none"),
    "not trustworthy": ("X", "full"),
    None: ("", "full"),
}
"""Marker and fill style of a point by its verdict."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


@dataclass(frozen=True)
class Axis:
    """What the horizontal axis is: the budget where `values` is None, otherwise a number of each defense, by label.

    `panels` makes the panels of what is no accuracy under attack, from the result and the values.
    """

    name: str
    values: Mapping[str, float] | None = None
    panels: Callable[[RunResult, Mapping[str, float]], list[Panel]] | None = None


@dataclass(frozen=True)
class Point:
    x: float
    y: Estimate
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Line:
    """Points in ascending order; a `level` is one number for the whole width, such as the undefended model's."""

    label: str
    points: tuple[Point, ...]
    level: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line] = field(default_factory=list)


def plot_path(path: Path) -> Path:
    """`path` itself. Raises UsageError for a format that is not drawn or a folder that is not there."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"advplug draws {', '.join(FORMATS)} files, not '{path.name}'")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; create it first")
    return path


def axis_of(sweeps: Sequence[Sweep]) -> Axis:
    """What varies over these sweeps: one number of a defense, else the budget. Raises UsageError where neither does."""
    stacks = {s.victim.defense_label: s.victim.defense for s in sweeps if s.victim.defense}
    if len(stacks) > 1:
        found = numbers(stacks)
        if found is not None:
            return found
    norms = {s.norm for s in sweeps}
    if len({(s.norm, eps) for s in sweeps for eps in s.budgets}) > len(norms):
        return Axis("eps")
    raise UsageError(
        "there is nothing to draw a line along: give several budgets (-e 2/255 -e 4/255), or one defense with several "
        "values of one number (-d denoise:sigma=1 -d denoise:sigma=2)"
    )


def numbers(stacks: Mapping[str, tuple[Bound, ...]]) -> Axis | None:
    """The one number in which stacks of the same plugins differ, if that is all they differ in."""
    if len({tuple(part.entry.name if part.entry else part.label for part in stack) for stack in stacks.values()}) > 1:
        return None
    settings = {
        label: {(i, part.entry.name if part.entry else part.label, key): value
                for i, part in enumerate(stack) for key, value in part.params.items()}
        for label, stack in stacks.items()
    }  # fmt: skip
    first = next(iter(settings.values()))
    varying = [key for key in first if len({str(s.get(key)) for s in settings.values()}) > 1]
    if len(varying) != 1:
        return None
    values = {label: s[varying[0]] for label, s in settings.items()}
    if not all(isinstance(v, int | float | Fraction) and not isinstance(v, bool) for v in values.values()):
        return None
    _, defense, name = varying[0]
    return Axis(f"{defense} {name}", {label: float(v) for label, v in values.items()})


def panels(result: RunResult, axis: Axis) -> list[Panel]:
    """One panel a model and threat, with the lines to draw in it."""
    if axis.panels is not None:
        return axis.panels(result, axis.values or {})
    return _along_budgets(result) if axis.values is None else _along_defense(result, axis.values)


def _grouped(rows: Iterable[ThreatRow], key: Callable[[ThreatRow], Any]) -> dict[Any, list[ThreatRow]]:
    groups: dict[Any, list[ThreatRow]] = {}
    for row in rows:
        if row.worst_case_accuracy is not None:
            groups.setdefault(key(row), []).append(row)
    return groups


def _along_budgets(result: RunResult) -> list[Panel]:
    made = []
    for (dataset, model, norm, shape, goal, seed), rows in _grouped(
        result.threats, lambda t: (t.dataset, t.model, t.norm, t.shape, t.goal, t.seed)
    ).items():
        panel = Panel(_title(dataset, model, f"{norm}, {shape}" if shape else norm, goal, seed))
        for defense in dict.fromkeys(r.defense for r in rows):
            own = sorted((r for r in rows if r.defense == defense), key=_eps)
            clean = own[0].clean_accuracy
            points = [] if clean is None else [Point(0.0, clean)]
            points += [Point(_eps(r), r.worst_case_accuracy, r.verdict) for r in own if r.worst_case_accuracy]
            panel.lines.append(Line("undefended" if defense == "none" else defense, tuple(points)))
        made.append(panel)
    return made


def _along_defense(result: RunResult, values: Mapping[str, float]) -> list[Panel]:
    """A panel of each threat that met several of the values; of one only where none met more."""
    made: list[tuple[int, Panel]] = []
    for (dataset, model, norm, eps, shape, goal, seed), rows in _grouped(
        result.threats, lambda t: (t.dataset, t.model, t.norm, t.eps, t.shape, t.goal, t.seed)
    ).items():
        panel = Panel(_title(dataset, model, f"{norm} {eps}" + (f", {shape}" if shape else ""), goal, seed))
        own = sorted((r for r in rows if r.defense in values), key=lambda r: values[r.defense])
        cells = [c for c in result.cells if (c.dataset, c.model, c.norm, c.eps, c.shape, c.goal, c.seed)
                 == (dataset, model, norm, eps, shape, goal, seed) and c.status == "ok"]  # fmt: skip
        undefended = next((r for r in rows if r.defense == "none"), None)
        if undefended is not None:
            for label, figure in (("undefended, clean", undefended.clean_accuracy),
                                  ("undefended, robust", undefended.worst_case_accuracy)):  # fmt: skip
                if figure is not None:
                    panel.lines.append(Line(label, (Point(0.0, figure),), level=True))
        drawn = {
            "clean": [Point(values[r.defense], r.clean_accuracy) for r in own if r.clean_accuracy],
            "static attack": _strongest(own, cells, values, "static_robust_accuracy"),
            "adaptive attack": _strongest(own, cells, values, "adaptive_robust_accuracy"),
            "robust: the worst of all": [
                Point(values[r.defense], r.worst_case_accuracy, r.verdict) for r in own if r.worst_case_accuracy
            ],
        }
        panel.lines.extend(Line(label, tuple(points)) for label, points in drawn.items() if points)
        if own:
            made.append((len(own), panel))
    several = [panel for amount, panel in made if amount > 1]
    return several or [panel for _, panel in made]


def _strongest(
    rows: Sequence[ThreatRow], cells: Sequence[Cell], values: Mapping[str, float], metric: str
) -> list[Point]:
    """By defense, the figure of the attack that leaves least."""
    made = []
    for row in rows:
        figures = [c.metrics.get(metric) for c in cells if c.defense == row.defense]
        least = min((f for f in figures if f is not None), key=lambda f: f.value, default=None)
        if least is not None:
            made.append(Point(values[row.defense], least))
    return made


def _title(dataset: str, model: str, threat: str, goal: str, seed: int) -> str:
    extra = ("" if goal == "untargeted" else f", {goal}") + (f", seed {seed}" if seed else "")
    return f"{model} on {dataset}, {threat}{extra}"


def _eps(row: ThreatRow) -> float:
    return float(Fraction(row.eps))


def draw(result: RunResult, axis: Axis, path: Path) -> None:
    """Writes the picture of `result` along `axis` to `path`, in the format of its suffix.

    Raises AdvplugError where the file cannot be written or nothing was computed that could be drawn.
    """
    shown = panels(result, axis)
    if not shown:
        raise AdvplugError(f"no cell was computed, so {path} was not drawn")
    save(drawn(shown, axis), path)


def drawn(shown: Sequence[Panel], axis: Axis) -> Figure:
    """The panels as a figure."""
    with style():
        made, places = canvases(len(shown))
        for place, panel in zip(places, shown, strict=True):
            _draw_panel(place, panel, axis)
    return made


def canvases(count: int, size: tuple[float, float] = (6.4, 5.0)) -> tuple[Figure, list[Canvas]]:
    """An empty figure with `count` places of `size` inches each, two beside each other; belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, count)
    lines = math.ceil(count / columns)
    with style():
        figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
        FigureCanvasAgg(figure)
        places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for place in places[count:]:
        place.set_axis_off()
    return figure, places[:count]


def style() -> AbstractContextManager[None]:
    """Under which all figures are made and written: text stays text, and the same result gives the same bytes."""
    import matplotlib as mpl

    # Names may hold $, which would begin a formula.
    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "advplug", "font.size": 9, "text.parse_math": False})


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` to `path`, in the format of its suffix. Raises UsageError where that cannot be."""
    with style():
        try:
            figure.savefig(path, dpi=150, metadata=_undated(path))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _undated(path: Path) -> dict[str, None]:
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})


def _draw_panel(canvas: Canvas, panel: Panel, axis: Axis) -> None:
    verdicts: set[Verdict] = set()
    levels = [line for line in panel.lines if line.level]
    for line, style in zip(levels, (":", "--"), strict=False):
        canvas.axhline(100 * line.points[0].y.value, color="#777777", linestyle=style, linewidth=1, label=line.label)
    curves = [line for line in panel.lines if not line.level]
    for number, line in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        xs, ys = [p.x for p in line.points], [100 * p.y.value for p in line.points]
        # Lines that coincide stay visible: each is thinner than the one beneath it.
        width = 1.3 + 0.7 * (len(curves) - 1 - number)
        canvas.plot(xs, ys, color=colour, linewidth=width, label=line.label, zorder=3 + number)
        known = [p for p in line.points if p.y.low is not None and p.y.high is not None]
        canvas.fill_between(
            [p.x for p in known], [100 * (p.y.low or 0.0) for p in known], [100 * (p.y.high or 0.0) for p in known],
            color=colour, alpha=0.12, linewidth=0,
        )  # fmt: skip
        for p in line.points:
            marker, fill = MARKS[p.verdict]
            if p.verdict is not None:
                verdicts.add(p.verdict)
                canvas.plot([p.x], [100 * p.y.value], marker=marker, fillstyle=fill, color=colour, markersize=7,
                            markerfacecoloralt="white", zorder=20)  # fmt: skip
    canvas.set_title(panel.title, fontsize=9)
    canvas.set_xlabel(axis.name if axis.values is not None else "eps, in pixel units")
    canvas.set_ylabel("accuracy, %" if axis.panels is None else "share, %")
    canvas.set_ylim(-3, 103)
    canvas.grid(alpha=0.25, linewidth=0.5)
    legend(canvas, verdicts)


def legend(canvas: Canvas, verdicts: Collection[Verdict | None]) -> None:
    """Below the picture: its lines, and what the markers of these verdicts mean."""
    from matplotlib.lines import Line2D

    handles, labels = canvas.get_legend_handles_labels()
    for verdict in (v for v in get_args(Verdict) if v in verdicts):
        marker, fill = MARKS[verdict]
        handles.append(Line2D([], [], color="#444444", marker=marker, fillstyle=fill, linestyle=""))
        labels.append(f"verdict: {verdict}")
    canvas.legend(handles, labels, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
