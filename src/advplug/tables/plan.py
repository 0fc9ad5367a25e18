"""The cells of a matrix before they are computed, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from advplug.certificates import CertificatePlan
from advplug.costs.forecast import counted
from advplug.matrix import Sweep
from advplug.plans import VictimPlan
from advplug.poisons.plans import PoisonPlan
from advplug.progress import duration
from advplug.studies.shown_names import called, in_row
from advplug.tables.text import grid

if TYPE_CHECKING:
    from advplug.costs.calibrate import Timed
    from advplug.costs.forecast import Forecast


def plan_rows(sweeps: Sequence[Sweep], done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The cells of a matrix, each with what is stored of it: to do, done, again (it failed) or refused."""
    rows: dict[str, dict[str, Any]] = {}
    for sweep in sweeps:
        for eps in sweep.budgets:
            key = sweep.cell_key(eps)  # which two sweeps share that begin with the same budgets
            rows[key] = {
                "key": key,
                "dataset": sweep.victim.dataset.label,
                "model": sweep.victim.model.label,
                "defense": sweep.victim.defense_label,
                "attack": sweep.attack.label,
                "norm": sweep.norm,
                "eps": str(eps),
                "goal": str(sweep.goal),
                "seed": sweep.victim.seed,
                "images": _images(sweep.limit, sweep.victim),
                "state": _state(sweep.refused is not None, done.get(key, "")),
                "reason": str(sweep.refused) if sweep.refused else None,
                "notes": list(sweep.notes),
            }
    return list(rows.values())


def proof_rows(proofs: Sequence[CertificatePlan], done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The certificates that are due, like `plan_rows`; `radii` are empty where the defense has its own."""
    return [
        _row(plan, done, radii=[str(radius) for radius in plan.radii]) | {"notes": list(plan.notes)} for plan in proofs
    ]


def poison_rows(plans: Sequence[PoisonPlan], done: Mapping[str, str]) -> list[dict[str, Any]]:
    """The attacks on training data, like `plan_rows`."""
    return [_row(plan, done) for plan in plans]


def _row(plan: CertificatePlan | PoisonPlan, done: Mapping[str, str], **more: Any) -> dict[str, Any]:
    return {
        "key": plan.key,
        **plan.identity(),
        **more,
        "images": _images(plan.limit, plan.victim),
        "state": _state(plan.refused is not None, done.get(plan.key, "")),
        "reason": str(plan.refused) if plan.refused else None,
        "notes": [],
    }


def _images(limit: int | None, victim: VictimPlan) -> int | None:
    """What is asked for, or what there is where that is less; None: all."""
    return None if limit is None else counted(limit, victim.dataset)


def _state(refused: bool, stored: str) -> str:
    return "refused" if refused else {"ok": "done", "failed": "again"}.get(stored, "to do")


def plan_json(
    sweeps: Sequence[Sweep],
    done: Mapping[str, str],
    proofs: Sequence[CertificatePlan] = (),
    poisons: Sequence[PoisonPlan] = (),
) -> str:
    rows = {
        "cells": plan_rows(sweeps, done),
        "certificates": proof_rows(proofs, done),
        "poisonings": poison_rows(poisons, done),
    }
    return json.dumps(rows, indent=2)


def forecast_json(cost: Forecast, seconds: Timed | None) -> dict[str, Any]:
    """Passes of what is to be computed, and seconds where they were timed."""
    total = cost.total
    told: dict[str, Any] = {"passes": total.passes, "most_passes": total.most, "guessed": list(cost.unknown)}
    if seconds is not None:
        told["seconds"] = {"passes": round(seconds.passes, 2), "training": round(seconds.training, 2)}
        told |= {"trainings": seconds.trainings, "not_timed": list(seconds.unknown)}
    return told


def forecast_text(cost: Forecast, seconds: Timed | None, names: Mapping[str, str] | None = None) -> str:
    """The same, for people; `names` are a matrix file's."""
    total = cost.total
    unsized, unknown = ([called(label, names or {}) for label in labels] for labels in (cost.unsized, cost.unknown))
    if not cost.victims:
        return "nothing is left to compute"
    lines = [f"forecast: about {total.passes:,} passes of an image, at most {total.most:,}, trainings aside"]
    if seconds is None:
        lines[0] += "; --calibrate forecasts seconds, too"
    else:
        told = f"about {duration(seconds.passes + seconds.training)} here"
        if seconds.trainings:
            told += f", {duration(seconds.training)} of that for {seconds.trainings} trainings that are not cached"
        lines[0] += f"; {told}"
        lines += [f"not timed: {text}" for text in seconds.unknown]
    if unsized:
        lines.append(f"fewer, should there be fewer test images than are asked for: {', '.join(unsized)}")
    if unknown:
        lines.append(f"guessed, since the parameters do not tell: {', '.join(unknown)}")
    return "\n".join(lines)


def render_plan(
    sweeps: Sequence[Sweep],
    done: Mapping[str, str],
    proofs: Sequence[CertificatePlan] = (),
    poisons: Sequence[PoisonPlan] = (),
    names: Mapping[str, str] | None = None,
) -> str:
    """The cells of a matrix with what is stored of them, and why some are refused; `names` are a matrix file's."""
    certificates = [
        {**row, "attack": "(certificate)", "eps": ", ".join(row["radii"]) or "-"} for row in proof_rows(proofs, done)
    ]
    attacked = [{**row, "norm": "-", "eps": "-"} for row in poison_rows(poisons, done)]
    rows = [in_row(row, names or {}) for row in (*plan_rows(sweeps, done), *certificates, *attacked)]
    remarks = []
    for row in rows:
        if row["reason"]:
            remarks.append(f"refused: {row['attack']} on {row['model']} ({row['defense']}): {row['reason']}")
        remarks += [f"note: {row['attack']}: {note}" for note in row["notes"]]
    header = ["dataset", "model", "defense", "attack", "norm", "eps", "images", "state"]
    if len({row["seed"] for row in rows}) > 1:
        header.insert(3, "seed")
    if len({row["goal"] for row in rows if "goal" in row}) > 1:
        header.insert(-2, "goal")
    count = sum(row["state"] in ("to do", "again") for row in rows)
    text = [["all" if row.get(h, "-") is None else str(row.get(h, "-")) for h in header] for row in rows]
    table = grid(f"{len(rows)} cells, {count} to compute", header, text)
    return "\n\n".join([table, *(["\n".join(dict.fromkeys(remarks))] if remarks else [])])
