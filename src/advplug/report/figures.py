"""Drawings for the page: SVG with text as text, in ink that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advplug.plots.curves import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, FAINT = "#010203", "#fcfdfe", "#7f8081"
COLOURS = tuple(f"#0a0b{i:02x}" for i in range(7))
"""Stand-ins for colours that the page decides, by its light or dark scheme: `--series-0` and so on are close to Okabe
and Ito's, which colour-blind readers can tell apart, but dark or light enough for their paper."""
_OF_THE_PAGE = {
    INK: "currentColor", PAPER: "var(--paper)", FAINT: "var(--faint)",
    **{stand_in: f"var(--series-{i})" for i, stand_in in enumerate(COLOURS)},
}  # fmt: skip
DASHES = ("-", "--", "-.", ":")
MARKS: Mapping[str | None, tuple[str, str]] = {
    "trusted": ("o", "full"), "upper bound": ("o", "none"), "not trustworthy": ("X", "full"), None: (".", "full"),
}  # fmt: skip
LONGEST = 44
"""Characters of a label; the table below a drawing has all of them."""
CURVE, BARS = 5.4, 4.6
"""Inches of the axes."""


@dataclass(frozen=True)
class Curve:
    """A line that falls in steps: `ys[i]` holds from `xs[i]` on."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


def short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _style() -> AbstractContextManager[None]:
    """Under which every figure is made."""
    import matplotlib as mpl

    settings: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        # A dollar sign in a name is no formula.
        "text.parse_math": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color"), INK
        ),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return mpl.rc_context(settings)


def _new(height: float, width: float) -> tuple[Figure, Axes]:
    """Axes of that size in inches; what stands around them is added when the drawing is finished."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0, bottom=0, right=1, top=1)
    return figure, axes


def _finished(figure: Figure, name: str) -> str:
    """The drawing as an `svg` element; identifiers begin with `name`, so that several can stand in one page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Of identifiers: made from the salt, so that the same drawing gives the same bytes.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 class="drawn" style="--wide: \2pt" width="\2pt"', text, count=1
    )
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1).replace("xlink:href", "href")
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1).replace(' version="1.1"', "", 1)
    text = text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    for stand_in, colour in _OF_THE_PAGE.items():
        text = text.replace(stand_in, colour)
    return text.strip()


def _legend(axes: Axes, columns: int = 2) -> None:
    if axes.get_legend_handles_labels()[0]:
        below = -0.45 / axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, below), ncols=columns)


def _explained(axes: Axes, verdicts: Iterable[str | None]) -> None:
    """What the markers of these verdicts mean, for the legend."""
    from matplotlib.lines import Line2D

    for verdict in dict.fromkeys(v for v in verdicts if v is not None):
        marker, fill = MARKS[verdict]
        face = PAPER if fill == "none" else INK
        axes.add_line(Line2D([], [], color=INK, marker=marker, markerfacecolor=face, linestyle="",
                             label=f"verdict: {verdict}"))  # fmt: skip


def _percent_axis(axes: Axes, label: str, horizontal: bool = False) -> None:
    (axes.set_xlim if horizontal else axes.set_ylim)(-3, 103)
    (axes.set_xlabel if horizontal else axes.set_ylabel)(label)
    axes.grid(axis="both", alpha=0.6)


def lines(panel: Panel, name: str, y_label: str, scale: float = 100.0, x_label: str = "eps, in pixel units") -> str:
    """Curves along the budgets with 95 % bands; the marker of a point is its verdict."""
    with _style():
        figure, axes = _new(2.7, CURVE)
        for i, line in enumerate(panel.lines):
            colour = COLOURS[i % len(COLOURS)]
            xs, ys = [p.x for p in line.points], [scale * p.y.value for p in line.points]
            # Lines that coincide stay visible: each is thinner than the one beneath it.
            width = 1.4 + 0.6 * (len(panel.lines) - 1 - i)
            axes.plot(xs, ys, color=colour, linewidth=width, linestyle=DASHES[i % len(DASHES)], label=short(line.label))
            known = [p for p in line.points if p.y.low is not None and p.y.high is not None]
            low, high = [scale * (p.y.low or 0.0) for p in known], [scale * (p.y.high or 0.0) for p in known]
            axes.fill_between([p.x for p in known], low, high, color=colour, alpha=0.14, linewidth=0)
            for p in (p for p in line.points if p.verdict is not None):
                _mark(axes, p.x, scale * p.y.value, colour, p.verdict)
        _explained(axes, (p.verdict for line in panel.lines for p in line.points))
        axes.set_xlabel(x_label)
        if scale == 100.0:
            _percent_axis(axes, y_label)
        else:
            axes.set_ylabel(y_label)
            axes.grid(alpha=0.6)
        _legend(axes)
        return _finished(figure, name)


def _mark(axes: Axes, x: float, y: float, colour: str, verdict: str | None) -> None:
    marker, fill = MARKS[verdict]
    face = PAPER if fill == "none" else colour
    axes.plot([x], [y], marker=marker, color=colour, markerfacecolor=face, markersize=7, linestyle="", zorder=20)


@dataclass(frozen=True)
class Block:
    """Rows of a heat-map under a title of their own: by row and column the number, None for none, and its text."""

    title: str
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]


def heat(blocks: Sequence[Block], columns: Sequence[str], name: str, labels: tuple[str, str] = ("", "")) -> str:
    """Tables of coloured numbers in percent; what has none (failed, not measured) stays uncoloured and says so."""
    count = sum(len(b.rows) for b in blocks) + 0.8 * sum(bool(b.title) for b in blocks)
    with _style():
        figure, axes = _new(0.3 * count, min(max(3.0, 0.62 * len(columns)), 0.85 * len(columns)))
        ticks: list[tuple[float, str]] = []
        top = 0.0
        for block in blocks:
            if block.title:
                top += 0.8
                axes.text(0, top - 0.15, short(block.title), fontweight="bold", va="bottom")
            _coloured(axes, block, top)
            ticks += [(top + i + 0.5, short(row)) for i, row in enumerate(block.rows)]
            top += len(block.rows)
        axes.set_ylim(top, 0)
        axes.set_yticks([at for at, _ in ticks], [row for _, row in ticks])
        long = max(map(len, columns)) > 8
        axes.set_xticks([j + 0.5 for j in range(len(columns))], [short(c) for c in columns])
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        for label in axes.get_xticklabels() if long else ():
            label.set(rotation=28, horizontalalignment="left", rotation_mode="anchor")
        axes.xaxis.set_label_position("top")
        axes.set_ylabel(labels[0])
        axes.set_xlabel(labels[1])
        axes.margins(0)
        axes.spines[:].set_visible(False)
        return _finished(figure, name)


def _coloured(axes: Axes, block: Block, top: float) -> None:
    import matplotlib as mpl
    import numpy as np
    from matplotlib.colors import Normalize

    shown = np.array([[np.nan if v is None else v for v in row] for row in block.values], dtype=float)
    colours, norm = mpl.colormaps["cividis"], Normalize(0.0, 100.0)
    edges = np.arange(shown.shape[1] + 1), top + np.arange(shown.shape[0] + 1)
    axes.pcolormesh(*edges, np.ma.masked_invalid(shown), cmap=colours, norm=norm, edgecolors=PAPER, linewidth=1.5)
    for i, row in enumerate(block.texts):
        for j, text in enumerate(row):
            known = not np.isnan(shown[i, j])
            dark = known and _luminance(colours(norm(shown[i, j]))) < 0.18
            ink = INK if not known else "#ffffff" if dark else "#000000"
            axes.text(j + 0.5, top + i + 0.5, text, ha="center", va="center", color=ink, fontsize=8)


def _luminance(colour: Sequence[float]) -> float:
    """Relative, of WCAG 2."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def scatter(found: Sequence[tuple[str, float, float, str | None]], name: str, labels: tuple[str, str]) -> str:
    """Named points (label, x, y, verdict) in percent; those that no other beats in both are joined."""
    with _style():
        figure, axes = _new(2.8, CURVE)
        best = front(found)
        if len(best) > 1:
            xs, ys = zip(*best, strict=True)
            axes.plot(xs, ys, color=FAINT, linewidth=1.2, label="Pareto front")
        for i, (label, x, y, verdict) in enumerate(found):
            colour = COLOURS[i % len(COLOURS)]
            _mark(axes, x, y, colour, verdict)
            axes.plot([], [], marker="o", color=colour, linestyle="", label=f"{i + 1} {short(label)}")
        for (x, y), numbers in _places(found).items():
            axes.annotate(numbers, (x, y), xytext=(7, 6), textcoords="offset points", fontsize=8, zorder=30)
        _percent_axis(axes, labels[1])
        _percent_axis(axes, labels[0], horizontal=True)
        axes.set_xlim(*_around([x for _, x, _, _ in found]))
        axes.set_ylim(*_around([y for _, _, y, _ in found]))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_ticks([t for t in axis.get_majorticklocs() if max(0, low) <= t <= min(100, high)])
        _explained(axes, (v for _, _, _, v in found))
        _legend(axes)
        return _finished(figure, name)


def _places(found: Sequence[tuple[str, float, float, str | None]]) -> dict[tuple[float, float], str]:
    """The numbers of the points, those at one place together."""
    made: dict[tuple[float, float], list[str]] = {}
    for i, (_, x, y, _) in enumerate(found):
        made.setdefault((x, y), []).append(str(i + 1))
    return {at: ", ".join(numbers) for at, numbers in made.items()}


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The part of 0 to 100 that holds them, at least 20 wide, with some room."""
    low, high = min(values), max(values)
    room = max(5.0, (20 - (high - low)) / 2)
    return max(0.0, low - room) - 2, min(100.0, high + room) + 2


def front(found: Sequence[tuple[str, float, float, str | None]]) -> list[tuple[float, float]]:
    """The points (label, x, y, verdict) that no other beats, from left to right; those not to be trusted count for
    nothing."""
    at = [(x, y) for _, x, y, verdict in found if verdict != "not trustworthy"]
    return sorted({one for one in at if not any(_beats(other, one) for other in at)})


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def pairs(rows: Sequence[tuple[str, float | None, float | None]], names: tuple[str, str], name: str, label: str) -> str:
    """Two numbers in percent on each row, joined."""
    with _style():
        figure, axes = _new(0.3 * len(rows) + 0.1, BARS)
        for i, (_, one, other) in enumerate(rows):
            if one is not None and other is not None:
                axes.plot([one, other], [i, i], color=FAINT, linewidth=2, zorder=1)
        for k, (marker, colour) in enumerate((("s", COLOURS[0]), ("o", COLOURS[1]))):
            at = [(row[k + 1], i) for i, row in enumerate(rows) if row[k + 1] is not None]
            xs, ys = [float(x or 0.0) for x, _ in at], [y for _, y in at]
            axes.plot(xs, ys, marker=marker, color=colour, linestyle="", label=names[k], zorder=5 + k)
        axes.set_yticks(range(len(rows)), [short(r[0]) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _percent_axis(axes, label, horizontal=True)
        _legend(axes)
        return _finished(figure, name)


def steps(curves: Sequence[Curve], name: str, x_label: str, y_label: str) -> str:
    """Curves that fall in steps, in percent."""
    with _style():
        figure, axes = _new(2.6, CURVE)
        for i, curve in enumerate(curves):
            axes.step(
                curve.xs, curve.ys, where="post", color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)],
                linewidth=1.4, label=short(curve.label),
            )  # fmt: skip
        axes.set_xlabel(x_label)
        _percent_axis(axes, y_label)
        _legend(axes)
        return _finished(figure, name)


def bars(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], name: str, label: str) -> str:
    """Stacked horizontal bars."""
    with _style():
        figure, axes = _new(0.3 * len(rows) + 0.1, BARS)
        start = [0.0] * len(rows)
        for k, part in enumerate(names):
            widths = [parts[k] for _, parts in rows]
            axes.barh(range(len(rows)), widths, left=start, height=0.6, color=COLOURS[k % len(COLOURS)], label=part)
            start = [s + w for s, w in zip(start, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [short(r[0]) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.6)
        axes.set_axisbelow(True)
        _legend(axes, len(names))
        return _finished(figure, name)
