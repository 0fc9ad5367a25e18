"""A cascade of attacks: each part gets the images that all parts before it left standing.

AutoAttack (Croce and Hein 2020, arXiv 2003.01690) is such a cascade of four.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advplug.contracts import Batch, Crafted, EvasionAttack, Goal, Threat, Trace
from advplug.rng import Stream
from advplug.victim import Victim, decide_padded

log = logging.getLogger(__name__)


def transferable(attack: EvasionAttack) -> EvasionAttack:
    """The attack for images that are to fool another model than the one they are crafted on, where it has one: a
    method `transferable()`."""
    made: Callable[[], EvasionAttack] | None = getattr(attack, "transferable", None)
    return attack if made is None else made()


@dataclass(frozen=True)
class Part:
    """One attack of a cascade, under the name that reports use; `gradient` says whether it follows one."""

    name: str
    attack: EvasionAttack
    gradient: bool = True


@dataclass(frozen=True)
class Cascade:
    """Runs the parts that `choose(victim, goal)` gives, in order, each on what is left; an `EvasionAttack`.

    After each part the deployed system is asked which images are broken; one that answers at random breaks on an
    image by a majority of draws, and the image goes on as long as one of them is right, since every draw counts in
    its accuracy. An image that no part breaks comes back as the part left it that came furthest. How many images each
    part broke is logged (level INFO) and, for the latest call, kept in `broken`.
    """

    choose: Callable[[Victim, Goal], tuple[Part, ...]]
    broken: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Images of the batch's shape, with the traces of all parts together.

        Raises UsageError where a targeted threat comes without targets.
        """
        target = batch.aim(threat.goal)
        books = _Books.blank(batch)
        self.broken.clear()
        parts = self.choose(victim, threat.goal)
        if not all(part.gradient for part in parts):
            books.bits["black_box"] = torch.zeros(len(batch), dtype=torch.bool)
        for part in parts:
            rows = (books.rate < 1).nonzero().flatten()
            if not len(rows):
                break
            some = batch.take(rows)
            made = part.attack(victim, some, threat, rng.child(part.name))
            rate = _rate(victim, made.x, some.y, None if target is None else some.target)
            fresh = (rate > 0.5) & (books.rate[rows] <= 0.5)
            books.enter(rows, made, rate)
            if not part.gradient:
                books.bits["black_box"][rows] |= fresh
            self.broken[part.name] = (int(fresh.sum()), len(rows))
            log.info("%s broke %d of %d images", part.name, *self.broken[part.name])
        return Crafted(books.x, books.trace())

    def transferable(self) -> EvasionAttack:
        """The first part that follows gradients, going on after success."""
        return _First(self)


@dataclass(frozen=True)
class _First:
    """The first gradient part of a cascade, for images that are to fool other models."""

    cascade: Cascade

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        parts = self.cascade.choose(victim, threat.goal)
        part = next((p for p in parts if p.gradient), parts[0])
        return transferable(part.attack)(victim, batch, threat, rng.child(part.name))


@dataclass
class _Books:
    """What is known of each image: the best change, its success rate, and counts; all but `x` on the CPU."""

    x: Tensor
    rate: Tensor
    bits: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def blank(cls, batch: Batch) -> _Books:
        return cls(batch.x.clone(), torch.full((len(batch),), -1.0), {}, {})

    def enter(self, rows: Tensor, made: Crafted, rate: Tensor) -> None:
        """A part's images at `rows` with their success rates: those that succeed more often than before stay."""
        better = rate > self.rate[rows]
        self.x[rows[better].to(self.x.device)] = made.x[better.to(made.x.device)]
        self.rate[rows] = torch.maximum(self.rate[rows], rate)
        if made.trace is None:
            return
        for name in ("any_iterate", "final_iterate"):
            value = getattr(made.trace, name)
            if value is not None:
                self.bits.setdefault(name, torch.zeros(len(self.rate), dtype=torch.bool))[rows] |= value
        for name in ("steps", "zero_gradient", "nonfinite", "queries"):
            value = getattr(made.trace, name)
            if value is not None:
                self.counts.setdefault(name, torch.zeros(len(self.rate), dtype=torch.long))[rows] += value

    def trace(self) -> Trace:
        return Trace(**self.bits, **self.counts)


def _rate(victim: Victim, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """How often (B,) the deployed system is fooled; a randomised one is asked as often as it is judged, or attacked."""
    draws = max(victim.draws, victim.decisions) if victim.stochastic else 1
    hits = torch.zeros(len(x))
    with victim.frozen():
        for _ in range(draws):
            hits += decide_padded(victim, x).fooled(y, target).cpu()
    return hits / draws
