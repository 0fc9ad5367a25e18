"""How much a run may spend, and what it does first where that is not enough for all. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advplug.contracts import Strength
from advplug.errors import UsageError

if TYPE_CHECKING:
    from advplug.matrix import Sweep

_UNITS = {"h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True)
class Allowance:
    """Seconds of wall time, and images sent through models forward and backward, by attacks, decisions, audits and
    certificates; None: as many as it takes. It is looked at between sweeps, so the last one may go beyond it."""

    seconds: float | None = None
    passes: int | None = None

    @property
    def limited(self) -> bool:
        return self.seconds is not None or self.passes is not None

    def used_up(self, seconds: float, passes: int) -> bool:
        """Whether a run that has spent so much has to stop."""
        out_of_time = self.seconds is not None and seconds >= self.seconds
        return out_of_time or (self.passes is not None and passes >= self.passes)


UNLIMITED = Allowance()


def parse_duration(text: str) -> float:
    """`30m`, `90s`, `1h30m` or `2h`, in seconds. Raises UsageError."""
    found = _DURATION.fullmatch("".join(text.split()).lower())
    parts = [float(part) if part else 0.0 for part in found.groups()] if found else []
    seconds = sum(n * unit for n, unit in zip(parts, _UNITS.values(), strict=False))
    if not seconds:
        raise UsageError(f"--budget takes a time such as 30m, 90s or 1h30m, got '{text}'")
    return seconds


def parse_passes(text: str) -> int:
    """`1e6`, `250000` or `250_000`. Raises UsageError."""
    try:
        passes = float(text)
    except ValueError:
        passes = 0.0
    if not 1 <= passes < 2**63:
        raise UsageError(f"--max-passes takes a number of images such as 1e6, got '{text}'")
    return int(passes)


def informative(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The sweeps in the order in which they tell most for what they cost.

    In rounds: the first attack of every victim, undefended models first, then the second of every victim, and so on;
    further seeds come after all that. A victim's attacks that iterate come first, the cheapest of them before the
    others, then those of one step and floors such as noise, which add little once an iterating one has been run.
    """
    from advplug.costs.forecast import cost_of

    seeds = list(dict.fromkeys(s.victim.seed for s in sweeps))
    by_victim: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        by_victim.setdefault(sweep.victim.key, []).append(sweep)

    def worth(sweep: Sweep) -> tuple[bool, int]:
        return sweep.attack.caps.strength < Strength.ITERATIVE, cost_of(sweep).passes

    place = {s.key: n for own in by_victim.values() for n, s in enumerate(sorted(own, key=worth))}

    def turn(sweep: Sweep) -> tuple[int, int, bool]:
        # Images crafted on the undefended model are judged on the others, so it comes first.
        base = place.get(sweep.baseline.key, 0) if sweep.baseline else 0
        return seeds.index(sweep.victim.seed), max(place[sweep.key], base), bool(sweep.victim.defense)

    return sorted(sweeps, key=turn)
