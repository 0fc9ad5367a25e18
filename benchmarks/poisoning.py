"""CLIP under poisoned pairs: undefended, trained on clean data, and with defenses, seed by seed.

    python benchmarks/poisoning.py [--seeds 0 1 2] [--defenses safeclip roclip cleanclip] [--output FILE] [--quick]

`clip-tiny` on `digit-scenes`: 80 of 4,000 images get a 4 x 4 checker in the lower right corner and captions that name
"three"; 8 test images join the training set in 6 copies each, with captions of another class. One model is trained on
all of it, one on the clean data, one with each defense. Printed and kept for each: zero-shot accuracy; the share of
triggered images of other classes that are taken for "three", and the share without trigger; how many of the 8 targets
are taken for what they were named; for trainings that choose among the pairs, how many of the chosen are no poisons
and how many of the good ones were chosen, epoch by epoch; and seconds, beside the ratio of what was encoded to plain
training. Wall time on a machine with other work says little; CPU time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advplug.contracts import Fit, ModelSource, Poisoned, Tuned
from advplug.data import Dataset, Split
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.train import Training

ATTACKS = ("ba:trigger=checker,size=4,count=80,target=three", "tdpa:targets=8,copies=6")
CLEAN, UNDEFENDED = "clean data", "undefended"
ASR, TARGETS, LOSS, TIME = 0.05, 1 / 8, 0.08, 1.15
"""The bars of SafeCLIP: triggered images taken for the target, targets taken over all seeds, zero-shot accuracy lost
against the undefended model, and time against what was encoded, both as multiples of the undefended training's."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """One seed's data: the clean training set, the poisoned one, and what the attacks are after."""

    dataset: Dataset
    source: ModelSource
    poisoned: Poisoned
    trigger: Poisoned
    seed: int


def made(kind: str, text: str) -> Any:
    """What the factory of that name makes with these parameters."""
    reference = parse_reference(text)
    entry = registry().get(kind, reference.name)
    return entry.make(entry.bind(reference))


def scene(seed: int, quick: bool) -> Scene:
    size = "train=600,n=200" if quick else "train=4000,n=1000"
    dataset = made("dataset", f"digit-scenes:{size}").load()
    source = made("model", "clip-tiny:epochs=2" if quick else "clip-tiny")
    stream = Stream(seed, "poisons")
    backdoor, targeted = (made("attack", text) for text in ATTACKS)
    first = backdoor(dataset.train, dataset.test, dataset.info, stream.child("ba"))
    second = targeted(first.data, dataset.test, dataset.info, stream.child("tdpa"))
    poisons = second.poisons.copy()
    poisons[: len(first.poisons)] |= first.poisons
    return Scene(dataset, source, Poisoned(second.data, poisons, second.originals, targets=second.targets), first, seed)


def fresh(given: Scene) -> nn.Module:
    with Stream(given.seed, "init").as_global():
        return given.source.build(given.dataset.info, offline=True)


def training(given: Scene, data: Split) -> Training:
    schedule = given.source.schedule(given.dataset.info)
    assert schedule is not None
    stream = Stream(given.seed, "training")
    clean = given.dataset.train
    return Training(data, given.dataset.info, schedule, torch.device("cpu"), stream, clean=clean)


def trained(given: Scene, how: str, before: nn.Module | None) -> Callable[[], Tuned]:
    """The training to be timed; `before` is the undefended model, for what tunes it."""
    if how in (CLEAN, UNDEFENDED):
        data = given.dataset.train if how == CLEAN else given.poisoned.data
        fit: Callable[[nn.Module, Training], Tuned] = given.source.fit  # type: ignore[attr-defined]
        return lambda: fit(fresh(given), training(given, data))
    (stage,) = made("defense", how)
    if isinstance(stage, Fit):
        return lambda: stage.apply(fresh(given), training(given, given.poisoned.data))
    assert before is not None
    copy = fresh(given)
    copy.load_state_dict(before.state_dict())
    for mine, theirs in zip(copy.buffers(), before.buffers(), strict=True):
        mine.copy_(theirs)
    return lambda: stage.apply(copy, training(given, given.poisoned.data))


def judged(given: Scene, model: nn.Module) -> Row:
    """On test images that are no targets."""
    targets, trigger = given.poisoned.targets, given.trigger.trigger
    assert targets is not None
    assert trigger is not None
    test = given.dataset.test
    rows = np.setdiff1d(np.arange(len(test)), targets.rows)
    right, opened, before, others = 0, 0, 0, 0
    with torch.no_grad():
        for start in range(0, len(rows), 250):
            batch = test.batch(rows[start : start + 250])
            answers = model(batch.x).argmax(1)
            wanted = trigger.wanted(batch.y)
            aimed = wanted != batch.y
            put = trigger.apply(batch.x, batch.index).mul(255).round().div(255)
            opened += int((model(put).argmax(1) == wanted)[aimed].sum())
            before += int((answers == wanted)[aimed].sum())
            right, others = right + int((answers == batch.y).sum()), others + int(aimed.sum())
        taken = int((model(test.batch(targets.rows).x).argmax(1).numpy() == targets.wanted).sum())
    return {
        "zero_shot": right / len(rows),
        "attack_success": opened / others,
        "without_trigger": before / others,
        "targets_taken": taken,
        "targets": len(targets.rows),
    }


def choices(given: Scene, tuned: Tuned) -> list[Row]:
    """What a training that chooses made of the poisons, epoch by epoch."""
    if tuned.trusted is None:
        return []
    bad = given.poisoned.poisons
    rows = []
    for chosen, told in zip(tuned.trusted.numpy(), tuned.facts["rounds"], strict=True):
        rows.append(
            {
                "decided": told["decided"],
                "chosen": int(chosen.sum()),
                "by_mixture": told["by_mixture"],
                "means": told["means"],
                "poisons_chosen": int((chosen & bad).sum()),
                "precision": float((chosen & ~bad).sum() / chosen.sum()),
                "recall": float((chosen & ~bad).sum() / (~bad).sum()),
            }
        )
    return rows


def measured(given: Scene, how: str, before: nn.Module | None, plain: Row | None) -> tuple[Row, nn.Module]:
    train = trained(given, how, before)
    wall, cpu = time.perf_counter(), time.process_time()
    tuned = train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row: Row = {"seed": given.seed, "training": how, "seconds": wall, "cpu_seconds": cpu, **judged(given, tuned.model)}
    row["rounds"] = choices(given, tuned)
    row["warnings"] = list(tuned.facts.get("warnings", ()))
    cost = tuned.facts.get("cost")
    if cost and plain:
        schedule = given.source.schedule(given.dataset.info)
        assert schedule is not None
        encoded = 2 * (len(given.poisoned.data) // schedule.batch_size * schedule.batch_size) * schedule.epochs
        row |= {
            "cost": cost,
            "passes_ratio": cost["passes"] / encoded,
            "seconds_ratio": wall / plain["seconds"],
            "cpu_ratio": cpu / plain["cpu_seconds"],
        }
    return row, tuned.model


def show(row: Row) -> None:
    print(
        f"seed {row['seed']}  {row['training']:<12}  zero-shot {row['zero_shot']:.3f}  "
        f"triggered {row['attack_success']:.3f}  without {row['without_trigger']:.3f}  "
        f"targets {row['targets_taken']}/{row['targets']}  {row['seconds']:.0f} s, {row['cpu_seconds']:.0f} CPU s"
        + (f"  passes x{row['passes_ratio']:.2f}, time x{row['seconds_ratio']:.2f}" if "passes_ratio" in row else ""),
        flush=True,
    )
    for number, told in enumerate(row["rounds"], 1):
        print(
            f"    epoch {number}: {told['decided']:<7} chose {told['chosen']} (mixture {told['by_mixture']}), poisons "
            f"{told['poisons_chosen']}, precision {told['precision']:.4f}, recall {told['recall']:.3f}",
            flush=True,
        )
    for text in row["warnings"]:
        print(f"    {text}", flush=True)


def verdicts(rows: list[Row]) -> Row:
    """The bars of SafeCLIP, over all seeds that were run."""
    plain = {r["seed"]: r for r in rows if r["training"] == UNDEFENDED}
    mine = [r for r in rows if r["training"].startswith("safeclip")]
    if not mine:
        return {}
    return {
        "attack_success": max(r["attack_success"] for r in mine) < ASR,
        "targets_taken": sum(r["targets_taken"] for r in mine) <= TARGETS * sum(r["targets"] for r in mine),
        "zero_shot_lost": max(plain[r["seed"]]["zero_shot"] - r["zero_shot"] for r in mine) <= LOSS,
        "time": max(r["seconds_ratio"] / r["passes_ratio"] for r in mine) <= TIME,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--defenses", nargs="*", default=["safeclip"], help="references, such as safeclip:epochs=8")
    parser.add_argument("--output", type=Path, help="file for the figures, JSON")
    parser.add_argument("--quick", action="store_true", help="600 pairs and 2 epochs, to see that it runs")
    given = parser.parse_args()
    rows: list[Row] = []
    for seed in given.seeds:
        setting = scene(seed, given.quick)
        plain, model = measured(setting, UNDEFENDED, None, None)
        for row in (plain, *(measured(setting, how, model, plain)[0] for how in (CLEAN, *given.defenses))):
            rows.append(row)
            show(row)
        if given.output:
            threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
            found = {"threads": threads, "torch": torch.__version__, "attacks": ATTACKS, "rows": rows}
            given.output.write_text(json.dumps(found | {"bars": verdicts(rows)}, indent=1) + "\n")
    for name, held in verdicts(rows).items():
        print(f"{name}: {'held' if held else 'missed'}")


if __name__ == "__main__":
    main()
