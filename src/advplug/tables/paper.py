"""Tables of a run as papers print them, in Markdown and LaTeX: victims down, attacks and budgets across.

Texts are written once: `code` between backticks, signs such as L∞, ε and † as they are; each format has its own way
to write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Any, TypeVar

from advplug.errors import UsageError
from advplug.estimate import Estimate
from advplug.results import Cell, Certificate, Poisoning, RunResult, ThreatRow

MARKS: Mapping[str | None, str] = {"upper bound": "†", "not trustworthy": "‡"}
_MEANS = {
    "†": "† upper bound: stronger attacks may leave less.",
    "‡": "‡ not trustworthy: a health check found that the evaluation went wrong.",
}
PARTS = ("threats", "poisonings", "certificates")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Figure:
    """A value as text, with its interval and the mark of its verdict."""

    value: str
    interval: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column of figures; neighbours of one `group` share a heading."""

    title: str
    group: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A figure for every victim, (model, defense), and column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[tuple[str, str], tuple[Figure, ...]], ...]


NOTHING = Figure("–")


def tables(result: RunResult, part: str | None = None) -> list[PaperTable]:
    """The tables of a run; one `part` of PARTS only, where it is given. Raises UsageError where there is none."""
    if part is not None and part not in PARTS:
        raise UsageError(f"Markdown and LaTeX tables are of {', '.join(PARTS)}; for {part} take --format csv or jsonl")
    made: list[PaperTable] = []
    if part in (None, "threats"):
        made += [_threats(result, rows) for rows in _groups(result.threats, _threat_group)]
    if part in (None, "poisonings"):
        made += [_poisonings(rows) for rows in _groups(result.poisonings, lambda p: (p.dataset, p.seed))]
    if part in (None, "certificates"):
        made += [_certificates(rows) for rows in _groups(result.certificates, lambda c: (c.dataset, c.norm, c.seed))]
    if not made:
        raise UsageError(f"the run holds no {part or 'finished threats'}: there is no table to print")
    return made


def _groups(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# --- threats -----------------------------------------------------------------------------------------


def _threat_group(row: ThreatRow) -> tuple[Any, ...]:
    return row.dataset, row.norm, row.goal, row.seed, row.shape, row.worst_case_similarity is not None


def _threats(result: RunResult, rows: list[ThreatRow]) -> PaperTable:
    """One dataset, norm with its shape, goal and seed: clean, then by budget each attack and the worst case of all."""
    first, similar = rows[0], rows[0].worst_case_similarity is not None
    budgets = sorted({r.eps for r in rows}, key=Fraction)
    by_place = {(_victim(r), r.eps): r for r in rows}
    of = attrgetter("dataset", "norm", "goal", "seed", "shape")
    cells = {(_victim(c), c.eps, c.attack): c for c in result.cells if of(c) == of(first)}
    attacks = {eps: list(dict.fromkeys(a for r in rows if r.eps == eps for a in _attacks(cells, r))) for eps in budgets}
    alone = len({a for names in attacks.values() for a in names}) == 1
    recovers = similar and any(r.recovery is not None for r in rows)
    columns = [Column("clean")]
    for eps in budgets:
        group = f"ε = {eps}"
        columns += [] if alone else [Column(f"`{_code(a)}`", group) for a in attacks[eps]]
        columns += [Column("worst case", group)] + ([Column("recovery %", group)] if recovers else [])
    body = []
    for victim in dict.fromkeys(map(_victim, rows)):
        own = [by_place[victim, eps] for eps in budgets if (victim, eps) in by_place]
        figures = [_figure(own[0].clean_similarity if similar else own[0].clean_accuracy, similar, True)]
        for eps in budgets:
            found = by_place.get((victim, eps))
            figures += [] if alone else [_attacked(cells.get((victim, eps, a)), similar) for a in attacks[eps]]
            figures.append(_worst(found, similar))
            figures += [_share(found.recovery if found else None)] if recovers else []
        body.append((victim, tuple(figures)))
    (only,) = attacks[budgets[0]] if alone else (None,)
    return PaperTable(_threat_caption(rows, only), tuple(columns), tuple(body))


def _attacks(cells: Mapping[tuple[Any, ...], Cell], row: ThreatRow) -> Iterable[str]:
    """Those of the threat, and those that could not be computed."""
    return (a for victim, eps, a in cells if (victim, eps) == (_victim(row), row.eps))


def _victim(item: Cell | ThreatRow | Certificate | Poisoning) -> tuple[str, str]:
    return item.model, item.defense


def _figure(e: Estimate | None, similar: bool = False, interval: bool = False, mark: str = "") -> Figure:
    if e is None:
        return NOTHING

    def shown(value: float) -> str:
        return f"{value:.3f}" if similar else f"{100 * value:.1f}"

    known = interval and e.low is not None and e.high is not None
    return Figure(shown(e.value), f"[{shown(e.low or 0.0)}, {shown(e.high or 0.0)}]" if known else "", mark)


def _share(value: float | None) -> Figure:
    return NOTHING if value is None else Figure(f"{100 * value:.1f}")


def _attacked(cell: Cell | None, similar: bool) -> Figure:
    if cell is None or cell.status == "ok":
        name = "adversarial_similarity" if similar else "robust_accuracy"
        return _figure(cell.metrics.get(name) if cell else None, similar)
    return Figure(cell.status)


def _worst(row: ThreatRow | None, similar: bool) -> Figure:
    if row is None:
        return NOTHING
    figure = row.worst_case_similarity if similar else row.worst_case_accuracy
    return _figure(figure, similar, True, MARKS.get(row.verdict, ""))


def _threat_caption(rows: Sequence[ThreatRow], attack: str | None) -> str:
    first = rows[0]
    what = "Similarity of images and their own texts" if first.worst_case_similarity else "Accuracy in %"
    threat = f"{_norm(first.norm)} attacks ({first.goal})" + (f" with {_code(first.shape)}" if first.shape else "")
    by = f", attacked by `{_code(attack)}`" if attack else ""
    worst = "" if attack else " Worst case: image by image over all attacks."
    counts = _counts(e for r in rows for e in (r.clean_accuracy, r.clean_similarity))
    return (
        f"{what} on `{_code(first.dataset)}` under {threat}{by}{_seed(first.seed)}; {counts}, 95 % intervals in "
        f"brackets.{worst}{_legend(r.verdict for r in rows)}"
    )


def _norm(name: str) -> str:
    return {"linf": "L∞", "l0": "L0", "l1": "L1", "l2": "L2"}.get(name, name)


def _seed(seed: int) -> str:
    return f", seed {seed}" if seed else ""


def _counts(estimates: Iterable[Estimate | None]) -> str:
    found = sorted({e.n for e in estimates if e is not None})
    if not found:
        return "no images"
    return f"n = {found[0]:,} images" if len(found) == 1 else f"n = {found[0]:,} to {found[-1]:,} images"


def _legend(verdicts: Iterable[str | None]) -> str:
    shown = {MARKS.get(v, "") for v in verdicts}
    return "".join(f" {text}" for mark, text in _MEANS.items() if mark in shown)


# --- attacks on training data, certificates ----------------------------------------------------------

_POISON_COLUMNS = (
    ("clean", "clean_accuracy"),
    ("triggered as wanted", "attack_success_rate"),
    ("targets as wanted", "poison_success_rate"),
)


def _poisonings(rows: list[Poisoning]) -> PaperTable:
    attacks = list(dict.fromkeys(p.attack for p in rows))
    by_place = {(_victim(p), p.attack): p for p in rows}
    shown = {
        a: [c for c in _POISON_COLUMNS if any(p.attack == a and p.metrics.get(c[1]) for p in rows)] for a in attacks
    }
    columns = [Column(title, f"`{_code(a)}`") for a in attacks for title, _ in shown[a]]
    body = []
    for victim in dict.fromkeys(map(_victim, rows)):
        figures: list[Figure] = []
        for a in attacks:
            made = by_place.get((victim, a))
            for _, name in shown[a]:
                mark = MARKS.get(made.verdict, "") if made and name != "clean_accuracy" else ""
                e = made.metrics.get(name) if made else None
                figures.append(Figure(made.status) if made and made.status != "ok" else _figure(e, False, True, mark))
        body.append((victim, tuple(figures)))
    first = rows[0]
    counts = _counts(p.metrics.get("clean_accuracy") for p in rows)
    caption = (
        f"Accuracy and success in % after attacks on the training data of `{_code(first.dataset)}`{_seed(first.seed)}; "
        f"{counts}, 95 % intervals in brackets.{_legend(p.verdict for p in rows)}"
    )
    return PaperTable(caption, tuple(columns), tuple(body))


def _certificates(rows: list[Certificate]) -> PaperTable:
    radii = sorted({at.radius for c in rows for at in c.certified_accuracy}, key=Fraction)
    columns = [Column("clean"), Column("abstains"), *(Column(f"ε = {r}", "certified") for r in radii)]
    body = []
    for c in rows:
        at = {a.radius: a.certified_accuracy for a in c.certified_accuracy}
        proven = [_figure(at.get(r), False, True) if c.status == "ok" else Figure(c.status) for r in radii]
        clean, abstains = _figure(c.clean_accuracy, False, True), _figure(c.abstention_rate)
        body.append((_victim(c), (clean, abstains, *proven)))
    first = rows[0]
    failure = sorted({c.failure_probability for c in rows if c.failure_probability is not None})
    sure = f" Each image's proof fails with probability {failure[-1]:g} at most." if failure else ""
    caption = (
        f"Certified accuracy in % on `{_code(first.dataset)}` by {_norm(first.norm)} radius{_seed(first.seed)}; "
        f"{_counts(c.clean_accuracy for c in rows)}, 95 % intervals in brackets.{sure}"
    )
    return PaperTable(caption, tuple(columns), tuple(body))


def _code(text: str) -> str:
    return text.replace("`", "'")


# --- Markdown ----------------------------------------------------------------------------------------


def markdown(made: Sequence[PaperTable]) -> str:
    """Tables of GitHub's Markdown, each under its caption."""
    return "\n".join(_markdown(table) for table in made)


def _markdown(table: PaperTable) -> str:
    titles = [f"{c.title}, {c.group}" if c.group else c.title for c in table.columns]
    rows = [["model", "defense", *titles], ["---", "---", *("---:" for _ in titles)]]
    for victim, figures in table.rows:
        told = (" ".join(filter(None, (f.value, f.interval))) + f.mark for f in figures)
        rows.append([*(f"`{_code(name)}`" if name != "none" else name for name in victim), *told])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([table.caption, "", *lines, ""])


# --- LaTeX -------------------------------------------------------------------------------------------

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$^\dagger$", "‡": r"$^\ddagger$",
    "ε": r"$\varepsilon$", "∞": r"$_\infty$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip


def latex(made: Sequence[PaperTable]) -> str:
    """Floats with booktabs tables, to be \\input into a document that loads booktabs."""
    head = "% needs \\usepackage{booktabs}\n"
    return head + "\n".join(_latex(table, number) for number, table in enumerate(made, 1))


def _latex(table: PaperTable, number: int) -> str:
    spans = _spans(table.columns)
    lines = [
        "\\begin{table}[t]",
        "\\centering",
        f"\\caption{{{_tex(table.caption)}}}",
        f"\\label{{tab:advplug-{number}}}",
    ]
    lines += [f"\\begin{{tabular}}{{ll{'r' * len(table.columns)}}}", "\\toprule"]
    if any(title for title, _, _ in spans):
        heads = [f"\\multicolumn{{{width}}}{{c}}{{{_tex(title)}}}" for title, _, width in spans]
        rules = [f"\\cmidrule(lr){{{at}-{at + width - 1}}}" for title, at, width in spans if title]
        lines += [f" & & {' & '.join(heads)} \\\\", "".join(rules)]
    lines += [" & ".join(["model", "defense", *(_tex(c.title) for c in table.columns)]) + " \\\\", "\\midrule"]
    for victim, figures in table.rows:
        names = [_tex(f"`{_code(name)}`") if name != "none" else name for name in victim]
        lines.append(" & ".join([*names, *map(_tex_figure, figures)]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _spans(columns: Sequence[Column]) -> list[tuple[str, int, int]]:
    """(group, first column of the tabular, width) of neighbours that share a heading; a column without stands alone."""
    found: list[tuple[str, int, int]] = []
    for at, column in enumerate(columns, 3):
        if column.group and found and found[-1][0] == column.group:
            title, first, width = found[-1]
            found[-1] = (title, first, width + 1)
        else:
            found.append((column.group, at, 1))
    return found


def _tex(text: str) -> str:
    """A text in LaTeX: every sign that means something there is escaped."""
    made = []
    for place, part in enumerate(text.split("`")):
        plain = "".join(_SIGNS.get(sign, sign) for sign in part)
        made.append(f"\\texttt{{{plain}}}" if place % 2 else re.sub(r"\bL([012])\b", r"L$_\1$", plain))
    return "".join(made)


def _tex_figure(figure: Figure) -> str:
    interval = f" {{\\scriptsize {_tex(figure.interval)}}}" if figure.interval else ""
    return f"{_tex(figure.value)}{interval}{_tex(figure.mark)}"
