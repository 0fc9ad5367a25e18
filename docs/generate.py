"""Writes the generated parts of the documentation anew: `python docs/generate.py` (make docs)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from advplug.catalogue import attacks_markdown, poisons_markdown
from advplug.registry import Registry, registry
from cost_figures import PLACES
from data_tables import datasets_markdown, metrics_markdown, models_markdown
from picture import svg
from poison_scenes import scenes_markdown, threads
from study_pages import flags, pages, percent
from summary import bars_markdown, faults_markdown, front, front_markdown, kept, libraries_markdown, machines_markdown

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
OURS = (
    "advplug",
    "advplug-advlib",
    "advplug-art",
    "advplug-autoattack",
    "advplug-clip",
    "advplug-hub",
    "advplug-mlflow",
    "advplug-poisoning",
    "advplug-safeclip",
    "advplug-torchattacks",
)


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


def measured_markdown(result: dict[str, Any]) -> str:
    """What one command of `benchmarks/measured.py` came to: its threats, each with the strongest static and adaptive
    figure of its attacks, and the flags that say why a number is what it is."""
    if result.get("poisonings"):
        return poisonings_markdown(result)
    if any(t.get("worst_case_similarity") for t in result["threats"]):
        return similarities_markdown(result)
    n = next(t["clean_accuracy"]["n"] for t in result["threats"] if t["clean_accuracy"])
    lines = [
        *_ran(result, n),
        "| defense | eps | clean % | static % | adaptive % | worst case % | verdict | flags |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in result["threats"]:
        same = [c for c in result["cells"] if all(c[k] == t[k] for k in ("defense", "norm", "eps"))]
        static, adaptive = (_least(same, f"{kind}_robust_accuracy") for kind in ("static", "adaptive"))
        eps = t["eps"] if t["norm"] == "linf" else f"{t['norm']} {t['eps']}"
        name = "none" if t["defense"] == "none" else f"`{t['defense']}`"
        lines.append(
            f"| {name} | {eps} | {percent(t['clean_accuracy'])} | {static} | {adaptive} "
            f"| {percent(t['worst_case_accuracy'])} | {t['verdict']} | {flags(t)} |"
        )
    return "\n".join(lines)


def poisonings_markdown(result: dict[str, Any]) -> str:
    """What attacks on training data came to: a row an attack and defense, all seeds side by side."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for made in result["poisonings"]:
        rows.setdefault((made["attack"], made["defense"]), []).append(made)
    found = next(iter(rows.values()))
    asked = [n for n in SUCCESSES if any(made["metrics"].get(n) for made in result["poisonings"])]
    removes = any(_removed(made) for made in result["poisonings"])
    n = max(m["n"] for made in result["poisonings"] for m in made["metrics"].values() if m)
    head = ["attack", "defense", "poisons", *(SUCCESSES[name] for name in asked), "clean model's %", "clean accuracy %"]
    head += [*(["poisons found %"] if removes else []), "verdict"]
    lines = [*_ran(result, n)]
    if len(found) > 1:
        lines += [f"Seeds {', '.join(str(made['seed']) for made in found)}, one figure each.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (attack, defense), made in rows.items():
        name = "none" if defense == "none" else f"`{defense}`"
        columns = [f"`{attack}`", name, str(made[0]["poisons"])]
        columns += [_shares(made, key) for key in asked]
        columns += [" and ".join(_shares(made, CLEAN_MODEL[key]) for key in asked)]
        columns += [_shares(made, "clean_accuracy")]
        columns += [" ".join(_removed(m) or "-" for m in made)] if removes else []
        lines.append(f"| {' | '.join([*columns, ', '.join(dict.fromkeys(m['verdict'] for m in made))])} |")
    return "\n".join(lines)


CLEAN_MODEL = {
    "attack_success_rate": "clean_model_success_rate",
    "poison_success_rate": "clean_model_poison_success_rate",
}


SUCCESSES = {"attack_success_rate": "triggered as target %", "poison_success_rate": "targets taken %"}


def _shares(made: list[dict[str, Any]], name: str) -> str:
    """One figure with its interval, or those of several seeds."""
    values = [m["metrics"].get(name) for m in made]
    if len(values) == 1:
        return percent(values[0])
    return " ".join(f"{100 * v['value']:.1f}" if v else "-" for v in values)


def _removed(made: dict[str, Any]) -> str | None:
    """The share of the poisons that a data defense left out, and of the clean images."""
    for told in made["facts"].values():
        if "removed_poisons_share" in told:
            return f"{100 * told['removed_poisons_share']:.0f} ({100 * told['removed_clean_share']:.0f} of clean)"
    return None


def similarities_markdown(result: dict[str, Any]) -> str:
    """The same where similarities are lowered: a row an attack, which shows what steps and budgets do, where there is
    no defense; a row a defense where there are some."""
    n = next(t["clean_similarity"]["n"] for t in result["threats"] if t["clean_similarity"])
    if all(t["defense"] == "none" for t in result["threats"]):
        names = list(dict.fromkeys(c["attack"] for c in result["cells"]))
        budgets = list(dict.fromkeys(c["eps"] for c in result["cells"]))
        found = {(c["attack"], c["eps"]): c for c in result["cells"]}
        clean = result["cells"][0]["clean_similarity"]
        lowered = {key: cell["adversarial_similarity"] for key, cell in found.items()}
        rows = [
            f"| `{name}` | {' | '.join(f'{lowered[name, e]:.3f} ({lowered[name, e] / clean:.2f})' for e in budgets)} |"
            for name in names
        ]
        head = [f"| attack | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
        return "\n".join([*_ran(result, n), f"Clean: {clean:.3f}; in brackets the share of it.", "", *head, *rows])
    lines = [
        *_ran(result, n),
        "| defense | clean | static | adaptive | worst case | recovery | static recovery | verdict | flags |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for t in result["threats"]:
        (cell,) = (c for c in result["cells"] if all(c[k] == t[k] for k in ("defense", "norm", "eps")))
        worst = t["worst_case_similarity"]
        shown = (
            "none" if t["defense"] == "none" else f"`{t['defense']}`",
            *(_cosine(cell[f"{what}_similarity"]) for what in ("clean", "static", "adaptive")),
            f"{worst['value']:.3f} [{worst['low']:.3f}, {worst['high']:.3f}]",
            *(f"{100 * t[k]:.0f} %" if t[k] is not None else "-" for k in ("recovery", "static_recovery")),
            t["verdict"],
            flags(t),
        )
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ran(result: dict[str, Any], n: int) -> list[str]:
    """The command and what it ran on, and how long what was tuned took."""
    tuned = {}
    for c in result["cells"]:
        for name, told in c.get("facts", {}).items():
            if "training_seconds" in told:
                amount = told.get("parameters", told.get("adapter_parameters"))
                tuned[name] = f"`{name}` {told['training_seconds']:.0f} s for {amount:,} parameters"
    return [
        "```",
        *_wrapped(result["command"]),
        "```",
        "",
        f"{n} images, {threads(result)}, {_minutes(result['seconds'])}, torch {result['versions']['torch']}.",
        *([f"Tuning took: {'; '.join(tuned.values())}."] if tuned else []),
        "",
    ]


def _least(cells: list[dict[str, Any]], metric: str) -> str:
    found = [c[metric] for c in cells if c.get(metric) is not None]
    return f"{100 * min(found):.1f}" if found else "-"


def _minutes(seconds: float) -> str:
    rounded = max(1, round(seconds / 60))
    return f"{rounded} minute{'s' * (rounded > 1)}"


def _wrapped(command: str) -> list[str]:
    """The command in lines of a page's width, continued by backslashes."""
    lines, line = [], ""
    for word in re.findall(r"-\w \S+|--\S+ \S+|\S+", command):
        if line and len(line) + len(word) > 108:
            lines.append(f"{line} \\")
            line = " "
        line = f"{line} {word}" if line else word
    return [*lines, line]


NAMES = {"autoattack": "`autoattack`", "aa.standard": "`aa.standard`", "torchattacks": "torchattacks, 100 steps"}


def attacks_page() -> tuple[Path, str]:
    path = HERE / "attacks.md"
    text = filled(path.read_text(), "attacks", attacks_markdown(own(registry())))
    for name, markdown in (("backends", backends_markdown), ("autoattack", autoattack_markdown)):
        text = filled(text, name, markdown(json.loads((RESULTS / f"{name}.json").read_text())))
    return path, text


def measured_page(name: str) -> tuple[Path, str]:
    """A page with what `benchmarks/measured.py` kept of the commands that have a place in it."""
    path = HERE / name
    text = path.read_text()
    for file in sorted((RESULTS / "measured").glob("*.json")):
        if f"<!-- {file.stem}: generated -->" in text:
            text = filled(text, file.stem, measured_markdown(json.loads(file.read_text())))
    return path, text


def defenses_page() -> tuple[Path, str]:
    return measured_page("defenses.md")


def clip_page() -> tuple[Path, str]:
    return costs_page(measured_page("clip.md"))


def costs_page(page: tuple[Path, str]) -> tuple[Path, str]:
    """A page with what benchmarks measured of time and size."""
    path, text = page
    for place, (benchmark, told) in PLACES[path.name].items():
        text = filled(text, place, told(json.loads((RESULTS / f"{benchmark}.json").read_text())))
    return path, text


def matrix_page() -> tuple[Path, str]:
    return costs_page(measured_page("matrix.md"))


def report_page() -> tuple[Path, str]:
    return costs_page(measured_page("report.md"))


def poisoning_page() -> tuple[Path, str]:
    path, text = measured_page("poisoning.md")
    for name in ("poisoning", "poisoning-ablations"):
        if f"<!-- {name}: generated -->" not in text:
            continue
        text = filled(text, name, scenes_markdown(json.loads((RESULTS / f"{name}.json").read_text())))
    return path, filled(text, "poisons", poisons_markdown(own(registry())))


def verdicts_page() -> tuple[Path, str]:
    path = HERE / "verdicts.md"
    faults = json.loads((RESULTS / "broken_defenses.json").read_text())
    return path, filled(path.read_text(), "faults", faults_markdown(faults))


def studies_page() -> tuple[Path, str]:
    """The list of studies: of each page its title and its first sentence."""
    path = HERE / "studies" / "index.md"
    lines = []
    for page in sorted(path.parent.glob("*.md")):
        title, _, rest = page.read_text().partition("\n")
        if page != path:
            first = re.split(r"(?<=[.!?])\s|\n\n", rest.strip(), maxsplit=1)[0]
            lines.append(f"- [{title.lstrip('# ')}]({page.name}): {' '.join(first.split())}")
    return path, filled(path.read_text(), "studies", "\n".join(lines) or "None yet.")


def benchmarks_page() -> tuple[Path, str]:
    path = HERE / "benchmarks.md"
    text = path.read_text()
    for name, markdown in (("bars", bars_markdown), ("machines", machines_markdown), ("libraries", libraries_markdown)):
        text = filled(text, name, markdown(kept()))
    return path, text


def readme_page() -> tuple[Path, str]:
    path = HERE / ".." / "README.md"
    text = filled(path.read_text(), "front", front_markdown(front(), "3/40"))
    return path, filled(text, "libraries", libraries_markdown(kept()))


def data_page() -> tuple[Path, str]:
    path, known = HERE / "data.md", own(registry())
    text = path.read_text()
    for name, markdown in (("datasets", datasets_markdown), ("models", models_markdown), ("metrics", metrics_markdown)):
        text = filled(text, name, markdown(known))
    return path, text


def curve_page() -> tuple[Path, str]:
    return HERE / "curve.svg", svg(front())


PAGES = (attacks_page, benchmarks_page, clip_page, curve_page, data_page, defenses_page, matrix_page, poisoning_page,
         readme_page, report_page, studies_page, verdicts_page, *pages())  # fmt: skip


def main() -> None:
    for path, text in (page() for page in PAGES):
        path.write_text(text)
        sys.stderr.write(f"{path.name} is up to date\n")


if __name__ == "__main__":
    main()
