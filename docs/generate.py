"""Writes the generated parts of the documentation anew: `python docs/generate.py` (make docs)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from advplug.catalogue import attacks_markdown
from advplug.registry import Registry, registry

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
OURS = ("advplug", "advplug-advlib", "advplug-art", "advplug-autoattack", "advplug-torchattacks")


def own(known: Registry) -> Registry:
    """The registrations of this repository's distributions."""
    tables = {
        kind: {name: e for name, e in table.items() if e.source.distribution in OURS}
        for kind, table in known.tables.items()
    }
    return Registry(tables, {}, (), tuple(s for s in known.sources if s.distribution in OURS))


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}: generated -->\n).*?\n?(<!-- end of {name} -->)"
    found, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"there is no place for '{name}'")
    return found


def threads(result: dict[str, Any]) -> str:
    return "one thread of a CPU" if result["threads"] == 1 else f"{result['threads']} threads of a CPU"


def backends_markdown(result: dict[str, Any]) -> str:
    """What `benchmarks/backends.py` wrote, as a table."""
    lines = [
        f"{result['model']}, {threads(result)}, torch {result['torch']}. Passes and seconds are those of an image; "
        "`more` are images that only this backend breaks, `fewer` those that only the first of its group does.",
        "",
        "| attack | budget | images | robust % | median distance | forward | backward | seconds | more | fewer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in result["groups"]:
        budget, images = f"{group['norm']} {group['eps']}", group["images"]
        for row in group["rows"]:
            name = f"`{row['attack']}`"
            if "failed" in row:
                lines.append(f"| {name} | {budget} | {images} | {row['failed']} | | | | | | |")
                continue
            middle = "" if row["median distance"] is None else f"{row['median distance']:.4f}"
            lines.append(
                f"| {name} | {budget} | {images} | {100 * row['robust accuracy']:.1f} | {middle} "
                f"| {row['forward an image']:.0f} | {row['backward an image']:.0f} "
                f"| {row['seconds'] / images:.3f} | {row['more']} | {row['fewer']} |"
            )
    return "\n".join(lines)


def autoattack_markdown(result: dict[str, Any]) -> str:
    """What `benchmarks/autoattack.py` wrote, as a table."""
    lines = [
        f"{threads(result)}, torch {result['torch']}.".capitalize(),
        "",
        "| model | L-inf | images | attack | seconds | robust % |",
        "|---|---|---|---|---|---|",
    ]
    for part in (result["cifar10"], result["mnist"]):
        for row in part["rows"]:
            lines.append(
                f"| {part['what']} | {part['eps']:.4g} | {part['images']} | {NAMES[row['attack']]} "
                f"| {row['seconds']:.0f} | {100 * row['standing'] / part['images']:.1f} |"
            )
    return "\n".join(lines)


NAMES = {"autoattack": "`autoattack`", "aa.standard": "`aa.standard`", "torchattacks": "torchattacks, 100 steps"}


def attacks_page() -> tuple[Path, str]:
    path = HERE / "attacks.md"
    text = filled(path.read_text(), "attacks", attacks_markdown(own(registry())))
    for name, markdown in (("backends", backends_markdown), ("autoattack", autoattack_markdown)):
        text = filled(text, name, markdown(json.loads((RESULTS / f"{name}.json").read_text())))
    return path, text


def main() -> None:
    for path, text in (attacks_page(),):
        path.write_text(text)
        sys.stderr.write(f"{path.name} is up to date\n")


if __name__ == "__main__":
    main()
