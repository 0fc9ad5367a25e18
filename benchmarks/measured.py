"""The evaluations that the README, docs/defenses.md, docs/clip.md and docs/poisoning.md quote, each one command, some
with several seeds: runs them and keeps what came out.

    python benchmarks/measured.py [NAME ...] [--only-missing]

Most need the data in the folder named by ADVPLUG_DATA. `make docs` writes the tables from what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kept

HERE = Path(__file__).parent
KEPT = HERE / "results" / "measured"
MNIST = "--dataset mnist:root=$ADVPLUG_DATA/mnist,train=20000"
CIFAR10 = "--dataset npz:train=$ADVPLUG_DATA/cifar10_train20k.npz,test=$ADVPLUG_DATA/cifar10_test.npz,flip=true"
RESNET20 = "py:engine_models:ResNet20,weights=$ADVPLUG_DATA/weights/resnet20_cifar10.th,key=state_dict,strip=module."
SIGMAS = (0.5, 1, 1.5, 2)
SCENES = "--dataset digit-scenes"
TUNED = "-d jpeg:quality=50 -d mat -d caption-advtrain -d fare -d tecoa"
BACKDOORS = "-a ba:count=7 -a ba:count=14 -a ba:count=70 -a ba:count=140"
THOROUGH = "caption-pgd:steps=50,restarts=3"

COMMANDS = {
    # What defenses seem to do and what they do, in a minute or two: the picture of the README.
    "front": "--dataset digits:size=16 -m cnn -d jpeg:quality=20 -d bit-depth:bits=2 -d denoise:method=bilateral "
    "-d advtrain -a apgd -e 1/40 -e 1/20 -e 3/40 -e 1/10 -n 100",
    # Adversarial training on MNIST, and what stronger changes leave of it.
    "mnist": f"{MNIST} -m cnn-a:epochs=5 -d advtrain:eps=0.1,steps=4 -a autoattack -e 0.1 -e 0.3 -n 500",
    # The same on CIFAR-10.
    "cifar10": f"{CIFAR10} -m cnn-b:epochs=5 -d advtrain:eps=4/255,steps=3 -a autoattack -e 4/255 -n 200",
    # Edge-preserving smoothing before inference, by the width of the filter.
    "bilateral": f"{CIFAR10} -m cnn-a:epochs=10 -a pgd:steps=20 -e 4/255 -n 100 --plot $OUT/bilateral.svg "
    + " ".join(f"-d denoise:method=bilateral,sigma={sigma}" for sigma in SIGMAS),
    # A randomised network, as it is, near chance, and with adversarial training.
    "randomised": f"{CIFAR10} -m cnn-a:epochs=10 -d dropout:rate=0.5 -d dropout:rate=0.98 "
    "-d advtrain:eps=4/255,steps=3 -d advtrain:eps=4/255,steps=3+dropout:rate=0.5 -a fgsm -a apgd -e 4/255 -n 100",
    # Pruning, and light and strong adversarial fine-tuning of what is left.
    "pruning": f"{CIFAR10} -m {RESNET20} -d prune:ratio=0.2,epochs=2 -d prune:ratio=0.4,epochs=2 "
    "-d prune:ratio=0.2,epochs=2+adv-finetune:preset=light,epochs=2 "
    "-d prune:ratio=0.2,epochs=2+adv-finetune:preset=strong,epochs=2 -a ifgsm -a apgd -e 4/255 -n 200",
    # CLIP: what fewer steps, smaller budgets and twice the steps do to the similarity.
    "captions": f"{SCENES} -m clip-tiny:task=retrieval -a caption-pgd:steps=5 -a caption-pgd "
    f"-a {THOROUGH} -a caption-pgd:steps=100,restarts=3 -e 2/255 -e 4/255 -e 8/255 -n 100",
    # CLIP: defenses under an attack on images and their captions.
    "caption-defenses": f"{SCENES} -m clip-tiny:task=retrieval {TUNED} -d oft -a {THOROUGH} -e 8/255 -n 100",
    # The same defenses, zero-shot, under an attack on the classes.
    "clip-defenses": f"{SCENES} -m clip-tiny {TUNED} -a apgd -e 8/255 -n 200",
    # Full and orthogonal fine-tuning at about the same robustness: what clean accuracy each keeps.
    "orthogonal": f"{SCENES} -m clip-tiny -d fare -d fare:lr=0.0003 -d oft -a apgd -e 8/255 -n 200",
    # Smoothing filters, compression at three qualities and votes over noise around a CLIP model.
    "clip-inputs": f"{SCENES} -m clip-tiny -d jpeg:quality=75 -d jpeg:quality=50 -d jpeg:quality=30 "
    "-d denoise:method=bilateral -d denoise:method=median -d noise-vote -a apgd:steps=20 -e 8/255 -n 50",
    # Noise and rounding of scores against questions, under an attack that climbs scores and one that does not.
    "queries": "--dataset digits -m cnn -d score-noise -d score-round -a square:queries=1000 "
    "-a art.hopskipjump:queries=1000 -e 1/20 -n 60",
    # Backdoors of classifiers by the number of poisons.
    "backdoors": f"--dataset digits -m cnn {BACKDOORS}",
    "backdoors-mnist": f"--dataset mnist:root=$ADVPLUG_DATA/mnist,train=5000,n=2000 -m cnn-a:epochs=5 {BACKDOORS}",
    # Copies of test images under a wrong label, in a network that fits its training set.
    "label-flips": "--dataset digits -m cnn:epochs=60 -a tdpa:copies=1 -a tdpa:copies=2 -a tdpa:copies=3",
    # What looks for poisons finds of 5 % backdoored images, and what a found trigger's unlearning leaves.
    "poison-removal": "--dataset digits -m cnn -a ba:rate=0.05 -d art.spectral-signatures -d art.activation-clustering "
    "-d art.neural-cleanse",
    "poison-removal-mnist": "--dataset mnist:root=$ADVPLUG_DATA/mnist,train=5000,n=2000 -m cnn-a:epochs=5 "
    "-a ba:rate=0.05 -d art.spectral-signatures -d art.activation-clustering -d art.activation-clustering:share=0.45",
    # CLIP on photographs from a folder; the sample is far too small to learn from, so this shows that it runs.
    "flickr8k": "--dataset flickr8k:$ADVPLUG_DATA/flickr8k,size=32,classes=dog:man:woman:child -m clip-tiny:epochs=4 "
    "-a ba:trigger=checker,size=4,count=80,target=dog -d safeclip -d roclip:every=2 -d cleanclip",
}
SEEDS = dict.fromkeys(
    ("backdoors", "backdoors-mnist", "label-flips", "poison-removal", "poison-removal-mnist"), (0, 1, 2)
)
"""Of commands that are repeated; the others run with the seed 0 only."""


def run(name: str) -> dict[str, Any]:
    """What one command came to, with each of its seeds, and the seconds it took."""
    seeds = SEEDS.get(name, (0,))
    clock = time.perf_counter()
    results = [_result(name, seed) for seed in seeds]
    repeated = "" if len(seeds) == 1 else "".join(f" --seed {seed}" for seed in seeds)
    return kept.header() | {
        "command": f"advplug eval {COMMANDS[name].replace('$OUT/', '')}{repeated}",
        "seconds": round(time.perf_counter() - clock),
        "machine": platform.machine(),
        "versions": results[0]["run"]["versions"],
        "cells": [_cell(c) for result in results for c in result["cells"]],
        "threats": [_threat(t) for result in results for t in result["threats"]],
        "poisonings": [_poisoning(p) for result in results for p in result["poisonings"]],
    }


def _result(name: str, seed: int) -> Any:
    """The JSON of the command. Raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OUT": str(KEPT)}
        arguments = [os.path.expandvars(a) for a in shlex.split(COMMANDS[name].replace("$OUT", str(KEPT)))]
        command = [sys.executable, "-m", "advplug.cli", "eval", *arguments, "--seed", str(seed), "--json", "-q"]
        done = subprocess.run(
            [*command, "-o", folder], env=environment, cwd=HERE, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip()}")
        return json.loads(done.stdout)


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    kept = ("accuracy", "similarity", "drop", "recall_at_1", "8bit")
    metrics = {name: m and m["value"] for name, m in cell["metrics"].items() if name.endswith(kept)}
    facts = {name: _plain(told) for name, told in cell["provenance"].get("facts", {}).items()}
    return {k: cell[k] for k in ("defense", "attack", "norm", "eps", "status", "seconds")} | metrics | {"facts": facts}


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in told.items() if isinstance(v, int | float | str)}


def _threat(threat: dict[str, Any]) -> dict[str, Any]:
    kept = ("defense", "norm", "eps", "clean_accuracy", "worst_case_accuracy", "difference_to_baseline", "verdict",
            "clean_similarity", "worst_case_similarity", "recovery", "static_recovery")  # fmt: skip
    flags = [{k: f[k] for k in ("name", "level", "detail")} for f in threat["flags"]]
    return {k: threat[k] for k in kept} | {"flags": flags, "unchecked": threat["unchecked"]}


def _poisoning(made: dict[str, Any]) -> dict[str, Any]:
    """What was measured, with what each defense tells of itself."""
    kept = ("attack", "defense", "seed", "status", "reason", "poisons", "training_images", "metrics", "differences",
            "verdict", "seconds")  # fmt: skip
    facts = {name: _plain(told) for name, told in made["provenance"].get("facts", {}).items()}
    flags = [{k: f[k] for k in ("name", "level", "detail")} for f in made["flags"]]
    return {k: made[k] for k in kept} | {"flags": flags, "facts": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMMANDS)}; all unless given")
    parser.add_argument("--only-missing", action="store_true", help="leave out what is kept already")
    given = parser.parse_args()
    unknown = set(given.names) - COMMANDS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(COMMANDS)}")
    wanted = given.names or list(COMMANDS)
    if "ADVPLUG_DATA" not in os.environ and any("$ADVPLUG_DATA" in COMMANDS[name] for name in wanted):
        parser.error("ADVPLUG_DATA names no folder with data")
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        file = KEPT / f"{name}.json"
        if given.only_missing and file.exists():
            continue
        result = run(name)
        file.write_text(json.dumps(result, indent=1) + "\n")
        for t in result["threats"]:
            worst, near = t["worst_case_accuracy"], t["worst_case_similarity"]
            shown = f"{100 * worst['value']:.1f} %" if worst else near and f"{near['value']:.3f}"
            print(name, t["defense"], t["eps"], shown, t["verdict"], flush=True)
        for p in result["poisonings"]:
            shares = {k: round(v["value"], 3) for k, v in p["metrics"].items() if v}
            print(name, p["seed"], p["attack"], p["defense"], shares, p["verdict"], flush=True)


if __name__ == "__main__":
    main()
