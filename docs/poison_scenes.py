"""The tables of poisoned captions: what `benchmarks/poisoning.py` kept."""

from __future__ import annotations

from typing import Any

from study_pages import percent


def threads(result: dict[str, Any]) -> str:
    return "one thread of a CPU" if result["threads"] == 1 else f"{result['threads']} threads of a CPU"


def scenes_markdown(result: dict[str, Any]) -> str:
    """What `benchmarks/poisoning.py` wrote: a row a defense, all seeds side by side, and what the choices were."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["defense"], []).append(row)
    seeds = [str(row["seed"]) for row in rows["none"]]
    n, targets = (rows["none"][0][k]["n"] for k in ("clean_accuracy", "poison_success_rate"))
    lines = [
        f"`{result['attack']}`; {n} images, {targets} targets, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}, "
        f"{threads(result)}, torch {result['torch']}.",
        "",
        "| defense | triggered as target % | clean model's % | targets taken | zero-shot % "
        "| passes | seconds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for defense, made in rows.items():
        shown = (
            "none" if defense == "none" else f"`{defense}`",
            *(_each(made, name) for name in ("attack_success_rate", "clean_model_success_rate")),
            " ".join(f"{_count(r['poison_success_rate'])}" for r in made),
            _each(made, "clean_accuracy"),
            " ".join(f"x{r['passes_ratio']:.2f}" if "passes_ratio" in r else "1" for r in made),
            " ".join(f"{r['seconds']:.0f}" for r in made),
            ", ".join(dict.fromkeys(r["verdict"] for r in made)),
        )
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join([*lines, *_rounds(rows.get("safeclip", []))])


def _each(made: list[dict[str, Any]], name: str) -> str:
    if len(made) == 1:
        return percent(made[0][name])
    return " ".join(f"{100 * r[name]['value']:.1f}" for r in made)


def _count(rate: dict[str, Any]) -> str:
    return f"{round(rate['value'] * rate['n'])}/{rate['n']}"


def _rounds(made: list[dict[str, Any]]) -> list[str]:
    """What SafeCLIP trusted, epoch by epoch."""
    if not made:
        return []
    seeds = [f"seed {r['seed']}" for r in made]
    lines = [
        "",
        "What `safeclip` trusted, epoch by epoch: pairs, the poisons among them, and who decided.",
        "",
        f"| epoch | {' | '.join(seeds)} |",
        "|---" * (len(made) + 1) + "|",
    ]
    for number in range(max(len(r["rounds"]) for r in made)):
        told = [r["rounds"][number] for r in made]
        cells = [f"{t['trusted']:,}, {t['poisons']} poison{'s' * (t['poisons'] != 1)}, {t['decided']}" for t in told]
        lines.append(f"| {number + 1} | {' | '.join(cells)} |")
    return lines
