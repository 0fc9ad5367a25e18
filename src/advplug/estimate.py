"""Rates with Wilson intervals, paired differences, exact paired tests. Pure numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054
"""The standard normal's 97.5 % point."""

Bits = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over `n` images; `spread` is the standard deviation over repeated
    decisions of a stochastic victim, None for a deterministic one."""

    value: float
    low: float | None
    high: float | None
    n: int
    spread: float | None = None


def rate(successes: float, n: int, spread: float | None = None) -> Estimate | None:
    """A proportion with its Wilson score interval (Wilson 1927); None where there is nothing to count.

    `successes` may be fractional: the expected count of a stochastic victim.
    """
    if n <= 0:
        return None
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= n else min(1.0, centre + half)
    return Estimate(p, low, high, n, spread)


def mean(values: Sequence[float] | Bits) -> Estimate | None:
    """The sample mean with Student's 95 % interval; None for no values, no interval for a single one."""
    found = np.asarray(values, dtype=np.float64)
    n = len(found)
    if n == 0:
        return None
    centre = float(found.mean())
    if n == 1:
        return Estimate(centre, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * float(found.std(ddof=1)) / math.sqrt(n)
    return Estimate(centre, centre - half, centre + half, n)


def median(values: Sequence[float] | Bits) -> Estimate | None:
    """The sample median with its distribution-free 95 % interval from order statistics; None for no values.

    Below 6 values no such interval exists: the bounds are None.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        return None
    low = high = None
    rank = _median_rank(n)
    if rank >= 1:
        low, high = float(ordered[rank - 1]), float(ordered[n - rank])
    return Estimate(float(np.median(ordered)), low, high, n)


def _median_rank(n: int) -> int:
    """The largest r with P(X < r) <= 2.5 % for X ~ Binomial(n, 1/2)."""
    cumulative, rank = 0.0, 0
    for k in range(n // 2 + 1):
        cumulative += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if cumulative > 0.025:
            break
        rank = k + 1
    return rank


def paired_difference(ours: Bits, theirs: Bits) -> Estimate | None:
    """Mean of `ours - theirs` over the same images, with the Bonett-Price adjusted 95 % interval (2012).

    Both are (n,) in [0, 1]. Fractional entries (stochastic victims) count as expected discordances.
    """
    n = len(ours)
    if n == 0:
        return None
    gain = float(np.sum(ours * (1 - theirs)))
    loss = float(np.sum(theirs * (1 - ours)))
    up, down = (gain + 1) / (n + 2), (loss + 1) / (n + 2)
    half = Z95 * math.sqrt(max(up + down - (up - down) ** 2, 0.0) / (n + 2))
    middle = up - down
    return Estimate((gain - loss) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


def paired_p_value(only_first: int, only_second: int) -> float:
    """One-sided exact McNemar test: how likely `only_first` or more of the discordant pairs fall to the first
    when either side is as likely (sign test on discordant pairs)."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    # The shorter tail, term by term: thousands of pairs cost milliseconds, exactly.
    upper = 2 * only_first > n
    term, tail = 1, 0
    for k in range(n - only_first + 1 if upper else only_first):
        tail += term
        term = term * (n - k) // (k + 1)
    return float((tail if upper else 2**n - tail) / 2**n)
