"""How fast and how strong the gradient engine is, beside torchattacks and ART.

    python benchmarks/engine.py [--only pgd|trained|curve|overhead|memory] [--quick] [--output FILE]

Uses the CIFAR-10 images and the ResNet-20 weights in the folder named by ADVPLUG_DATA; without it, the
embedded digits and a small net. Every variant gets the same images, eps, alpha, steps and random starts
and the same batch size; runs are interleaved and their medians compared. Robust accuracy is counted here,
in float32, for all variants alike. Wall time is what the bars are about; CPU time stands beside it because
it suffers less from other work on the machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

import engine_models as models
import kept
from advplug.allocator import keep_freed_memory, release_freed_memory
from advplug.attacks import precision
from advplug.builtin import gradient
from advplug.contracts import Ball, Batch, EvasionAttack, Threat
from advplug.rng import Stream
from advplug.victim import Victim

STEPS, BATCH, CHUNK = 20, 128, 512
CURVE = tuple(Fraction(k) / 255 for k in ("0.25", "0.5", "1", "2", "3", "4", "6", "8"))
Craft = Callable[[], Tensor]
Row = dict[str, object]


def linf(eps: Fraction) -> Threat:
    return Threat(Ball("linf", eps))


def victim_of(net: nn.Module) -> Victim:
    return Victim(net, 10, batch_size=BATCH)


def ours(net: nn.Module, batch: Batch, eps: Fraction, alpha: Fraction, **options: object) -> Craft:
    attack = gradient.pgd(steps=STEPS, alpha=alpha, **options)  # type: ignore[arg-type]
    return lambda: attack(victim_of(net), batch, linf(eps), Stream(0, "benchmark")).x


def torchattacks_pgd(net: nn.Module, batch: Batch, eps: Fraction, alpha: Fraction) -> Craft:
    import torchattacks

    attack = torchattacks.PGD(net, eps=float(eps), alpha=float(alpha), steps=STEPS, random_start=True)

    def craft() -> Tensor:
        torch.manual_seed(0)
        pieces = zip(batch.x.split(BATCH), batch.y.split(BATCH), strict=True)
        return torch.cat([attack(x, y) for x, y in pieces])

    return craft


def art_pgd(net: nn.Module, batch: Batch, eps: Fraction, alpha: Fraction) -> Craft:
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(batch.x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        wrapped, eps=float(eps), eps_step=float(alpha), max_iter=STEPS, num_random_init=1, batch_size=BATCH,
        verbose=False,
    )  # fmt: skip

    def craft() -> Tensor:
        np.random.seed(0)
        return torch.from_numpy(attack.generate(batch.x.numpy(), batch.y.numpy()))

    return craft


@torch.no_grad()
def right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([net(a).argmax(1) == b for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)])


def compare(title: str, net: nn.Module, batch: Batch, eps: Fraction, repeats: int, off: bool) -> list[Row]:
    """Times every variant `repeats` times, in turn, and counts robust accuracy."""
    alpha = eps / 4
    makers: dict[str, Callable[[], Craft]] = {
        "advplug float32": lambda: ours(net, batch, eps, alpha, precision="float32"),
        "advplug auto": lambda: ours(net, batch, eps, alpha, precision="auto"),
        "torchattacks": lambda: torchattacks_pgd(net, batch, eps, alpha),
        "art": lambda: art_pgd(net, batch, eps, alpha),
    }
    if off:
        makers["advplug float32, active set off"] = lambda: ours(
            net, batch, eps, alpha, precision="float32", keep_going=True
        )
    crafts: dict[str, Craft] = {}
    for name, make in makers.items():
        try:
            crafts[name] = make()
        except ImportError as error:
            print(f"  {name} is left out: {error}", file=sys.stderr)
    wall: dict[str, list[float]] = {name: [] for name in crafts}
    cpu: dict[str, list[float]] = {name: [] for name in crafts}
    accuracy: dict[str, float] = {}
    for turn in range(repeats):
        order = list(crafts) if turn % 2 == 0 else list(reversed(crafts))
        for name in order:
            w, c = time.perf_counter(), time.process_time()
            x = crafts[name]()
            wall[name].append(time.perf_counter() - w)
            cpu[name].append(time.process_time() - c)
            accuracy[name] = right(net, x.detach(), batch.y).float().mean().item()
    base = "torchattacks" if "torchattacks" in crafts else next(iter(crafts))
    rows: list[Row] = []
    for name in crafts:
        seconds, work = statistics.median(wall[name]), statistics.median(cpu[name])
        row: Row = {
            "what": title, "eps": str(eps), "variant": name, "seconds": seconds, "cpu": work,
            "speedup": statistics.median(wall[base]) / seconds,
            "cpu speedup": statistics.median(cpu[base]) / work,
            "robust accuracy": accuracy[name], "all seconds": wall[name],
        }  # fmt: skip
        rows.append(row)
        print(
            f"  {name:34s} {seconds:8.2f} s  x{row['speedup']:6.2f}   cpu x{row['cpu speedup']:6.2f}"
            f"   robust {100 * accuracy[name]:6.2f} %"
        )
    return rows


def curve(net: nn.Module, batch: Batch) -> Row:
    """Passes and accuracies of a security curve: full steps, active set, and a warm-started sweep."""
    out: Row = {"budgets": [str(e) for e in CURVE]}
    clean = right(net, batch.x, batch.y)

    def counted(attack: object, part: Batch, eps: Fraction, victim: Victim) -> Tensor:
        return attack(victim, part, linf(eps), Stream(0, "curve")).x  # type: ignore[operator, no-any-return]

    for name, keep_going in (("full", True), ("active", False)):
        attack = gradient.pgd(steps=STEPS, precision="float32", keep_going=keep_going)
        victim, points = victim_of(net), []
        for eps in CURVE:
            x = counted(attack, batch.take(clean), eps, victim)
            points.append(int(right(net, x, batch.y[clean]).sum()))
        out[name] = {"passes": victim.passes.forward + victim.passes.backward, "robust": points}
    attack = gradient.pgd(steps=STEPS, precision="float32")
    victim, points, alive, last = victim_of(net), [], clean.clone(), None
    for eps in CURVE:
        rows = alive.nonzero().flatten()
        if len(rows):
            part = batch.take(rows)
            x = counted(attack, part if last is None else replace(part, start=last[rows]), eps, victim)
            alive[rows] = right(net, x, part.y)
            last = batch.x.clone() if last is None else last
            last[rows] = x
        points.append(int(alive.sum()))
    passes = victim.passes.forward + victim.passes.backward
    out["sweep"] = {"passes": passes, "robust": points}
    for name in ("full", "active"):
        there = out[name]
        ratio = passes / there["passes"]  # type: ignore[index]
        worst = max(a - b for a, b in zip(points, there["robust"], strict=True))  # type: ignore[index]
        out[f"passes over {name}"], out[f"images above {name}"] = ratio, worst
        print(f"  sweep takes {ratio:.3f} of the passes of eight {name} runs; at most {worst} images above")
    print("  robust images:", {k: out[k]["robust"] for k in ("full", "active", "sweep")})  # type: ignore[index]
    return out


def overhead(net: nn.Module, batch: Batch, repeats: int) -> Row:
    """The share of time spent outside the forward and backward passes, at 8/255 and at 1/255."""
    out: Row = {}
    for eps in (Fraction(8, 255), Fraction(1, 255)):
        shares = []
        for _ in range(repeats):
            attack = gradient.pgd(steps=STEPS, alpha=eps / 4, precision="float32")
            shares.append(outside(net, batch, eps, attack))
        out[str(eps)] = statistics.median(shares)
        print(f"  overhead at {eps}: {100 * statistics.median(shares):.2f} % of the time")
    return out


def outside(net: nn.Module, batch: Batch, eps: Fraction, attack: EvasionAttack) -> float:
    """The share of an attack's time spent outside the model's forward and backward passes."""
    inside = [0.0]

    def timed(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kw: object) -> object:
            began = time.perf_counter()
            try:
                return call(*args, **kw)
            finally:
                inside[0] += time.perf_counter() - began

        return run

    real, forward = torch.autograd.grad, net.forward
    net.forward = timed(forward)  # type: ignore[method-assign, assignment]
    torch.autograd.grad = timed(real)  # type: ignore[assignment]
    try:
        began = time.perf_counter()
        attack(victim_of(net), batch, linf(eps), Stream(0, "overhead"))
        return 1 - inside[0] / (time.perf_counter() - began)
    finally:
        torch.autograd.grad = real
        net.forward = forward  # type: ignore[method-assign]


def memory() -> Row:
    """Peak resident memory of a process that attacks n images in chunks, as an evaluation does."""
    few, many = 500, 5000
    peaks = {}
    for n in (few, many):
        command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[n] = float(done.stdout.split()[-1])
    print(f"  peak memory: {peaks[few]:.0f} MB at {few}, {peaks[many]:.0f} MB at {many} images")
    return {"MB at 500": peaks[few], "MB at 5000": peaks[many], "difference": peaks[many] - peaks[few]}


def memory_of(n: int) -> None:
    net, split = models.victim_net(), models.images()
    attack = gradient.pgd(steps=2, precision="float32")
    broken = 0
    for start in range(0, n, CHUNK):
        batch = models.batch(split, start, min(start + CHUNK, n))
        out = attack(victim_of(net), batch, linf(Fraction(8, 255)), Stream(0, "memory"))
        broken += int((~right(net, out.x, batch.y)).sum())
        release_freed_memory()  # as an evaluation does
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    parser = kept.parser(__doc__, "engine", "32 images, one repeat, no memory")
    parser.add_argument("--images", type=int, help="how many test images (default 512)")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", choices=["pgd", "trained", "curve", "overhead", "memory"])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as every evaluation does; the other libraries profit alike
    if options.memory_of:
        memory_of(options.memory_of)
        return 0
    repeats = options.repeats or (1 if options.quick else 3)
    n = options.images or (32 if options.quick else 512)
    batch = models.batch(models.images(), 0, n)
    net = models.victim_net()
    wanted = [options.only] if options.only else ["pgd", "trained", "curve", "overhead", "memory"]
    if options.quick and not options.only:
        wanted.remove("memory")
    result: dict[str, object] = kept.header(torch.get_num_threads()) | {
        "model": models.name(), "images": n, "batch": BATCH, "steps": STEPS, "repeats": repeats,
        "clean accuracy": right(net, batch.x, batch.y).float().mean().item(),
    }  # fmt: skip
    print(f"{models.name()}, {n} images, PGD-{STEPS}, batch {BATCH}, {repeats} repeats")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    place = kept.place("engine", options)
    if "pgd" in wanted:
        rows: list[Row] = []
        for eps in (Fraction(8, 255), Fraction(1, 255)):
            print(f" standard net, eps {eps}")
            rows += compare("standard", net, batch, eps, repeats, off=True)
        result["pgd"], result["ways timed"] = rows, precision.timings(net)
        kept.write(result, place)
    if "trained" in wanted:
        print(" adversarially trained net, eps 8/255")
        hard = models.trained_net()
        result["trained"] = compare("adversarially trained", hard, batch, Fraction(8, 255), repeats, off=True)
        kept.write(result, place)
    if "curve" in wanted:
        print(" security curve")
        result["curve"] = curve(net, batch)
        kept.write(result, place)
    if "overhead" in wanted:
        print(" overhead")
        result["overhead"] = overhead(net, batch, repeats)
        kept.write(result, place)
    if "memory" in wanted:
        print(" memory")
        result["memory"] = memory()
    return kept.finish("engine", result, place)


if __name__ == "__main__":
    sys.exit(main())
