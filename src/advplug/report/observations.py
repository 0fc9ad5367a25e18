"""The sections made from what was observed image by image, and from proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from advplug.evidence import Array, Evidence, worst_case
from advplug.plots.curves import Line, Panel, Point
from advplug.report import figures
from advplug.report.parts import (
    Data,
    Picture,
    Section,
    Table,
    Value,
    at_middle,
    attack_of,
    grouped,
    number,
    setting,
    share_of,
    tabulated,
    under,
    victim,
    word,
)
from advplug.results import Cell, ThreatRow
from advplug.stored.runs import apart, victim_of

CLASSES = 20
CURVES = 10
"""Drawn or listed at most."""


# --- by class ---


@dataclass(frozen=True)
class _Drop:
    """By class (C,): images, and the shares of them that are right clean and in the worst case."""

    threat: ThreatRow
    images: Array
    clean: Array
    robust: Array


def classes(data: Data) -> Section | None:
    """What the attacks take from each class."""
    made = []
    drops = [d for t in data.result.threats if (d := _drop(data, t)) is not None]
    for i, found in enumerate(grouped(drops, lambda d: setting(d.threat)).values()):
        rows, told = at_middle([d.threat for d in found])
        kept = [d for d in found if any(d.threat is t for t in rows)]
        size = max(len(d.images) for d in kept)
        if size > 1:
            made.append(_by_class(data, kept, size, f"{under(rows[0])}, {told}", f"class{i}"))
    lead = "Points of accuracy that the worst case of all attacks takes from the images of each class."
    return Section("classes", "Drop by class", (lead,), pictures=tuple(made)) if made else None


def _drop(data: Data, threat: ThreatRow) -> _Drop | None:
    """None where nothing was observed, or where similarities were lowered instead."""
    n = threat.worst_case_accuracy.n if threat.worst_case_accuracy else 0
    # Those of an earlier run may be of other images, or of another victim under this name.
    cells = [c for c in data.cells_of(threat) if c.key in data.evidence and data.evidence[c.key].n == n]
    if not cells:
        return None
    meant = victim_of(min(reversed(cells), key=lambda c: apart(data.evidence[c.key], threat)))
    seen = [e for c in cells if victim_of(c) == meant and not (e := data.evidence[c.key]).minimised]
    known = [e for e in seen if np.array_equal(e.index, seen[-1].index)]
    if not known:
        return None
    y, most = known[0].y.astype(int), int(known[0].y.max(initial=0)) + 1
    images = np.bincount(y, minlength=most)
    worst = worst_case([bits for e in known for bits in e.robust_by_origin()]).mean(axis=1)

    def by_class(share: Array) -> Array:
        return np.bincount(y, weights=share, minlength=most) / np.maximum(images, 1)

    return _Drop(threat, images, by_class(known[0].clean.mean(axis=1)), by_class(worst))


def _by_class(data: Data, drops: Sequence[_Drop], size: int, title: str, name: str) -> Picture:
    first = drops[0]
    fall = np.nanmax([np.where(d.images > 0, d.clean - d.robust, -np.inf) for d in drops if len(d.images) == size], 0)
    held = np.flatnonzero(np.isfinite(fall))
    shown = sorted(held[np.argsort(-fall[held], kind="stable")][:CLASSES].tolist())
    known = data.classes.get(first.threat.dataset, ())
    labels = [known[c] if c < len(known) else str(c) for c in shown]
    victims = [victim(d.threat) for d in drops]
    values = [[_taken(d, c) for d in drops] for c in shown]
    texts = [["-" if v is None else f"{v:.0f}" for v in row] for row in values]
    svg = figures.heat([figures.Block("", labels, values, texts)], victims, name)
    columns: dict[str, Callable[[Any], Value]] = {
        "class": lambda r: word(r[0]),
        "images": lambda r: number(int(first.images[r[1]]), "d"),
    }
    for d, who in zip(drops, victims, strict=True):
        columns[f"{who} %"] = _before_and_after(d)
    rows = list(zip(labels, shown, strict=True))
    table = tabulated(f"Accuracy by class, clean → robust: {title}", columns, rows)
    left = f" Of {len(held)} classes the {len(shown)} that fall most are shown." if len(held) > len(shown) else ""
    told = f"Drop in points by class and victim; dark blue is a small drop, yellow a large one.{left}"
    return Picture(title, told, svg, table)


def _taken(drop: _Drop, c: int) -> float | None:
    held = c < len(drop.images) and drop.images[c]
    return 100 * float(drop.clean[c] - drop.robust[c]) if held else None


def _before_and_after(drop: _Drop) -> Callable[[Any], Value]:
    def show(row: Any) -> Value:
        c = row[1]
        if c >= len(drop.images) or not drop.images[c]:
            return word("-")
        # Sorted, and read by programs, by what is left.
        return Value(f"{100 * drop.clean[c]:.0f} → {100 * drop.robust[c]:.0f}", float(drop.robust[c]))

    return show


# --- strength of the attacks ---


def convergence(data: Data) -> Section | None:
    """How accuracy falls with the effort of an attack, and what twice the steps would add."""
    cells = [c for c in data.done if c.key in data.evidence]
    pictures = []
    for i, (unit, label) in enumerate((("steps", "steps on an image"), ("queries", "queries of an image"))):
        found = [(c, curve) for c in cells if (curve := _effort(c, data.evidence[c.key], unit)) is not None]
        for j, own in enumerate(grouped(found, lambda f: setting(f[0])).values()):
            pictures.append(_falling(own, unit, label, f"effort{i}-{j}"))
    table = _doubled(data)
    if not pictures and table is None:
        return None
    return Section("convergence", "Strength of the attacks", _LEAD, pictures=tuple(pictures),
                   tables=() if table is None else (table,))  # fmt: skip


_LEAD = (
    "Each attack stops at an image once it is broken, so what it had spent by then tells how accuracy falls with "
    "effort. A curve that still falls at its end belongs to an attack that was too weak. Along several budgets the "
    "effort at the smaller ones is counted in.",
    "The audit also runs the strongest attack anew with twice its steps, on images that were left: it raises a flag "
    "where that takes more than 1 point, and none where it takes less or where no attack has steps.",
)


def _effort(cell: Cell, e: Evidence, unit: str) -> figures.Curve | None:
    """Adaptive robust accuracy in % by effort spent; None where the attack does not say when it succeeded."""
    spent: Array | None = getattr(e, unit)
    won = e.attacked & (e.adaptive.mean(axis=1) > 0.5)
    if spent is None or e.minimised or not won.any() or not spent.any():
        return None
    at, most = spent[won], int(spent.max())
    if (at == at[0]).all() and at[0] == most and most > 1:
        return None  # it goes on after success, or every success was its last step
    xs = np.unique(np.concatenate(([0], at, [most]))).astype(float)
    start = float(np.where(e.attacked, e.clean.mean(axis=1), e.robust(e.adaptive).mean(axis=1)).sum())
    ys = [100 * (start - float((at <= x).sum())) / e.n for x in xs]
    return figures.Curve(f"{attack_of(cell)} on {victim(cell)}", xs.tolist(), ys)


def _falling(found: Sequence[tuple[Cell, figures.Curve]], unit: str, label: str, name: str) -> Picture:
    rows, told = at_middle([c for c, _ in found])
    own = [(c, curve) for c, curve in found if any(c is r for r in rows)]
    svg = figures.steps([curve for _, curve in own[:CURVES]], name, label, "adaptive robust accuracy, %")
    title = f"{under(rows[0])}, {told}"

    def after(part: float) -> Callable[[Any], Value]:
        def at(row: tuple[Cell, figures.Curve]) -> Value:
            curve = row[1]
            y = [y for x, y in zip(curve.xs, curve.ys, strict=True) if x <= part * curve.xs[-1]][-1]
            return Value(f"{y:.1f}", y / 100)

        return at

    columns: dict[str, Callable[[Any], Value]] = {
        "attack": lambda r: word(attack_of(r[0])),
        "model, defense": lambda r: word(victim(r[0])),
        f"most {unit}": lambda r: number(int(r[1].xs[-1])),
        "% after a tenth": after(0.1),
        "% after a quarter": after(0.25),
        "% after half": after(0.5),
        "% after all": after(1.0),
    }
    table = tabulated(f"Accuracy by {unit}: {title}", columns, own, heads=2)
    more = f" The first {CURVES} of {len(own)} are drawn." if len(own) > CURVES else ""
    return Picture(f"By {unit}: {title}", f"Adaptive robust accuracy against {label}.{more}", svg, table)


_CONVERGED = "not-converged"


def _doubled(data: Data) -> Table | None:
    """What twice the steps found, as the audit saw it."""
    rows = [t for t in data.result.threats if t.audit is not None]
    if not rows:
        return None

    def said(t: ThreatRow) -> Value:
        flag = next((f for f in t.flags if f.name == _CONVERGED), None)
        if flag is not None:
            return Value(flag.detail, tone="fair")
        return word("not checked" if _CONVERGED in t.unchecked else "no flag")

    columns: dict[str, Callable[[Any], Value]] = {
        "model, defense": lambda t: word(victim(t)),
        "dataset": lambda t: word(t.dataset),
        "norm": lambda t: word(t.norm),
        "eps": lambda t: word(t.eps),
        "audit": lambda t: word(f"{t.audit.level}, {t.audit.images} images"),
        "twice the steps": said,
    }
    return tabulated("Twice the steps", columns, rows, ("dataset", "norm", "audit"))


# --- proofs ---


def certificates(data: Data) -> Section | None:
    """Certified accuracy by radius."""
    made = [c for c in data.result.certificates if c.status == "ok"]
    if not made:
        return None
    rows = [(c, at) for c in made for at in c.certified_accuracy]
    columns: dict[str, Callable[[Any], Value]] = {
        "model, defense": lambda r: word(victim(r[0])),
        "dataset": lambda r: word(r[0].dataset),
        "norm": lambda r: word(r[0].norm),
        "radius": lambda r: word(r[1].radius),
        "certified % [95 %]": lambda r: share_of(r[1].certified_accuracy, True),
        "attacks leave %": lambda r: share_of(r[1].worst_case_accuracy),
        "clean %": lambda r: share_of(r[0].clean_accuracy),
        "abstains %": lambda r: share_of(r[0].abstention_rate),
        "a proof fails with at most": lambda r: number(r[0].failure_probability, "g"),
    }
    table = tabulated("Certified accuracy", columns, rows, ("dataset", "norm"))
    lines = []
    for c in made:
        at = [
            Point(float(Fraction(r.radius)), r.certified_accuracy) for r in c.certified_accuracy if r.certified_accuracy
        ]
        lines.append(Line(victim(c), tuple(at)))
    svg = figures.lines(Panel("", [line for line in lines if line.points]), "certified", "certified accuracy, %",
                        x_label="radius, in pixel units")  # fmt: skip
    text = "Share of images that no change up to the radius can break, by proof."
    picture = Picture("Certified accuracy by radius", text, svg, table)
    return Section("certificates", "Certificates", pictures=(picture,))
