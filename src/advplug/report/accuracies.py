"""The sections with accuracies: along budgets, by attack, static beside adaptive, clean beside robust, transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from advplug.defaults import CRAFTED_BY
from advplug.estimate import Estimate
from advplug.parse import parse_reference
from advplug.plots.curves import Axis, Line, Panel, Point, panels
from advplug.report import figures
from advplug.report.parts import (
    UNDEFENDED,
    Data,
    Picture,
    Section,
    Value,
    at_middle,
    grouped,
    is_transfer,
    judged,
    number,
    percentage,
    setting,
    share_of,
    similarity,
    tabulated,
    under,
    victim,
    word,
)
from advplug.results import Cell, ThreatRow

UNTRUSTED = "not trustworthy"
DRAWN = 30
"""Rows of a figure at most; its table has all."""


def curves(data: Data) -> Section | None:
    """Accuracy, or similarity, along the budgets."""
    found = [(p, 100.0) for p in panels(data.result, Axis("eps"))] + [(p, 1.0) for p in _similar(data)]
    texts = {_eps(t): t.eps for t in data.result.threats}
    made = []
    for i, (panel, scale) in enumerate(found):
        value = share_of if scale == 100.0 else similarity
        what = "accuracy, %" if scale == 100.0 else "similarity"
        rows = [(line.label, p) for line in panel.lines for p in line.points]
        columns = _curve_columns(value, what, texts)
        table = tabulated(f"Numbers: {panel.title}", columns, rows, heads=2)
        told = (
            f"Worst-case {what.split(',')[0]} by budget, one line a defense, with 95 % intervals; 0 is without attack."
        )
        made.append(Picture(panel.title, told, figures.lines(panel, f"curve{i}", what, scale), table))
    lead = "Accuracy has to fall as the budget grows. Markers tell the verdict of each point."
    return Section("curves", "Security curves", (lead,), pictures=tuple(made)) if made else None


def _curve_columns(
    value: Callable[[Estimate | None, bool], Value], what: str, texts: Mapping[float, str]
) -> dict[str, Callable[[Any], Value]]:
    return {
        "line": lambda r: word(r[0]),
        "eps": lambda r: Value(texts.get(r[1].x, f"{r[1].x:g}"), r[1].x),
        f"{what} [95 %]": lambda r: value(r[1].y, True),
        "verdict": lambda r: judged(r[1].verdict) if r[1].verdict else word("without attack"),
    }


def _similar(data: Data) -> Iterator[Panel]:
    rows = [t for t in data.result.threats if t.worst_case_similarity is not None]
    for own in grouped(rows, lambda t: (t.model, setting(t))).values():
        lines = []
        for defense, mine in grouped(own, lambda t: t.defense).items():
            mine = sorted(mine, key=_eps)
            clean = [Point(0.0, mine[0].clean_similarity)] if mine[0].clean_similarity else []
            attacked = [Point(_eps(t), t.worst_case_similarity, t.verdict) for t in mine if t.worst_case_similarity]
            lines.append(Line("undefended" if defense == UNDEFENDED else defense, (*clean, *attacked)))
        yield Panel(f"{own[0].model} on {under(own[0])}", lines)


def _eps(row: Any) -> float:
    return float(Fraction(row.eps))


def heat_maps(data: Data) -> Section | None:
    """Models, defense by defense, against attacks."""
    made = []
    cells = [c for c in data.result.cells if not is_transfer(c)]
    for i, (key, found) in enumerate(grouped(cells, setting).items()):
        rows, told = at_middle(found)
        if len(rows) < 2:
            continue
        worst = {(t.model, t.defense): t for t in data.result.threats if setting(t) == key and t.eps == rows[0].eps}
        attacks = list(dict.fromkeys(c.attack for c in rows))
        at = {(_who(c), c.attack): c for c in rows}
        heads = (*attacks, "worst case")
        blocks, tabled = [], []
        for defense, own in grouped(rows, lambda c: c.defense).items():
            values = [[*(_robust(at.get((v, a))) for a in attacks), _worst(worst.get(v))] for v in grouped(own, _who)]
            models = list(dict.fromkeys(c.model for c in own))
            blocks.append(_block("undefended" if defense == UNDEFENDED else f"under {defense}", models, values))
            tabled += [(victim(c), row) for c, row in zip(_firsts(own), values, strict=True)]
        svg = figures.heat(blocks, heads, f"heat{i}")
        title = f"{under(rows[0])}, {told}"
        table = tabulated(f"Robust accuracy in %: {title}", _matrix_columns("model, defense", heads), tabled)
        text = "Robust accuracy in % by model and attack, one block a defense; dark blue is low, yellow is high."
        made.append(Picture(title, text, svg, table))
    lead = "A cell that failed or was refused has no number, and a dash was not asked for."
    return Section("heat-maps", "Models against attacks", (lead,), pictures=tuple(made)) if made else None


def _who(cell: Cell) -> tuple[str, str]:
    return cell.model, cell.defense


def _robust(cell: Cell | None) -> Value:
    if cell is None or cell.status != "ok":
        return word("-" if cell is None else cell.status)
    return share_of(cell.metrics.get("robust_accuracy"))


def _worst(threat: ThreatRow | None) -> Value:
    return share_of(threat.worst_case_accuracy if threat else None)


def _firsts(cells: list[Cell]) -> list[Cell]:
    """One of each model."""
    return [own[0] for own in grouped(cells, _who).values()]


def _block(title: str, rows: list[str], values: list[list[Value]]) -> figures.Block:
    numbers = [[None if v.number is None else 100 * v.number for v in row] for row in values]
    return figures.Block(title, rows, numbers, [[v.text for v in row] for row in values])


def _matrix_columns(first: str, columns: tuple[str, ...]) -> dict[str, Callable[[Any], Value]]:
    def at(j: int) -> Callable[[Any], Value]:
        return lambda row: row[1][j]

    return {first: lambda row: word(row[0]), **{c: at(j) for j, c in enumerate(columns)}}


def origins(data: Data) -> Section | None:
    """Static beside adaptive attacks on defended victims."""
    static, adaptive = _ORIGINS
    cells = [c for c in data.done if c.defense != UNDEFENDED and c.metrics.get("static_robust_accuracy")]
    made = []
    for i, found in enumerate(grouped([c for c in cells if not is_transfer(c)], setting).values()):
        rows, told = at_middle(found)
        drawn = [(f"{c.attack} on {victim(c)}", percentage(c.metrics.get(static)), percentage(c.metrics.get(adaptive)))
                 for c in rows[:DRAWN]]  # fmt: skip
        svg = figures.pairs(drawn, ("static", "adaptive"), f"origin{i}", "robust accuracy, %")
        columns: dict[str, Callable[[Any], Value]] = {
            "model, defense": lambda c: word(victim(c)),
            "attack": lambda c: word(c.attack),
            "eps": lambda c: word(c.eps),
            "static %": lambda c: share_of(c.metrics.get(static), True),
            "bare %": lambda c: share_of(c.metrics.get("bare_robust_accuracy"), True),
            "adaptive %": lambda c: share_of(c.metrics.get(adaptive), True),
        }
        title = f"{under(rows[0])}, {told}"
        table = tabulated(f"Static and adaptive: {under(rows[0])}", columns, found, heads=2)
        text = "Robust accuracy of each defended victim under images crafted on the undefended model and on itself."
        made.append(Picture(title, text, svg, table))
    return Section("origins", "Static against adaptive", (_LEAD_ORIGINS,), pictures=tuple(made)) if made else None


_ORIGINS = ("static_robust_accuracy", "adaptive_robust_accuracy")
_LEAD_ORIGINS = (
    "Static images were crafted on the undefended model, adaptive ones through the gradients that the defense "
    "declares. Only the adaptive number says whether the defense holds against one who knows it."
)


def trade_off(data: Data) -> Section | None:
    """Clean beside robust accuracy."""
    threats = [t for t in data.result.threats if t.clean_accuracy and t.worst_case_accuracy]
    made = []
    for i, found in enumerate(grouped(threats, setting).values()):
        rows, told = at_middle(found)
        if len(rows) < 2:
            continue
        at = [(victim(t), percentage(t.clean_accuracy) or 0.0, percentage(t.worst_case_accuracy) or 0.0, t.verdict)
              for t in rows]  # fmt: skip
        svg = figures.scatter(at, f"pareto{i}", ("clean accuracy, %", "worst-case robust accuracy, %"))
        best = set(figures.front(at))
        front = ["yes" if (x, y) in best and v != UNTRUSTED else "no" for _, x, y, v in at]
        title = f"{under(rows[0])}, {told}"
        found_rows = list(zip(range(1, len(rows) + 1), rows, front, strict=True))
        table = tabulated(f"Clean and robust: {title}", _TRADE_OFF, found_rows, heads=2)
        text = "Each victim by its clean and its worst-case accuracy; up and to the right is better."
        made.append(Picture(title, text, svg, table))
    lead = (
        "A victim is on the Pareto front where no other is better in one of the two and as good in the other; what is "
        "not trustworthy is left out of that."
    )
    return Section("trade-off", "Clean against robust", (lead,), pictures=tuple(made)) if made else None


_TRADE_OFF: dict[str, Callable[[Any], Value]] = {
    "no.": lambda r: number(r[0], "d"),
    "model, defense": lambda r: word(victim(r[1])),
    "clean % [95 %]": lambda r: share_of(r[1].clean_accuracy, True),
    "worst case % [95 %]": lambda r: share_of(r[1].worst_case_accuracy, True),
    "verdict": lambda r: judged(r[1].verdict),
    "on the Pareto front": lambda r: word(r[2]),
}


def transfer(data: Data) -> Section | None:
    """Crafted on the rows, judged on the columns."""
    cells = [c for c in data.result.cells if is_transfer(c)]
    groups = grouped(cells, lambda c: (*setting(c), c.eps, _crafted_by(c)))
    made = []
    for i, rows in enumerate(groups.values()):
        judges = list(dict.fromkeys(victim(c) for c in rows))
        sources = list(dict.fromkeys(_source(c) for c in rows))
        at = {(_source(c), victim(c)): c for c in rows}
        clean = {victim(c): share_of(c.metrics.get("clean_accuracy")) for c in rows if c.status == "ok"}
        values = [[clean.get(j, word("-")) for j in judges]]
        values += [[_robust(at.get((s, j))) for j in judges] for s in sources]
        labels = ["(no attack)", *sources]
        svg = figures.heat([_block("", labels, values)], judges, f"transfer{i}", ("crafted on", "judged on"))
        title = f"{under(rows[0])} {rows[0].eps}, crafted by {_crafted_by(rows[0])}"
        table = tabulated(f"Transfer, robust accuracy in %: {title}", _matrix_columns("crafted on", tuple(judges)),
                          list(zip(labels, values, strict=True)))  # fmt: skip
        text = "Robust accuracy in % of images crafted on the row's model and judged on the column's."
        made.append(Picture(title, text, svg, table))
    lead = "What is left of a model when images come from another; on the diagonal they come from itself."
    return Section("transfer", "Transfer", (lead,), pictures=tuple(made)) if made else None


def _source(cell: Cell) -> str:
    return parse_reference(cell.attack).get("from") or "?"


def _crafted_by(cell: Cell) -> str:
    return parse_reference(cell.attack).get("attack") or CRAFTED_BY
