"""CLIP under poisoned pairs: undefended, trained on clean data, and with defenses, seed by seed.

    python benchmarks/poisoning.py [--seeds 0 1 2] [--defenses safeclip roclip cleanclip] [--output FILE] [--quick]
                                    [--cache DIR]
    python benchmarks/poisoning.py --join FILE ... --output FILE

Seeds can be run side by side, each with a file of its own, and joined.

`clip-tiny` on `digit-scenes`: 80 of 4,000 images get a 4 x 4 checker in the lower right corner and captions that name
"three"; 8 test images join the training set in 6 copies each, with captions of another class. Every model is trained
anew and judged by advplug. Printed and kept for each: zero-shot accuracy, the share of triggered images of other
classes that are taken for "three", how many of the targets are taken for what they were named, and the clean model's
figures beside; for trainings that choose among the pairs, what they chose, round by round; and seconds, beside the
ratio of what was encoded to plain training. Wall time on a machine with other work says little.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import advplug
import kept
from advplug.contracts import DatasetInfo, Schedule
from advplug.parse import parse_reference
from advplug.plans import bind
from advplug.registry import registry

ATTACK = "together:attacks=(ba:trigger=checker,size=4,count=80,target=three+tdpa:targets=8,copies=6)"
DEFENSES = ["safeclip", "roclip", "cleanclip"]

Row = dict[str, Any]


def measured(seed: int, defenses: list[str], quick: bool, cache: Path | None = None) -> list[Row]:
    """The undefended model's row, then those of the defenses. What comes from the `cache` has no seconds."""
    model = "clip-tiny:epochs=2" if quick else "clip-tiny"
    # Scenes of their own for each seed; the settings were found on those of seed 0.
    dataset = f"digit-scenes:seed={seed + 1}," + ("train=600,n=200" if quick else "train=4000,n=1000")
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["ADVPLUG_CACHE"] = str(cache or fresh)
        found = advplug.evaluate(model, ATTACK, defenses, dataset=dataset, n=192 if quick else 992, seed=seed)
    plain = _plain_passes(model, dataset, found.poisonings[0].training_images or 0)
    rows = [_row(made.status, made.reason, made, plain) for made in found.poisonings]
    for row in rows[1:]:
        if row["seconds"] and rows[0]["seconds"]:
            row["seconds_ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


def _plain_passes(model: str, dataset: str, images: int) -> int:
    """Images and texts that the model's own training encodes."""
    known = registry()
    info: DatasetInfo = bind(known, "dataset", parse_reference(dataset)).value.info()
    schedule: Schedule = bind(known, "model", parse_reference(model)).value.schedule(info)
    return 2 * (images // schedule.batch_size * schedule.batch_size) * schedule.epochs


def _row(status: str, reason: str | None, made: Any, plain: int) -> Row:
    if status != "ok":
        raise SystemExit(f"{made.defense}: {reason}")
    told = made.provenance["facts"].get(made.defense, {})
    spent = made.seconds.defend or made.seconds.train
    row: Row = {
        "seed": made.seed,
        "defense": made.defense,
        "verdict": made.verdict,
        "flags": [flag.name for flag in made.flags],
        "seconds": spent,
        "rounds": told.get("rounds", []),
        "warnings": list(told.get("warnings", ())),
        **{name: {"value": m.value, "low": m.low, "high": m.high, "n": m.n} for name, m in made.metrics.items() if m},
    }
    if "cost" in told:
        row |= {"cost": told["cost"], "passes_ratio": told["cost"]["passes"] / plain}
    return row


def show(row: Row) -> None:
    shares = {name: row[name]["value"] for name in row if name.endswith(("accuracy", "rate"))}
    taken = f"{shares['poison_success_rate'] * row['poison_success_rate']['n']:.0f}/{row['poison_success_rate']['n']}"
    cost = ""
    if "passes_ratio" in row:
        cost = f"  passes x{row['passes_ratio']:.2f}"
        cost += f", time x{row['seconds_ratio']:.2f}" if "seconds_ratio" in row else ""
        cost += f", waiting for data {row['cost']['data_share']:.1%}"
    print(
        f"seed {row['seed']}  {row['defense']:<12}  zero-shot {shares['clean_accuracy']:.3f}  "
        f"triggered {shares['attack_success_rate']:.3f}  clean model {shares['clean_model_success_rate']:.3f}  "
        f"targets {taken}  {row['seconds']:.0f} s{cost}  {row['verdict']}",
        flush=True,
    )
    for number, told in enumerate(row["rounds"], 1):
        print(
            f"    round {number}: {told['decided']:<7} trusted {told['trusted']} "
            f"(mixture {told['by_mixture']}), poisons "
            f"{told['poisons']}, precision {told['precision']:.4f}, recall {told['recall']:.3f}",
            flush=True,
        )
    for text in row["warnings"]:
        print(f"    {text}", flush=True)


def joined(files: list[Path], defenses: list[str]) -> list[Row]:
    """The rows of files of figures, each seed and defense once, the first time; `defenses` leaves out all others."""
    rows: dict[tuple[int, str], Row] = {}
    for row in (row for file in files for row in json.loads(file.read_text())["rows"]):
        if row["defense"] in ("none", *defenses):
            rows.setdefault((row["seed"], row["defense"]), row)
    order = {name: i for i, name in enumerate(("none", *defenses))}
    return sorted(rows.values(), key=lambda row: (row["seed"], order[row["defense"]]))


def header(joined: list[Path] | None) -> Row:
    """When and on what it is measured: files that are joined keep what the first of them says."""
    if not joined:
        return kept.header()
    first = json.loads(joined[0].read_text())
    return {name: value for name, value in first.items() if name not in ("attack", "rows", "bars")}


def main() -> int:
    parser = kept.parser(__doc__, "poisoning", "one seed, SafeCLIP, 600 pairs and 2 epochs")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2")
    parser.add_argument("--defenses", nargs="*", help=f"such as safeclip:epochs=8; default {' '.join(DEFENSES)}")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of trained weights to use and add to")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="run nothing, and join what files hold")
    given = parser.parse_args()
    seeds = given.seeds or ([0] if given.quick else [0, 1, 2])
    defenses = given.defenses if given.defenses is not None else DEFENSES[: 1 if given.quick else None]
    place = kept.place("poisoning", given)
    rows: list[Row] = []
    result = header(given.join) | {"attack": ATTACK, "rows": rows}
    parts = (
        [joined(given.join, defenses)]
        if given.join
        else (measured(seed, defenses, given.quick, given.cache) for seed in seeds)
    )
    for part in parts:
        for row in part:
            rows.append(row)
            show(row)
        kept.write(result, place)
    return kept.finish("poisoning", result, place)


if __name__ == "__main__":
    sys.exit(main())
