"""What pages say of time and size, from the results of the benchmarks that measured them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]


def _on(result: Result) -> str:
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return f"`{result['command']}`, {threads} of {result['cpu']}, {result['date']}"


def captions(result: Result) -> str:
    """How long `caption-pgd` takes beside loops written by hand."""
    careful, usual = (bar["value"] for bar in result["bars"][:2])
    return (
        f"An attack of {result['steps']} steps takes {careful:.2f} times as long as a loop written by hand with its "
        "texts read once and parameters\nfrozen, and is "
        f"{usual:.1f} times as fast as one that reads them in every step and lets gradients reach the whole model, at\n"
        f"the same similarity ({_on(result)}: {result['images']} images, medians of {result['repeats']} repeats)."
    )


def forecast(result: Result) -> str:
    """What a dry run forecasts, beside what it then was."""
    passes, seconds = result["passes"], result["seconds"]
    return (
        f"For `recipes/{result['matrix']}`, {result['cells']} cells, about {passes['forecast']:,.0f} passes were "
        f"expected and {passes['taken']:,} taken, and with trainings\n{seconds['forecast']:.0f} seconds were forecast "
        f"and {seconds['taken']:.0f} taken ({_on(result)})."
    )


def load(result: Result) -> str:
    """What advplug itself adds to a cell."""
    each = [f"{1000 * row['run']['cpu'] / row['cells']:.0f} ms in a matrix of {row['cells']}" for row in result["rows"]]
    last = result["rows"][-1]
    return (
        f"advplug itself takes, of one CPU and for each cell, {' and '.join(each)}; "
        f"the folder grows by {last['store_bytes'] / last['cells'] / 1000:.0f} kB a\n"
        f"cell of 40 images ({_on(result)})."
    )


KINDS = {"grey": "gentle, grey", "colour": "gentle, in colour", "noise": "noise in colour"}


def report(result: Result) -> str:
    """Size and time of reports."""
    lines = ["| images | shown of each cell | page | one core |", "|---|---|---|---|"]
    for kind, words in KINDS.items():
        made = result["kinds"][kind]
        size, seconds = made["megabytes"], made["processor_seconds"]
        lines.append(f"| {words} | {made['images']} | {size:.1f} MB | {seconds:.1f} s |")
    return "\n".join([*lines, "", f"{_on(result)}."])


PLACES: dict[str, dict[str, tuple[str, Callable[[Result], str]]]] = {
    "clip.md": {"caption-time": ("clip", captions)},
    "matrix.md": {"forecast": ("forecast", forecast), "load": ("load", load)},
    "report.md": {"size": ("report", report)},
}
"""Of each page the places, with the benchmark that they tell of."""
