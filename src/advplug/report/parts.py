"""What a page is made of: sections with tables, figures and grids of images; and what they are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from advplug.defaults import CRAFTED_BY
from advplug.estimate import Estimate
from advplug.evidence import Evidence
from advplug.parse import parse_reference
from advplug.results import Cell, RunResult, ThreatRow
from advplug.store import THREAT
from advplug.stored.runs import class_names, observed, pictured, poisons_pictured, read
from advplug.stored.samples import PoisonSample, Sample
from advplug.studies.shown_names import called as called_label
from advplug.studies.shown_names import renamed
from advplug.tables.text import cosine, percent, points

Item = TypeVar("Item")
UNDEFENDED = "none"
TONES = {
    "trusted": "good", "upper bound": "fair", "not trustworthy": "bad", "error": "bad", "warn": "fair", "info": "plain",
    "ok": "plain", "failed": "bad", "refused": "fair",
}  # fmt: skip
"""How a verdict, a level or a status looks; what it is is always written, too."""


@dataclass(frozen=True)
class Value:
    """One entry of a table: what is read, the exact number behind it, by which the column is sorted, and how it
    looks."""

    text: str
    number: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """`heads` columns from the left say what the row is about; `tools`: it can be sorted and filtered."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    heads: int = 1
    tools: bool = False
    id: str = ""

    @property
    def aligned(self) -> tuple[bool, ...]:
        """Whether a column holds numbers, and here and there a word where there is none."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return tuple(any(v.number is not None for v in column) for column in columns)


@dataclass(frozen=True)
class Entry:
    """An entry of a list: a badge, what it is about, what is said of it, and where it holds."""

    tone: str
    badge: str
    title: str
    text: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A drawing (SVG source), with what it says in words and the numbers that it shows."""

    title: str
    description: str
    svg: str
    table: Table | None = None


@dataclass(frozen=True)
class Strip:
    """A row of images as one: `data` is a URI, `captions` stand below its columns."""

    label: str
    alt: str
    data: str
    captions: tuple[str, ...] = ()
    changed: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Images in columns of `tile` CSS pixels, under `header` and, in small letters, `small`; `width` images a row."""

    title: str
    lead: str
    header: tuple[str, ...]
    strips: tuple[Strip, ...]
    tile: int
    open: bool = False
    small: tuple[str, ...] = ()
    heading: str = "true class"
    table: Table | None = None

    @property
    def width(self) -> int:
        return len(self.header)


@dataclass(frozen=True)
class Details:
    """Text as it is, folded away."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    grids: tuple[Grid, ...] = ()
    details: tuple[Details, ...] = ()
    items: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Data:
    """What a folder of runs holds."""

    result: RunResult
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    samples: Mapping[str, Sample] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    poisons: Mapping[str, PoisonSample] = field(default_factory=dict)

    @property
    def done(self) -> list[Cell]:
        return [c for c in self.result.cells if c.status == "ok"]

    def cells_of(self, threat: ThreatRow) -> list[Cell]:
        """The finished cells of a threat."""
        return [c for c in self.done if group(c) == group(threat)]


def load(folder: Path) -> Data:
    """Raises UsageError where `folder` is no run's, or its file is damaged."""
    evidence = {cell.key: found for cell, found in observed(folder)}
    result = renamed(read(folder))
    result = replace(result, threats=tuple(sorted(result.threats, key=_place(result.cells))))
    classes = {called_label(name, result.run.names): made for name, made in class_names(folder).items()}
    return Data(result, evidence, pictured(folder), classes, poisons_pictured(folder))


def _place(cells: Sequence[Cell]) -> Callable[[ThreatRow], Any]:
    """Where a threat stands: victims in the order in which they were asked for, budgets ascending."""
    orders = {name: list(dict.fromkeys(getattr(c, name) for c in cells)) for name in THREAT if name != "eps"}

    def at(t: ThreatRow) -> tuple[Any, ...]:
        found = {n: o.index(v) if (v := getattr(t, n)) in o else len(o) for n, o in orders.items()}
        first = ("dataset", "norm", "shape", "goal", "seed", "model", "defense")
        return *(found[n] for n in first), Fraction(t.eps)

    return at


# --- naming and choosing ---


def group(row: Cell | ThreatRow) -> tuple[Any, ...]:
    """The (victim, threat) group that a row belongs to."""
    return tuple(getattr(row, column) for column in THREAT)


def setting(row: Cell | ThreatRow) -> tuple[Any, ...]:
    """What has to agree for numbers of different victims to stand side by side, but for the budget."""
    return row.dataset, row.norm, row.goal, row.seed, row.shape


def under(row: Cell | ThreatRow) -> str:
    """`digits, linf` and what else is out of the ordinary."""
    return f"{row.dataset}, {row.norm}{beside(row)}"


def beside(row: Cell | ThreatRow) -> str:
    goal = "" if row.goal == "untargeted" else f", {row.goal}"
    return (f", {row.shape}" if row.shape else "") + goal + (f", seed {row.seed}" if row.seed else "")


def victim(row: Any) -> str:
    """`cnn`, or `cnn+jpeg` where it is defended."""
    return str(row.model) if row.defense == UNDEFENDED else f"{row.model}+{row.defense}"


def is_transfer(cell: Cell) -> bool:
    return parse_reference(cell.attack).name == "transfer"


def attack_of(cell: Cell) -> str:
    """`pgd:steps=40`, or `pgd:steps=40 from resnet18` where the images were crafted on another model."""
    if not is_transfer(cell):
        return cell.attack
    told = parse_reference(cell.attack)
    return f"{told.get('attack') or CRAFTED_BY} from {told.get('from') or '?'}"


def grouped(rows: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """In order of first appearance."""
    made: dict[Any, list[Item]] = {}
    for row in rows:
        made.setdefault(key(row), []).append(row)
    return made


def middle(budgets: Iterable[str]) -> str:
    """The budget that stands for all where only one is drawn."""
    found = sorted(set(budgets), key=Fraction)
    return found[(len(found) - 1) // 2]


def at_middle(rows: Sequence[Item]) -> tuple[list[Item], str]:
    """The rows at the middle budget, and the words that say so."""
    budgets = list(dict.fromkeys(str(r.eps) for r in rows))  # type: ignore[attr-defined]
    eps = middle(budgets)
    more = f", one of {len(budgets)} budgets" if len(budgets) > 1 else ""
    return [r for r in rows if r.eps == eps], f"eps {eps}{more}"  # type: ignore[attr-defined]


# --- values ---

DASH = Value("-")


def word(text: object, tone: str = "") -> Value:
    return Value(str(text), tone=tone)


def judged(text: str | None) -> Value:
    """A verdict, level or status."""
    return Value(text or "not measured", tone=TONES.get(text or "", ""))


def budget(eps: str) -> Value:
    return Value(eps, float(Fraction(eps)))


def number(value: float | None, form: str = ",") -> Value:
    return DASH if value is None else Value(format(value, form), float(value))


def percentage(estimate: Estimate | None) -> float | None:
    """As it is drawn."""
    return None if estimate is None else 100 * estimate.value


def share_of(estimate: Estimate | None, interval: bool = False) -> Value:
    """A percentage; the number behind it is the share itself."""
    return DASH if estimate is None else Value(percent(estimate, interval), estimate.value)


def similarity(estimate: Estimate | None, interval: bool = False) -> Value:
    return DASH if estimate is None else Value(cosine(estimate, interval), estimate.value)


def difference(estimate: Estimate | None) -> Value:
    """In points."""
    return DASH if estimate is None else Value(points(estimate), estimate.value)


def tabulated(
    caption: str,
    columns: Mapping[str, Callable[[Any], Value]],
    items: Sequence[object],
    constant: Sequence[str] = (),
    heads: int = 1,
    tools: bool = False,
    id: str = "",  # noqa: A002 - as HTML calls it
) -> Table:
    """A table of `items`; columns that hold nothing are left out, those named in `constant` that never vary move to
    the caption. `heads` counts columns before any are left out."""
    rows = [[make(item) for make in columns.values()] for item in items]
    names = list(columns)
    same = [i for i, n in enumerate(names) if n in constant and len({r[i].text for r in rows}) == 1]
    empty = {i for i in range(len(names)) if all(r[i] == DASH for r in rows)}
    told = ", ".join(f"{names[i]} {rows[0][i].text}" for i in same)
    kept = [i for i in range(len(names)) if i not in {*same, *empty}]
    return Table(
        f"{caption} ({told})" if told else caption,
        tuple(names[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        max(1, sum(i < heads for i in kept)),
        tools,
        id,
    )
