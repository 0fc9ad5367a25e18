"""Transfer: images crafted on a surrogate, whatever the attacked victim answers. Each is crafted once a process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from advplug.contracts import AttackCaps, Batch, Crafted, EvasionAttack, Threat
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim

KEPT_BYTES = 512 * 2**20
"""Crafted images kept for the next victim; the oldest set goes first."""


@dataclass
class _Memory:
    """Crafted images by surrogate, attack and threat, then by image and target."""

    sets: OrderedDict[Hashable, dict[tuple[int, int], Tensor]] = field(default_factory=OrderedDict)
    bytes: int = 0

    def of(self, key: Hashable) -> dict[tuple[int, int], Tensor]:
        self.sets.setdefault(key, {})
        self.sets.move_to_end(key)
        return self.sets[key]

    def put(self, key: Hashable, name: tuple[int, int], image: Tensor) -> None:
        """Keeps an image of the set used last, unless that set alone fills the memory."""
        while self.bytes + image.nbytes > KEPT_BYTES and len(self.sets) > 1:
            _, gone = self.sets.popitem(last=False)
            self.bytes -= sum(t.nbytes for t in gone.values())
        if self.bytes + image.nbytes <= KEPT_BYTES:
            self.sets[key][name] = image
            self.bytes += image.nbytes


_MEMORY = _Memory()


@dataclass(frozen=True)
class Transfer:
    """Runs `inner` on `surrogate` and hands in the result; `label` and `caps` are the inner attack's."""

    surrogate: Victim
    inner: EvasionAttack
    label: str
    caps: AttackCaps

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """The attacked victim is asked nothing. Raises UsageError for a norm or goal that the inner attack lacks."""
        self._demand(threat)
        # A smaller budget's end is no start here: an image is crafted for one threat, whoever is judged on it.
        batch = replace(batch, start=None)
        key = (self.surrogate.key, self.label, threat.norm, threat.perturbation.eps, str(threat.goal), rng.seed)
        names = list(zip(batch.index.tolist(), self._targets(batch), strict=True))
        known = _MEMORY.of(key) if self._reusable else {}
        missing = [row for row, name in enumerate(names) if name not in known]
        x = batch.x.clone()
        for row, name in enumerate(names):
            if name in known:
                x[row] = known[name].to(x.device)
        if missing:
            rows = torch.tensor(missing)
            made = self._craft(victim, batch.take(rows), threat, rng)
            x[rows.to(x.device)] = made
            if self._reusable:
                for row, image in zip(missing, made.cpu(), strict=True):
                    _MEMORY.put(key, names[row], image.clone())
        return Crafted(x)

    @property
    def _reusable(self) -> bool:
        """Whether an image is the same whatever was crafted with it or before; unnamed victims cannot be told apart."""
        surrogate = self.surrogate
        shared = self.caps.per_batch or surrogate.stochastic or surrogate.batch_dependent
        return bool(surrogate.key) and not shared

    def _targets(self, batch: Batch) -> list[int]:
        return [-1] * len(batch) if batch.target is None else batch.target.tolist()

    def _demand(self, threat: Threat) -> None:
        goal = str(threat.goal).partition(":")[0]
        if threat.norm not in self.caps.norms:
            known = ", ".join(sorted(self.caps.norms))
            raise UsageError(f"transfer: {self.label} has no {threat.norm} version; it works in {known}")
        if goal not in self.caps.goals:
            raise UsageError(f"transfer: {self.label} cannot run {goal}")

    def _craft(self, victim: Victim, part: Batch, threat: Threat, rng: Stream) -> Tensor:
        surrogate = self.surrogate
        before = surrogate.passes.forward, surrogate.passes.backward
        surrogate.batch_size = victim.batch_size
        # What it draws must not depend on what it was asked before.
        surrogate.reseed("transfer", self.label, threat.norm, threat.eps, threat.goal, int(part.index[0]))
        with surrogate.frozen():
            made = self.inner(surrogate, part, replace(threat, access=self.caps.access), rng)
        if surrogate is not victim:  # the cost is the attack's
            victim.passes.forward += surrogate.passes.forward - before[0]
            victim.passes.backward += surrogate.passes.backward - before[1]
        return made.x.detach()


def forget() -> None:
    """Drops all crafted images."""
    _MEMORY.sets.clear()
    _MEMORY.bytes = 0
