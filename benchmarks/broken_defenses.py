"""Broken defenses and attacks: what a naive evaluation claims, what a hand-written attack leaves, what advplug says.

    python benchmarks/broken_defenses.py [--images 100] [--attack apgd:steps=20] [--quick] [--output FILE]

Without --attack it runs the standard protocol.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import advplug
import bars
import faults
import kept
from advplug import session
from advplug.artifacts import Artifacts
from advplug.build import Builder
from advplug.contracts import Ball, Batch, Threat, Wrap
from advplug.parse import parse_reference, parse_stack
from advplug.plans import VictimPlan, bind, bind_stack
from advplug.progress import Silent
from advplug.results import RunResult, ThreatRow
from advplug.rng import Stream
from advplug.tables.text import grid
from advplug.victim import Victim

DATASET, MODEL, EPS = "digits:size=16", "cnn", Fraction(1, 10)
DECISIONS = 10
DESCENT = "sound-descent"


@dataclass(frozen=True)
class Row:
    """One fault: accuracies as shares; `flags` and `verdict` are advplug's on the fault, `twin...` on the repair."""

    name: str
    claimed: float
    broken: float
    reported: float
    verdict: str | None
    flags: tuple[str, ...]
    checks: tuple[str, ...]
    twin: float
    twin_verdict: str | None
    twin_flags: tuple[str, ...]

    @property
    def exposed(self) -> bool:
        return bars.exposed(asdict(self))


# --- by hand, without advplug ------------------------------------------------------------------------


def _ascend(
    answer: faults.Net, x: Tensor, y: Tensor, steps: int, draws: int = 1, margin: bool = False
) -> Iterator[Tensor]:
    """Iterates of PGD on the mean loss over `draws` passes; a gradient that is missing or NaN is zero."""
    g, eps = torch.Generator().manual_seed(0), float(EPS)
    at = (x + eps * (2 * torch.rand(x.shape, generator=g) - 1)).clamp(0, 1)
    for _ in range(steps):
        at = at.detach().requires_grad_()
        loss = torch.zeros(())
        for _ in range(draws):
            logits = answer(at)
            if margin:
                other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
                loss = loss + (other - logits.gather(1, y[:, None]).squeeze(1)).sum()
            else:
                loss = loss + functional.cross_entropy(logits, y, reduction="sum")
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, at, allow_unused=True)
        moved = (
            at.detach()
            if gradient is None
            else at.detach() + eps * max(2.5 / steps, 0.125) * gradient.nan_to_num(0).sign()
        )
        at = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
        yield at


def _rate(answer: faults.Net, x: Tensor, y: Tensor, decisions: int) -> Tensor:
    """(B,): how often it is wrong; no answer is a wrong one."""
    with torch.no_grad():
        wrong = [(z.argmax(1) != y) | ~z.isfinite().all(1) for z in (answer(x) for _ in range(decisions))]
    return torch.stack(wrong).float().mean(0)


def claim(answer: faults.Net, x: Tensor, y: Tensor, steps: int) -> float:
    """What its author measures: PGD through the defense as it stands, the last iterate, images without an answer left
    out of the successes."""
    last = list(_ascend(answer, x, y, steps))[-1]
    with torch.no_grad():
        before, after = answer(x), answer(last)
    fooled = (after.argmax(1) != y) & after.isfinite().all(1)
    return float(((before.argmax(1) == y) & ~fooled).float().mean())


def breaks(answer: faults.Net, stand_in: faults.Net, x: Tensor, y: Tensor, steps: int, draws: int) -> float:
    """Accuracy left by PGD through the stand-in, on both losses; of each image's iterates the one counts that the
    defense's own answers are wrong on most often, and where they are drawn, it is asked about anew."""
    decisions = DECISIONS if draws > 1 else 1
    best, rate = x, _rate(answer, x, y, decisions)
    for margin in (False, True):
        for at in _ascend(stand_in, x, y, steps, draws, margin):
            found = _rate(answer, at, y, decisions)
            best = torch.where((found > rate)[:, None, None, None], at, best)
            rate = torch.maximum(rate, found)
    return float(1 - _rate(answer, best, y, 2 * decisions if draws > 1 else 1).mean())


# --- through advplug ---------------------------------------------------------------------------------


def trained(images: int, adapted: str = "") -> tuple[Victim, Batch]:
    """The model before it is defended, and the images it is judged on."""
    known = faults.registry()
    stack = bind_stack(known, parse_stack(f"adapted:to={adapted}" if adapted else "none"))
    dataset, model = bind(known, "dataset", parse_reference(DATASET)), bind(known, "model", parse_reference(MODEL))
    built = Builder(Artifacts(), "cpu", False, Silent()).build(VictimPlan(dataset, model, stack, 0), images)
    return built.victim, built.split.batch(np.arange(len(built.split)))


def evaluate(attacks: list[str], defenses: list[str], images: int) -> RunResult:
    with patch.object(session, "registry", faults.registry):
        return advplug.evaluate(MODEL, attacks, defenses, dataset=DATASET, eps=str(EPS), n=images)


def _told(row: ThreatRow) -> tuple[float, str | None, tuple[str, ...]]:
    assert row.worst_case_accuracy is not None
    return row.worst_case_accuracy.value, row.verdict, tuple(f.name for f in row.flags if f.level != "info")


def defenses(attack: str | None, images: int, steps: int, random: bool) -> Iterator[Row]:
    chosen = [d for d in faults.DEFENSES if random or not d.twin.stochastic]
    names = [d.stack(kind) for d in chosen for kind in ("broken", "sound")]
    result = evaluate([attack] if attack else [], names, images)
    rows = {t.defense: _told(t) for t in result.threats}
    for d in chosen:
        victim, batch = trained(images, d.adapted)
        torch.manual_seed(0)

        def answer(x: Tensor, wrap: Wrap = d.fault, net: faults.Net = victim.module) -> Tensor:
            return wrap.forward(net, x, None)

        def stand_in(x: Tensor, forward: faults.Forward = d.stand_in, net: faults.Net = victim.module) -> Tensor:
            return forward(net, x, None)

        with victim.frozen():
            claimed = claim(answer, batch.x, batch.y, steps)
            broken = breaks(answer, stand_in, batch.x, batch.y, steps, d.twin.draws)
        yield Row(d.name, claimed, broken, *rows[d.stack("broken")], d.checks, *rows[d.stack("sound")])


def attacks(images: int, steps: int) -> Iterator[Row]:
    victim, batch = trained(images)
    result = evaluate([DESCENT], [], images)
    twin = _told(result.threats[0])
    with victim.frozen():
        broken = breaks(victim.module, victim.module, batch.x, batch.y, steps, 1)
    for a in faults.ATTACKS:
        made = a.fault(victim, batch, Threat(Ball("linf", EPS)), Stream(0, "claim"))
        claimed = float(1 - _rate(victim.module, made.x, batch.y, 1).mean())
        fault = _told(evaluate([f"broken-{a.name}"], [], images).threats[0])
        yield Row(a.name, claimed, broken, *fault, a.checks, *twin)


def measure(attack: str | None, images: int, steps: int = 40, random: bool = True) -> list[Row]:
    """Every fault with its twin, without `random` those alone whose twin draws nothing.

    `attack` None is the standard protocol; `steps` are those of the attack by hand.
    """
    return [*defenses(attack, images, steps, random), *attacks(images, steps)]


def render(rows: list[Row]) -> str:
    header = [
        "fault",
        "claimed %",
        "by hand %",
        "reported %",
        "verdict",
        "flags",
        "twin %",
        "twin's verdict",
        "twin's flags",
    ]

    def line(r: Row) -> list[str]:
        shares = [f"{100 * v:.1f}" for v in (r.claimed, r.broken, r.reported)]
        twin = [f"{100 * r.twin:.1f}", str(r.twin_verdict), ", ".join(r.twin_flags) or "-"]
        return [r.name, *shares, str(r.verdict), ", ".join(r.flags) or "-", *twin]

    return grid(f"{MODEL} on {DATASET}, L-inf {EPS}", header, [line(r) for r in rows])


def main() -> int:
    parser = kept.parser(__doc__, "broken_defenses", "16 images, apgd:steps=5, nothing randomised")
    parser.add_argument("--images", type=int, help="default 100")
    parser.add_argument("--attack", help="attack on the defenses; default: the standard protocol")
    given = parser.parse_args()
    images = given.images or (16 if given.quick else 100)
    attack = given.attack or ("apgd:steps=5" if given.quick else None)
    head = kept.header()
    rows = measure(attack, images, 8 if given.quick else 40, random=not given.quick)
    print(render(rows))
    hidden = [r.name for r in rows if not r.exposed]
    print(
        f"\n{len(rows) - len(hidden)} of {len(rows)} faults are exposed"
        + (f"; not: {', '.join(hidden)}" if hidden else "")
    )
    facts = {"dataset": DATASET, "model": MODEL, "eps": str(EPS), "images": images,
             "attack": attack or "standard protocol"}  # fmt: skip
    result = head | facts | {"rows": [asdict(r) for r in rows]}
    return kept.finish("broken_defenses", result, kept.place("broken_defenses", given))


if __name__ == "__main__":
    sys.exit(main())
