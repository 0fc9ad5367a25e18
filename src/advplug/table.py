"""Results as text tables for people: cells, then the worst case of every threat with its verdict."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advplug.certificates import CertificatePlan
from advplug.estimate import Estimate
from advplug.health import CHECKS
from advplug.matrix import Sweep
from advplug.results import Cell, Certificate, CertifiedAccuracy, Flag, RunResult, ThreatRow

Row = Sequence[str]


def percent(estimate: Estimate | None, interval: bool = False) -> str:
    """`93.4`, or `93.4 [90.3, 95.6]`; a dash where the quantity does not apply."""
    if estimate is None:
        return "-"
    text = f"{100 * estimate.value:.1f}"
    if interval and estimate.low is not None and estimate.high is not None:
        text += f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return text


def points(estimate: Estimate | None) -> str:
    """`+2.5 [-0.1, +5.0]`: a difference in points."""
    if estimate is None:
        return "-"
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _metric(name: str, interval: bool = False) -> Callable[[Cell], str]:
    return lambda cell: percent(cell.metrics.get(name), interval)


def render(result: RunResult) -> str:
    """The whole result as text; columns that say the same in every row are written above the table."""
    parts = [_cells(result.cells), _threats(result.threats), _certificates(result.certificates), *remarks(result)]
    return "\n\n".join(p for p in parts if p)


def _cells(cells: Sequence[Cell]) -> str:
    columns: dict[str, Callable[[Cell], str]] = {
        "dataset": lambda c: c.dataset,
        "model": lambda c: c.model,
        "defense": lambda c: c.defense,
        "attack": lambda c: c.attack,
        "norm": lambda c: c.norm,
        "eps": lambda c: c.eps,
        "goal": lambda c: c.goal,
        "clean %": _metric("clean_accuracy"),
        "robust % [95 %]": _metric("robust_accuracy", True),
        "static %": _metric("static_robust_accuracy"),
        "adaptive %": _metric("adaptive_robust_accuracy"),
        "8-bit %": _metric("robust_accuracy_8bit"),
        "success %": _metric("attack_success_rate"),
        "status": lambda c: c.status if c.status != "ok" else ", ".join(f.name for f in c.flags) or "ok",
    }
    return _table("Attacks", columns, cells, constant=("dataset", "model", "norm", "goal"))


def _threats(threats: Sequence[ThreatRow]) -> str:
    columns: dict[str, Callable[[ThreatRow], str]] = {
        "dataset": lambda t: t.dataset,
        "model": lambda t: t.model,
        "defense": lambda t: t.defense,
        "norm": lambda t: t.norm,
        "eps": lambda t: t.eps,
        "goal": lambda t: t.goal,
        "clean % [95 %]": lambda t: percent(t.clean_accuracy, True),
        "worst case % [95 %]": lambda t: percent(t.worst_case_accuracy, True),
        "against undefended": lambda t: points(t.difference_to_baseline),
        "verdict": lambda t: t.verdict or "not measured",
    }
    return _table("Worst case over the attacks", columns, threats, constant=("dataset", "model", "norm", "goal"))


def _certificates(certificates: Sequence[Certificate]) -> str:
    rows = [(c, at) for c in certificates for at in c.certified_accuracy or (None,)]
    columns: dict[str, Callable[[tuple[Certificate, CertifiedAccuracy | None]], str]] = {
        "dataset": lambda row: row[0].dataset,
        "model": lambda row: row[0].model,
        "defense": lambda row: row[0].defense,
        "norm": lambda row: row[0].norm,
        "clean %": lambda row: percent(row[0].clean_accuracy),
        "abstains %": lambda row: percent(row[0].abstention_rate),
        "radius": lambda row: row[1].radius if row[1] else "-",
        "certified % [95 %]": lambda row: percent(row[1].certified_accuracy, True) if row[1] else "-",
        "attacks leave %": lambda row: percent(row[1].worst_case_accuracy) if row[1] else "-",
        "status": lambda row: row[0].status,
    }
    shared = ("dataset", "model", "defense", "norm", "clean %", "abstains %")
    return _table("Certificates", columns, rows, constant=shared)


def _table(title: str, columns: Mapping[str, Callable[..., str]], items: Sequence[object], constant: Row) -> str:
    """A table of `items`; columns named in `constant` that never vary move into the title."""
    if not items:
        return ""
    rows = [[cell(item) for cell in columns.values()] for item in items]
    fixed = [(i, name) for i, name in enumerate(columns) if name in constant and len({row[i] for row in rows}) == 1]
    heading = ", ".join(f"{name} {rows[0][i]}" for i, name in fixed)
    skip = {i for i, _ in fixed} | {
        i for i, name in enumerate(columns) if len(rows) and all(row[i] == "-" for row in rows)
    }
    kept = [i for i in range(len(columns)) if i not in skip]
    names = list(columns)
    return grid(
        f"{title} ({heading})" if heading else title,
        [names[i] for i in kept],
        [[r[i] for i in kept] for r in rows],
    )


def grid(title: str, header: Row, rows: Sequence[Row]) -> str:
    """A plain table; numbers align right. It is never cut to the width of a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if "%" in name or name == "eps" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    buffer = io.StringIO()
    width = max(
        shutil.get_terminal_size().columns,
        sum(max(map(len, c)) + 3 for c in zip(header, *rows, strict=True)),
        40,
    )
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(table)
    # Above the table, not in it: there it would be wrapped to the width of a narrow table.
    return "\n".join([title, *(line.rstrip() for line in buffer.getvalue().splitlines())]).strip("\n")


def remarks(result: RunResult) -> list[str]:
    """What has to be said below the tables, as one paragraph or none."""
    lines: list[str] = []
    for cell in result.cells:
        if cell.status != "ok":
            lines.append(
                f"{cell.status}: {cell.attack} on {cell.model} ({cell.defense}), {cell.norm} {cell.eps}: {cell.reason}"
            )
        lines += [f"note: {cell.attack} on {cell.model} ({cell.defense}): {note}" for note in cell.notes]
        lines += _spread(cell)
    for certificate in result.certificates:
        lines += _certificate_remarks(certificate)
    lines += _facts(result.cells)
    flags: dict[Flag, None] = {}
    for flag in (f for t in result.threats for f in t.flags):
        flags.setdefault(flag)
    lines += [f"{flag.level}: {flag.name}: {flag.detail}; {CHECKS[flag.name].advice}" for flag in flags]
    audits = [t.audit for t in result.threats if t.audit is not None]
    if audits:
        most = max(audits, key=lambda a: a.forward)
        cost = f"{most.forward:,} forward and {most.backward:,} backward passes of an image"
        lines.append(f"audit ({most.level}): {most.images} images, {cost}{' a threat at most' * (len(audits) > 1)}")
    for threat in result.threats:
        if threat.verdict == "upper bound":
            missing = ", ".join(name for name in threat.unchecked if CHECKS[name].required)
            why = f"not checked: {missing}" if missing else "a stronger attack may break more"
            lines.append(f"upper bound: {threat.model} ({threat.defense}), {threat.norm} {threat.eps}: {why}")
    return ["\n".join(dict.fromkeys(lines))] if lines else []


def _spread(cell: Cell) -> list[str]:
    robust = cell.metrics.get("robust_accuracy")
    if robust is None or robust.spread is None:
        return []
    varies = f"robust accuracy varies by {100 * robust.spread:.1f} points (standard deviation)"
    return [
        f"note: {cell.attack} on {cell.model} ({cell.defense}): {cell.draws} decisions of each image, "
        f"figures are their means; {varies}"
    ]


def _certificate_remarks(made: Certificate) -> list[str]:
    what = f"certificate of {made.model} ({made.defense})"
    if made.status != "ok":
        return [f"{made.status}: {what}: {made.reason}"]
    assert made.passes is not None
    assert made.failure_probability is not None
    cost = f"{made.passes.forward:,} passes of an image through the model"
    held = f"each image's proof fails with probability {made.failure_probability:g} at most"
    return [f"{what}: {held}; {cost}", *(f"note: {what}: {note}" for note in made.notes)]


def _facts(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for cell in cells:
        for defense, facts in cell.provenance.get("facts", {}).items():
            told = ", ".join(f"{k.replace('_', ' ')} {v:,}" if isinstance(v, int) else f"{k.replace('_', ' ')} {v}"
                             for k, v in facts.items() if isinstance(v, int | float | str))  # fmt: skip
            lines.append(f"{defense} on {cell.model}: {told}")
    return lines


def plan_rows(sweeps: Sequence[Sweep], done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The cells of a matrix, each with what is stored of it: to do, done, again (it failed) or refused."""
    rows = []
    for sweep in sweeps:
        for eps in sweep.budgets:
            rows.append(
                {
                    "key": sweep.cell_key(eps),
                    "dataset": sweep.victim.dataset.label,
                    "model": sweep.victim.model.label,
                    "defense": sweep.victim.defense_label,
                    "attack": sweep.attack.label,
                    "norm": sweep.norm,
                    "eps": str(eps),
                    "images": sweep.limit,
                    "state": _state(sweep.refused is not None, done.get(sweep.cell_key(eps), "")),
                    "reason": str(sweep.refused) if sweep.refused else None,
                    "notes": list(sweep.notes),
                }
            )
    return rows


def proof_rows(proofs: Sequence[CertificatePlan], done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The certificates that are due, like `plan_rows`; `radii` are empty where the defense has its own."""
    return [
        {
            "key": plan.key,
            **plan.identity(),
            "radii": [str(radius) for radius in plan.radii],
            "images": plan.limit,
            "state": _state(plan.refused is not None, done.get(plan.key, "")),
            "reason": str(plan.refused) if plan.refused else None,
            "notes": list(plan.notes),
        }
        for plan in proofs
    ]


def _state(refused: bool, stored: str) -> str:
    return "refused" if refused else {"ok": "done", "failed": "again"}.get(stored, "to do")


def plan_json(sweeps: Sequence[Sweep], done: Mapping[str, str], proofs: Sequence[CertificatePlan] = ()) -> str:
    return json.dumps({"cells": plan_rows(sweeps, done), "certificates": proof_rows(proofs, done)}, indent=2)


def render_plan(sweeps: Sequence[Sweep], done: Mapping[str, str], proofs: Sequence[CertificatePlan] = ()) -> str:
    """The cells of a matrix with what is stored of them, and why some are refused."""
    certificates = [
        {**row, "attack": "(certificate)", "eps": ", ".join(row["radii"]) or "-"} for row in proof_rows(proofs, done)
    ]
    rows = [*plan_rows(sweeps, done), *certificates]
    remarks = []
    for row in rows:
        if row["reason"]:
            remarks.append(f"refused: {row['attack']} on {row['model']} ({row['defense']}): {row['reason']}")
        remarks += [f"note: {row['attack']}: {note}" for note in row["notes"]]
    header = ["dataset", "model", "defense", "attack", "norm", "eps", "images", "state"]
    count = sum(row["state"] in ("to do", "again") for row in rows)
    text = [["all" if row[h] is None else str(row[h]) for h in header] for row in rows]
    table = grid(f"{len(rows)} cells, {count} to compute", header, text)
    return "\n\n".join([table, *(["\n".join(dict.fromkeys(remarks))] if remarks else [])])
