"""The native AutoAttack beside the official code and torchattacks' at the published settings; Square's overhead.

    python benchmarks/autoattack.py [--images 500] [--only cifar10|mnist|overhead] [--settings small] [--quick]
                                     [--output FILE]

With ADVPLUG_DATA set: the ResNet-20 on CIFAR-10 at 1/255 and a CNN, adversarially trained on MNIST, at 0.1.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine_models as models
import kept
from advplug.allocator import keep_freed_memory
from advplug.attacks.square import Square
from advplug.builtin.autoattack import autoattack
from advplug.contracts import Batch
from advplug.rng import Stream
from advplug.victim import Victim
from engine import linf, right

PUBLISHED = {"steps": 100, "n_targets": 9, "queries": 5000}
SMALL = {"steps": 20, "n_targets": 3, "queries": 200}
MIDDLE = {"steps": 50, "n_targets": 3, "queries": 500}
"""Of the overhead, which is measured three times."""
BATCH = 128


def ours(net: nn.Module, batch: Batch, eps: float, settings: dict[str, int]) -> Tensor:
    attack = autoattack(**settings)  # type: ignore[arg-type]
    x = attack(Victim(net, 10, batch_size=BATCH), batch, linf(Fraction(eps)), Stream(0, "benchmark")).x
    print(f"    parts: {attack.broken}")
    return x


def official(net: nn.Module, batch: Batch, eps: float, settings: dict[str, int]) -> Tensor:
    from pyautoattack import AutoAttack

    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
    made = AutoAttack(net, norm="Linf", eps=eps, seed=0, version="custom", attacks=attacks, device="cpu")
    made.verbose = False
    made.apgd.n_restarts = made.fab.n_restarts = made.apgd_targeted.n_restarts = 1
    made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = settings["steps"]
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = settings["n_targets"]
    made.square.n_queries = settings["queries"]
    trace = sys.gettrace()
    x: Tensor = made.run_standard_evaluation(batch.x, batch.y, batch_size=BATCH)[0]
    sys.settrace(trace)  # its check of the model switches tracing off
    return x


def torchattacks_(net: nn.Module, batch: Batch, eps: float, settings: dict[str, int]) -> Tensor:
    import torchattacks

    made = torchattacks.AutoAttack(net, eps=eps, seed=0)
    for part in made._autoattack.attacks:
        part.steps = settings["steps"]
        if hasattr(part, "n_queries"):
            part.n_queries = settings["queries"]
        if hasattr(part, "target_class") or hasattr(part, "n_target_classes"):
            part.n_target_classes = settings["n_targets"]
    parts = zip(batch.x.split(BATCH), batch.y.split(BATCH), strict=True)
    return torch.cat([made(x, y) for x, y in parts])


def compare(what: str, net: nn.Module, batch: Batch, eps: float, settings: dict[str, int]) -> dict[str, object]:
    """Seconds and robust accuracy of each, one after the other."""
    print(f"\n{what}, L-inf {eps:.4g}, {len(batch)} images, {settings}")
    runs: dict[str, Callable[..., Tensor]] = {
        "autoattack": ours, "aa.standard": official, "torchattacks": torchattacks_,
    }  # fmt: skip
    rows = []
    for name, run in runs.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = run(net, batch, eps, settings)
        seconds = time.perf_counter() - began
        standing = int(right(net, x, batch.y).sum())
        rows.append({"attack": name, "seconds": seconds, "standing": standing})
        print(f"  {name:14s} {seconds:8.1f} s   robust {100 * standing / len(batch):6.2f} %")
    return {"what": what, "eps": eps, "images": len(batch), "settings": settings, "rows": rows}


def mnist() -> tuple[nn.Module, Batch]:
    """A small CNN with PGD training at 0.2 for a few epochs, from the user's cache after the first time."""
    from advplug.builtin.datasets import mnist as source

    data = source(Path(os.environ["ADVPLUG_DATA"]) / "mnist").load(offline=True)
    x, y = _arrays(data.train, 6000)
    net = models.cached_net("mnist-adversarial", lambda: _mnist_net(), lambda n: _train(n, x, y))
    test_x, test_y = _arrays(data.test, 1000)
    return net, Batch(test_x, test_y, torch.arange(len(test_y)))


def _arrays(split: object, n: int) -> tuple[Tensor, Tensor]:
    batch = split.batch(np.arange(n), torch.device("cpu"))  # type: ignore[attr-defined]
    return batch.x, batch.y


def _mnist_net() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10))


def _train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    from advplug.builtin.gradient import pgd

    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    attack = pgd(steps=5, precision="float32", keep_going=True)
    for epoch in range(6):
        for rows in torch.randperm(len(x), generator=order).split(128):
            some = Batch(x[rows], y[rows], rows)
            hard = attack(Victim(net, 10), some, linf(Fraction(3, 20)), Stream(epoch, "train")).x
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(hard), y[rows]).backward()
            optimizer.step()
    net.eval()


def overhead(net: nn.Module, batch: Batch) -> dict[str, float]:
    """The share of time outside the model's passes: of the cascade at 1/255, and of Square alone. In float32, since
    what stands in for the model in faster ways is not timed."""
    from engine import outside

    out = {}
    for name, attack in (
        ("autoattack", autoattack(**MIDDLE, precision="float32")),  # type: ignore[arg-type]
        ("square", Square(300)),
    ):
        shares = [outside(net, batch, Fraction(1, 255), attack) for _ in range(3)]
        out[name] = statistics.median(shares)
        print(f"  overhead of {name}: {100 * out[name]:.2f} % of the time")
    return out


def main() -> int:
    parser = kept.parser(__doc__, "autoattack", "8 images, small settings, no overhead")
    parser.add_argument("--images", type=int, help="default 500")
    parser.add_argument("--only", choices=["cifar10", "mnist", "overhead"])
    parser.add_argument("--settings", choices=["published", "small"], help="default published")
    options = parser.parse_args()
    images = options.images or (8 if options.quick else 500)
    small = options.settings == "small" or (options.quick and options.settings is None)
    settings = SMALL if small else PUBLISHED
    keep_freed_memory()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    net = models.victim_net()
    batch = models.batch(models.images(), 0, images)
    batch = batch.take(right(net, batch.x, batch.y))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    result: dict[str, object] = kept.header(torch.get_num_threads())
    place = kept.place("autoattack", options)
    if options.only in (None, "cifar10"):
        result["cifar10"] = compare(models.name(), net, batch, 1 / 255, settings)
        kept.write(result, place)
    if options.only in (None, "mnist") and models.folder():
        digits, hard = mnist()
        hard = hard.take(torch.arange(images))
        hard = hard.take(right(digits, hard.x, hard.y))
        result["mnist"] = compare("CNN trained adversarially on MNIST", digits, hard, 0.1, settings)
        kept.write(result, place)
    if options.only == "overhead" or not (options.only or options.quick):
        result["overhead"] = overhead(net, batch.take(torch.arange(min(256, len(batch)))))
    return kept.finish("autoattack", result, place)


if __name__ == "__main__":
    sys.exit(main())
