"""The sections around the figures: warnings first, then what failed, all cells, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from advplug.health import CHECKS
from advplug.health.poisons import CHECKS as POISON_CHECKS
from advplug.health.poisons import why_bound
from advplug.registry import registry
from advplug.report import figures
from advplug.report.parts import (
    DASH,
    TONES,
    Data,
    Details,
    Entry,
    Picture,
    Section,
    Table,
    Value,
    attack_of,
    budget,
    difference,
    group,
    grouped,
    judged,
    number,
    share_of,
    similarity,
    tabulated,
    victim,
    word,
)
from advplug.results import Cell, Certificate, Poisoning, RunInfo, ThreatRow
from advplug.separation import sentence

MISSING = "Not computed"

_NAMING: dict[str, Callable[[Any], Value]] = {
    "model": lambda r: word(r.model),
    "defense": lambda r: word(r.defense),
    "dataset": lambda r: word(r.dataset),
}
_THREAT: dict[str, Callable[[Any], Value]] = {
    "norm": lambda r: word(r.norm),
    "eps": lambda r: budget(r.eps),
    "goal": lambda r: word(r.goal),
    "seed": lambda r: number(r.seed, "d"),
}
_CONSTANT = ("dataset", "norm", "goal", "seed")


def threats(data: Data) -> Section | None:
    """The worst case of every threat."""
    if not data.result.threats:
        return None
    columns: dict[str, Callable[[ThreatRow], Value]] = {
        **_NAMING,
        **_THREAT,
        "within": lambda t: word(t.shape) if t.shape else DASH,
        "clean % [95 %]": lambda t: share_of(t.clean_accuracy, True),
        "worst case % [95 %]": lambda t: share_of(t.worst_case_accuracy, True),
        "clean cosine": lambda t: similarity(t.clean_similarity),
        "worst case cosine [95 %]": lambda t: similarity(t.worst_case_similarity, True),
        "against undefended, points": lambda t: (
            DASH if t.worst_case_similarity else difference(t.difference_to_baseline)
        ),
        "recovery %": lambda t: number(None if t.recovery is None else 100 * t.recovery, ".1f"),
        "static recovery %": lambda t: number(None if t.static_recovery is None else 100 * t.static_recovery, ".1f"),
        "attacks": lambda t: number(len(t.attacks), "d"),
        "verdict": lambda t: judged(t.verdict),
    }
    table = tabulated("Worst case over the attacks", columns, data.result.threats, _CONSTANT, heads=3, id="threats")
    lead = (
        "The share of images that are right without attack and that nothing which was run breaks, image by image the "
        "worst of all attacks. The verdict says how far the number can be trusted.",
    )
    return Section("worst-case", "Worst case", lead, tables=(table,))


# --- warnings ---


def warnings(data: Data) -> Section:
    """Everything that speaks against a number, before the numbers."""
    items = [*_unfinished(data), *_flags(data), *_bounds(data)]
    lead = "What has to be known before the numbers are read." if items else "No check tripped and every cell was run."
    return Section("warnings", "Warnings", (lead,), items=tuple(items))


def _unfinished(data: Data) -> list[Entry]:
    made = []
    for status, what in (("failed", "could not be computed"), ("refused", "were refused")):
        amount = sum(c.status == status for c in data.result.done)
        if amount:
            told = f"They have no score; their reasons are under {MISSING}."
            made.append(Entry(TONES[status], status, f"{amount} of {len(data.result.done)} cells {what}", told))
    judged_groups = {group(t) for t in data.result.threats}
    lost = [c for c in data.done if group(c) not in judged_groups]
    if lost:
        title = f"{len(lost)} finished cells have no verdict"
        made.append(Entry("fair", "interrupted", title, "The run did not come to an end; run it again to go on."))
    return made


def _at(threat: ThreatRow) -> str:
    return f"{victim(threat)}, {threat.norm} {threat.eps}" + (f", {threat.shape}" if threat.shape else "")


def _flags(data: Data) -> list[Entry]:
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for t in data.result.threats:
        for flag in t.flags:
            advice = CHECKS[flag.name].advice if flag.name in CHECKS else ""
            found.setdefault((flag.level, flag.name, flag.detail, advice), []).append(_at(t))
    for p in data.result.poisonings:
        for flag in p.flags:
            advice = POISON_CHECKS[flag.name].advice if flag.name in POISON_CHECKS else ""
            found.setdefault((flag.level, flag.name, flag.detail, advice), []).append(f"{p.attack} on {victim(p)}")
    order = sorted(found.items(), key=lambda row: ("error", "warn", "info").index(row[0][0]))
    return [
        Entry(TONES[level], level, name, detail + (f"; {advice}" if advice else ""), tuple(where))
        for (level, name, detail, advice), where in order
    ]


def _bounds(data: Data) -> list[Entry]:
    found: dict[str, list[str]] = {}
    for t in data.result.threats:
        if t.verdict == "upper bound":
            missing = ", ".join(name for name in t.unchecked if name in CHECKS and CHECKS[name].required)
            why = f"not checked: {missing}" if missing else "a stronger attack may break more"
            found.setdefault(why, []).append(_at(t))
    for p in data.result.poisonings:
        if p.verdict == "upper bound":
            found.setdefault(why_bound(p.defense), []).append(f"{p.attack} on {victim(p)}")
    return [Entry("fair", "upper bound", why, "", tuple(where)) for why, where in found.items()]


# --- all cells ---


def _shown(name: str) -> Callable[[Cell], Value]:
    return lambda c: share_of(c.metrics.get(name))


def cells(data: Data) -> Section | None:
    """Every cell, to be sorted and filtered."""
    if not data.result.cells:
        return None
    more = [(h, n) for e in registry().entries("metric") for n, h in e.spec.caps.shown]  # type: ignore[union-attr]
    columns: dict[str, Callable[[Cell], Value]] = {
        **_NAMING,
        "attack": lambda c: word(c.attack),
        **_THREAT,
        "clean %": _shown("clean_accuracy"),
        "robust % [95 %]": lambda c: share_of(c.metrics.get("robust_accuracy"), True),
        "static %": _shown("static_robust_accuracy"),
        "adaptive %": _shown("adaptive_robust_accuracy"),
        "8-bit %": _shown("robust_accuracy_8bit"),
        "success %": _shown("attack_success_rate"),
        "clean cosine": lambda c: (
            similarity(c.metrics.get("clean_similarity")) if c.metrics.get("adversarial_similarity") else DASH
        ),
        "attacked cosine [95 %]": lambda c: similarity(c.metrics.get("adversarial_similarity"), True),
        **{heading: _shown(name) for heading, name in more},
        "status": lambda c: judged(c.status),
        "flags": lambda c: word(", ".join(f.name for f in c.flags) or "-"),
    }
    table = tabulated("All cells", columns, data.result.cells, _CONSTANT, heads=4, tools=True, id="cells")
    return Section("all-cells", "All cells", ("One row a victim, attack and budget.",), tables=(table,))


# --- what was not computed, cost, provenance ---


def missing(data: Data) -> Section | None:
    """Failed and refused cells with their reasons: no score, and never 0."""
    rows = [c for c in data.result.done if c.status != "ok"]
    if not rows:
        return None
    columns: dict[str, Callable[[Any], Value]] = {
        **_NAMING,
        "what": lambda c: word("certificate" if isinstance(c, Certificate) else c.attack),
        "norm": lambda c: DASH if isinstance(c, Poisoning) else word(c.norm),
        "eps": lambda c: budget(c.eps) if isinstance(c, Cell) else DASH,
        "status": lambda c: judged(c.status),
        "reason": lambda c: word(c.reason or "-"),
    }
    table = tabulated(MISSING, columns, rows, ("dataset",), heads=4, id="missing-table")
    return Section("missing", MISSING, ("These cells have no score.",), tables=(table,))


def cost(data: Data) -> Section | None:
    """Seconds by stage and passes, an attack at a time."""
    rows = [c for c in data.done if c.seconds is not None and c.passes is not None]
    if not rows:
        return None
    attacks = grouped(rows, lambda c: (victim(c), c.dataset, attack_of(c)))
    sums = [(key, len(own), *_sums(own)) for key, own in attacks.items()]
    drawn = sorted(sums, key=lambda s: s[2] + s[3], reverse=True)[:20]
    svg = figures.bars(
        [(f"{attack} on {who}", (seconds, decide)) for (who, _, attack), _, seconds, decide, *_ in drawn],
        ("attack", "decide"), "cost", "seconds, all budgets together",
    )  # fmt: skip
    columns: dict[str, Callable[[Any], Value]] = {
        "model, defense": lambda s: word(s[0][0]),
        "dataset": lambda s: word(s[0][1]),
        "attack": lambda s: word(s[0][2]),
        "cells": lambda s: number(s[1], "d"),
        "attack, s": lambda s: number(s[2], ".2f"),
        "decide, s": lambda s: number(s[3], ".2f"),
        "images forward": lambda s: number(s[4]),
        "images backward": lambda s: number(s[5]),
        "through the model": lambda s: number(s[6]),
    }
    table = tabulated("Time and passes of the attacks", columns, sums, ("dataset",), heads=3, id="cost-table")
    longest = " The 20 longest are drawn." if len(sums) > len(drawn) else ""
    picture = Picture("Seconds by attack", f"Wall time of attacking and of deciding, by attack.{longest}", svg, table)
    return Section("cost", "Time and passes", _LEAD_COST, pictures=(picture,), tables=_victims_cost(data))


_LEAD_COST = (
    "A pass is one image sent through the victim, forward or backward, by the attack; a vote sends it through the "
    "model many times. Training and defending take no time where the weights came from the cache.",
)


def _sums(rows: list[Cell]) -> tuple[float, float, int, int, int]:
    seconds, passes = [c.seconds for c in rows if c.seconds], [c.passes for c in rows if c.passes]
    return (
        sum(s.attack for s in seconds), sum(s.decide for s in seconds),
        sum(p.forward for p in passes), sum(p.backward for p in passes), sum(p.model for p in passes),
    )  # fmt: skip


def _victims_cost(data: Data) -> tuple[Table, ...]:
    firsts = grouped([c for c in data.done if c.seconds], lambda c: (c.dataset, c.model, c.defense, c.seed))
    rows = [own[0] for own in firsts.values()]
    columns: dict[str, Callable[[Any], Value]] = {
        **_NAMING,
        "seed": _THREAT["seed"],
        "train, s": lambda c: number(c.seconds.train, ".2f"),
        "defend, s": lambda c: number(c.seconds.defend, ".2f"),
        "tuned once in, s": lambda c: number(_tuned(c), ".1f"),
    }
    return (tabulated("Time of making the victims", columns, rows, ("dataset", "seed"), heads=2),)


def _tuned(cell: Cell) -> float | None:
    """Seconds of the trainings of a defense, which need not have been in this run."""
    told = cell.provenance.get("facts", {}).values()
    found = [facts["training_seconds"] for facts in told if isinstance(facts.get("training_seconds"), float | int)]
    return sum(found) if found else None


def provenance(data: Data) -> Section:
    """What made these numbers."""
    run = data.result.run
    seeds = ", ".join(map(str, run.seeds or (run.seed,)))
    facts = {
        "command": run.command or "-",
        "device": run.device,
        "seed": seeds,
        **_spent(run),
        **_separate(run),
        **run.versions,
    }
    table = Table("The last run in this folder", ("what", "value"), tuple((word(k), word(v)) for k, v in facts.items()))
    rows = [r for r in data.result.done if r.status == "ok" and r.provenance]
    victims = grouped(rows, lambda r: (r.dataset, victim(r), r.seed, str(r.provenance.get("weights_sha256"))))
    tables = (table, *_names(run.names), *_weights([own[0] for own in victims.values()]))
    return Section("provenance", "Provenance", _LEAD_PROVENANCE, tables=tables, details=tuple(_recipes(victims)))


def _separate(run: RunInfo) -> dict[str, str]:
    """What a comparison of training and evaluation images found."""
    return {f"leakage, {check.dataset}": sentence(check) for check in run.leakage}


def _names(names: Mapping[str, str]) -> tuple[Table, ...]:
    """What the names stand for that a matrix file gave."""
    rows = tuple((word(name), word(text)) for text, name in names.items())
    return (Table("Names of the matrix file", ("name", "stands for"), rows),) if rows else ()


def _spent(run: RunInfo) -> dict[str, str]:
    if not run.passes:
        return {}
    return {"passes of an image": f"{run.passes:,}", "wall time": f"{run.seconds:,.1f} s"}


_LEAD_PROVENANCE = ("What the numbers depend on. Hashes are SHA-256; indices are positions in the test split.",)


def _weights(rows: list[Any]) -> tuple[Table, ...]:
    columns: dict[str, Callable[[Any], Value]] = {
        **_NAMING,
        "seed": lambda r: number(r.seed, "d"),
        "images": lambda r: number(r.provenance.get("images", {}).get("n")),
        "indices": lambda r: word(r.provenance.get("images", {}).get("indices", "-")[:80]),
        "weights": lambda r: word(r.provenance.get("weights_sha256", "-")),
    }
    return (tabulated("Victims", columns, rows, ("dataset", "seed"), heads=2, id="victims"),) if rows else ()


def _recipes(victims: dict[Any, list[Any]]) -> list[Details]:
    made = []
    for (dataset, name, seed, _), rows in victims.items():
        told = {k: v for k, v in rows[0].provenance.items() if k != "attack"}
        told["attacks"] = list({json.dumps(r.provenance.get("attack"), sort_keys=True): r.provenance.get("attack")
                                for r in rows if r.provenance.get("attack")}.values())  # fmt: skip
        title = f"{name} on {dataset}" + (f", seed {seed}" if seed else "")
        made.append(Details(title, json.dumps(told, indent=1, ensure_ascii=False)))
    return made


def notes(data: Data) -> Section | None:
    """What was noted along the way, and where."""
    found: dict[str, list[str]] = {}
    for row in data.result.done:
        for note in row.notes:
            found.setdefault(note, []).append(victim(row))
    items = tuple(Entry("plain", "note", note, "", tuple(dict.fromkeys(where))) for note, where in found.items())
    return Section("notes", "Notes", items=items) if items else None
