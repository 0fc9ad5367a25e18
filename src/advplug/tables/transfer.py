"""Transfer matrices as text: crafted on the rows, judged on the columns."""

from __future__ import annotations

from dataclasses import replace

from advplug.defaults import CRAFTED_BY
from advplug.parse import parse_reference
from advplug.results import Cell, RunResult
from advplug.table import remarks
from advplug.tables.text import grid, percent


def render(result: RunResult) -> str:
    """One matrix of robust accuracies for each dataset, seed, threat and crafting attack."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in result.cells:
        reference = parse_reference(cell.attack)
        how = reference.get("attack") or CRAFTED_BY
        groups.setdefault((cell.dataset, how, cell.norm, cell.eps, cell.goal, str(cell.seed)), []).append(cell)
    parts = [_matrix(name, cells) for name, cells in groups.items()]
    # Verdicts are for the worst case over attacks, which a transfer matrix is not about.
    return "\n\n".join([*parts, *remarks(replace(result, threats=()))])


def _matrix(name: tuple[str, ...], cells: list[Cell]) -> str:
    dataset, how, norm, eps, goal, seed = name
    judged = list(dict.fromkeys(_victim(c) for c in cells))
    crafted = list(dict.fromkeys(_source(c) for c in cells))
    by_place = {(_source(c), _victim(c)): c for c in cells}
    clean = dict.fromkeys(judged, "-")
    clean |= {_victim(c): percent(c.metrics["clean_accuracy"]) for c in cells if c.status == "ok"}
    rows = [["(no attack)", *(clean[v] for v in judged)]]
    rows += [[source, *(_shown(by_place.get((source, v))) for v in judged)] for source in crafted]
    title = f"Robust accuracy in % of images crafted on the row's model by {how}, judged on the column's"
    return grid(
        f"{title} (dataset {dataset}, {norm} {eps}, {goal}, seed {seed})",
        ["crafted on", *(f"{v} %" for v in judged)],
        rows,
    )


def _victim(cell: Cell) -> str:
    return cell.model if cell.defense == "none" else f"{cell.model}+{cell.defense}"


def _source(cell: Cell) -> str:
    return parse_reference(cell.attack).get("from") or "?"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return percent(cell.metrics.get("robust_accuracy")) if cell.status == "ok" else cell.status
