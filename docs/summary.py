"""Tables of all benchmarks together, and of what advplug takes beside other libraries, from what is kept of them."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bars  # noqa: E402 - benchmarks/bars.py

Row = dict[str, Any]


def kept(folder: Path = BENCHMARKS / "results") -> dict[str, Row]:
    """The results that there are, by benchmark, in the order in which they are run."""
    files = {name: folder / f"{name}.json" for name in bars.JUDGES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def bars_markdown(results: dict[str, Row]) -> str:
    """A row a bar."""
    lines = ["| benchmark | what | measured | bar | held | on |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for bar in bars.of(name, result):
            side = "at most" if "at most" in bar else "at least"
            shown = (f"`{name}`", bar["what"], number(bar["value"]), f"{side} {number(bar[side])}",
                     "yes" if bar["holds"] else "**no**", bar["on"])  # fmt: skip
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def machines_markdown(results: dict[str, Row]) -> str:
    """A row a benchmark: on what it was measured, when, and by which command. What was not written down is left out."""
    lines = ["| benchmark | date | processor | cores | threads | load before | torch | command |", "|---" * 8 + "|"]
    for name, result in results.items():
        cpu, load = result.get("cpu"), result.get("load")
        # An early result has what the processor can do in place of its name.
        processor = f"{cpu}, {' '.join(result['cpu flags'])}" if isinstance(cpu, str) else (cpu or {}).get("capability")
        shown = (f"`{name}`", result.get("date"), processor, result.get("cores"), result.get("threads"),
                 None if load is None else f"{load:.1f}", result.get("torch"),
                 f"`{result.get('command', f'python benchmarks/{name}.py')}`")  # fmt: skip
        lines.append(f"| {' | '.join('-' if s is None else str(s) for s in shown)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """At most three digits that say something."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


LIBRARIES = {"": "advplug", "ta": "torchattacks", "art": "ART", "aa": "AutoAttack's own", "adv": "adv-lib"}
SHOWN = ("FGSM", "APGD-CE", "DeepFool", "Square")
"""Of `benchmarks/backends.py`; PGD and AutoAttack were measured on more images by benchmarks of their own."""


def libraries_markdown(results: dict[str, Row]) -> str:
    """Seconds of each library and the robust accuracy it leaves, the same images and settings in a row."""
    lines = [f"| attack | on | {' | '.join(LIBRARIES.values())} |", "|---" * (2 + len(LIBRARIES)) + "|"]
    engine, backends, cascade = (results[name] for name in ("engine", "backends", "autoattack"))
    for group in ("pgd", "trained"):
        for eps in dict.fromkeys(r["eps"] for r in engine[group]):
            by = {r["variant"]: r for r in engine[group] if r["eps"] == eps}
            net = engine["model"] if group == "pgd" else "a small net, trained adversarially"
            told = {"": by["advplug float32"], "ta": by.get("torchattacks"), "art": by.get("art")}
            lines.append(_line(f"PGD-{engine['steps']}", f"{net}, {eps}, {engine['images']} images", {
                key: (r["seconds"], r["robust accuracy"]) for key, r in told.items() if r
            }))  # fmt: skip
    for group in (g for g in backends["groups"] if g["group"] in SHOWN):
        rows = {("." in r["attack"].partition(":")[0] and r["attack"].partition(".")[0]) or "": r
                for r in group["rows"] if "failed" not in r}  # fmt: skip
        on = f"{backends['model']}, {'' if group['norm'] == 'linf' else 'L2 '}{group['eps']}, {group['images']} images"
        lines.append(_line(group["group"], on, {k: (r["seconds"], r["robust accuracy"]) for k, r in rows.items()}))
    for part in (cascade["cifar10"], cascade["mnist"]):
        names = {"autoattack": "", "aa.standard": "aa", "torchattacks": "ta"}
        found = {names[r["attack"]]: (r["seconds"], r["standing"] / part["images"]) for r in part["rows"]}
        eps = "1/255" if abs(part["eps"] - 1 / 255) < 1e-9 else f"{part['eps']:g}"
        lines.append(_line("AutoAttack", f"{part['what']}, {eps}, {part['images']} images", found))
    return "\n".join(lines)


def _line(attack: str, on: str, found: dict[str, tuple[float, float]]) -> str:
    cells = [f"{found[key][0]:.3g} s, {100 * found[key][1]:.1f} %" if key in found else "" for key in LIBRARIES]
    return f"| {attack} | {on} | {' | '.join(cells)} |"


def front() -> Row:
    """The run of the README's picture."""
    found: Row = json.loads((BENCHMARKS / "results" / "measured" / "front.json").read_text())
    return found


def front_markdown(result: Row, eps: str) -> str:
    """The README's run: its command, and a row a defense at one budget."""
    joined = re.sub(r"( --?[a-z]+) ", "\\1\0", result["command"])  # an option and its value stay on one line
    command = textwrap.wrap(joined, 108, break_long_words=False, break_on_hyphens=False)
    lines = ["```", " \\\n  ".join(command).replace("\0", " "), "```", ""]
    lines += ["| defense | clean | seems to hold | holds | verdict |", "|---" * 5 + "|"]
    cells = {c["defense"]: c for c in result["cells"] if c["eps"] == eps}
    for t in (t for t in result["threats"] if t["eps"] == eps):
        cell, worst = cells[t["defense"]], t["worst_case_accuracy"]
        static = cell["static_robust_accuracy"]
        name = "none" if t["defense"] == "none" else f"`{t['defense']}`"
        seems = "" if t["defense"] == "none" or static is None else f"{100 * static:.1f} %"
        holds = f"{100 * worst['value']:.1f} % [{100 * worst['low']:.1f}, {100 * worst['high']:.1f}]"
        lines.append(f"| {name} | {100 * t['clean_accuracy']['value']:.1f} % | {seems} | {holds} | {t['verdict']} |")
    return "\n".join(lines)


def faults_markdown(result: Row) -> str:
    """What `benchmarks/broken_defenses.py` wrote, as a table."""
    lines = [
        f"`{result['model']}` on `{result['dataset']}`, L-inf {result['eps']}, {result['images']} images.",
        "",
        "| fault | claimed % | by hand % | reported % | verdict | flags | repaired % | its verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        shares = " | ".join(f"{100 * r[k]:.1f}" for k in ("claimed", "broken", "reported"))
        flags = ", ".join(f"`{f}`" for f in r["flags"]) or "-"
        twin = r["twin_verdict"] + (f" ({', '.join(r['twin_flags'])})" if r["twin_flags"] else "")
        lines.append(f"| {r['name']} | {shares} | {r['verdict']} | {flags} | {100 * r['twin']:.1f} | {twin} |")
    return "\n".join(lines)
