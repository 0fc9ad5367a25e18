"""The same attack through every backend that has it: robust accuracy, distance, passes, time, disagreements.

    python benchmarks/backends.py [--images 40] [--only PGD-20] [--quick] [--output FILE]

ResNet-20 on CIFAR-10 where ADVPLUG_DATA holds them, otherwise a small net on the digits. advplug decides every image,
whoever made it. An image on which a backend disagrees with the first one of its group is counted in `more` (only this
backend breaks it) or `fewer` (only the first does).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

import engine_models as models
import kept
from advplug.allocator import keep_freed_memory
from advplug.contracts import AttackCaps, Ball, Batch, MinimumNorm, Threat
from advplug.errors import AdvplugError
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream
from advplug.victim import Victim


@dataclass(frozen=True)
class Group:
    """One attack: its threat and the backends' references, the one to compare with first. `images` caps the count."""

    name: str
    norm: str
    eps: Fraction
    attacks: tuple[str, ...]
    images: int = 1000


GROUPS = (
    Group("FGSM", "linf", Fraction(2, 255), ("fgsm", "ta.fgsm", "art.fgm")),
    Group("PGD-20", "linf", Fraction(1, 255), ("pgd", "ta.pgd:steps=20", "art.pgd", "adv.pgd:steps=20,step=0.125")),
    Group("APGD-CE", "linf", Fraction(1, 255),
          ("apgd", "aa.apgd-ce", "adv.apgd:loss=ce", "ta.apgd", "art.apgd")),
    Group("DeepFool", "l2", Fraction(1, 5), ("deepfool", "adv.deepfool:steps=50", "art.deepfool", "ta.deepfool")),
    Group("CW", "l2", Fraction(1, 5),
          ("adv.cw-l2:steps=100", "art.cw-l2:search_steps=5", "ta.cw:steps=100"), images=4),
    Group("Square", "linf", Fraction(2, 255),
          ("square:queries=1000", "aa.square:queries=1000", "ta.square:queries=1000,resc_schedule=false",
           "art.square:queries=1000"), images=16),
    Group("AutoAttack", "linf", Fraction(1, 255),
          ("autoattack:queries=1000", "aa.standard:queries=1000", "ta.autoattack",
           "art.autoattack:restarts=1,square_steps=1000"), images=16),
)  # fmt: skip


WARM_UP = ("fgsm", "ta.fgsm", "art.fgm", "aa.apgd-ce:steps=5", "adv.pgd:steps=1")
"""One short attack of each backend: importing a library is not what is timed."""


def measure(reference: str, group: Group, net: nn.Module, batch: Batch) -> tuple[dict[str, object], Tensor]:
    """The figures of one backend, and which images (B,) it breaks within the budget."""
    entry = registry().get("attack", parse_reference(reference).name)
    caps = entry.spec.caps
    assert isinstance(caps, AttackCaps)
    attack = entry.make(entry.bind(parse_reference(reference)))
    ball = Ball(group.norm, group.eps)
    allowed = MinimumNorm(group.norm, group.eps) if caps.minimum_norm else ball
    victim = Victim(net, 10, stream=Stream(0, "victim"))
    began = time.perf_counter()
    made = attack(victim, batch, Threat(allowed, access=caps.access), Stream(0, "backends"))
    seconds = time.perf_counter() - began
    passes = victim.passes.forward, victim.passes.backward
    fooled = victim.decide(made.x).label != batch.y
    size = ball.measure(batch.x, made.x)
    broken = fooled & ball.check(batch.x, made.x)
    found = torch.where(fooled, size, torch.inf)
    row = {
        "attack": reference, "robust accuracy": 1 - broken.float().mean().item(),
        "median distance": found.median().item() if caps.minimum_norm else None,
        "forward an image": passes[0] / len(batch), "backward an image": passes[1] / len(batch), "seconds": seconds,
    }  # fmt: skip
    return row, broken


def compare(group: Group, net: nn.Module, batch: Batch) -> dict[str, object]:
    """All backends of one group on the same images."""
    n = min(len(batch), group.images)
    batch = batch.take(torch.arange(n))
    print(f"\n{group.name}, {group.norm} {group.eps}, {n} images that are right without attack")
    print(f"  {'attack':52s} {'robust %':>8s} {'median':>8s} {'forward':>8s} {'backward':>8s} {'s':>7s}  more fewer")
    rows: list[dict[str, object]] = []
    first: Tensor | None = None
    for reference in group.attacks:
        try:
            row, broken = measure(reference, group, net, batch)
        except (AdvplugError, ImportError) as error:
            print(f"  {reference:52s} {error}")
            rows.append({"attack": reference, "failed": str(error)})
            continue
        first = broken if first is None else first
        row |= {"more": int((broken & ~first).sum()), "fewer": int((first & ~broken).sum())}
        rows.append(row)
        middle = "" if row["median distance"] is None else f"{row['median distance']:.4f}"
        print(
            f"  {reference:52s} {100 * row['robust accuracy']:8.1f} {middle:>8s} {row['forward an image']:8.1f} "  # type: ignore[operator]
            f"{row['backward an image']:8.1f} {row['seconds']:7.1f}  {row['more']:4d} {row['fewer']:5d}"
        )
    return {"group": group.name, "norm": group.norm, "eps": str(group.eps), "images": n, "rows": rows}


def main() -> int:
    parser = kept.parser(__doc__, "backends", "4 images, FGSM, PGD-20 and APGD-CE")
    parser.add_argument("--images", type=int, help="how many that are right without attack (default 40)")
    parser.add_argument("--only", choices=[g.name for g in GROUPS])
    options = parser.parse_args()
    images = options.images or (4 if options.quick else 40)
    chosen = [g for g in GROUPS if options.only in (None, g.name)][: 3 if options.quick else None]
    keep_freed_memory()
    net = models.victim_net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    batch = models.batch(models.images(), 0, 2 * images + 20)
    with torch.no_grad():
        right = (net(batch.x).argmax(1) == batch.y).nonzero().flatten()[:images]
    batch = batch.take(right)
    print(f"{models.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for reference in WARM_UP:
        measure(reference, GROUPS[0], net, batch.take(torch.arange(2)))
    groups: list[dict[str, object]] = []
    result = kept.header(torch.get_num_threads()) | {"model": models.name(), "groups": groups}
    place = kept.place("backends", options)
    for group in chosen:
        groups.append(compare(group, net, batch))
        kept.write(result, place)
    return kept.finish("backends", result, place)


if __name__ == "__main__":
    sys.exit(main())
