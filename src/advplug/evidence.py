"""What was observed of one cell, image by image; everything that is reported is computed from this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from advplug.stored.columns import packed, unpacked

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Evidence:
    """Per-image facts of one victim under one attack at one budget.

    `n` images, `d` fresh decisions of each (1 for a deterministic victim):
    index, y (n,): position in the dataset and true label; clean (n, d): accepted and right without attack;
    rejected (n, d): not answered without attack, where the victim may refuse to answer;
    attacked (n,): right on the clean image, in any decision, and, for targeted goals, not the target already;
    adaptive, static, bare (n, d): the attack's success, by where it was crafted (DESIGN: through the wraps'
    declared gradients, on the undefended baseline, on the defended weights without wraps); rounded (n, d):
    the adaptive images after rounding to 8 bits; linf, l2 (n,): distances of the adaptive images; found (n,):
    the smallest successful change of a minimum-norm attack in the threat's norm, infinite where there is none; for
    images that were not attacked 0, or NaN under a targeted goal;
    steps, zero_gradient, nonfinite, queries (n,) and any_iterate, final_iterate, black_box (n,): the attack's own
    trace, where it gave one (black_box: the number of the budget in its series, from 1, at which a part without
    gradients broke the image, else 0); violations: images outside the perturbation set, by at most `worst_violation`.

    Of victims whose columns are texts also: own (n, C), which of the texts are the image's; right (n, C), in a
    gallery, those and all that read the same; cosine, cosine_adaptive, cosine_static, cosine_bare, cosine_rounded
    (n, C), of each image and text, means over the decisions; minimised: 1 where the attack lowered similarities, so
    that its successes are by the way.

    capped: 1 where the attack's failure makes no right answer, under targeted goals and for victims that may refuse.
    """

    index: Array
    y: Array
    clean: Array
    attacked: Array
    adaptive: Array
    rejected: Array | None = None
    static: Array | None = None
    bare: Array | None = None
    rounded: Array | None = None
    linf: Array | None = None
    l2: Array | None = None
    found: Array | None = None
    steps: Array | None = None
    zero_gradient: Array | None = None
    nonfinite: Array | None = None
    queries: Array | None = None
    any_iterate: Array | None = None
    final_iterate: Array | None = None
    black_box: Array | None = None
    own: Array | None = None
    right: Array | None = None
    cosine: Array | None = None
    cosine_adaptive: Array | None = None
    cosine_static: Array | None = None
    cosine_bare: Array | None = None
    cosine_rounded: Array | None = None
    minimised: int = 0
    capped: int = 0
    violations: int = 0
    worst_violation: float = 0.0

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def draws(self) -> int:
        return int(self.clean.shape[1])

    def robust(self, success: Array) -> Array:
        """(n, d): right on the clean image and not broken."""
        kept = np.where(self.attacked[:, None], ~success.astype(bool), self.clean)
        if not self.capped:
            return kept
        # Of answers that are drawn an image keeps no more than were right without attack.
        more = kept.mean(axis=1) > self.clean.mean(axis=1)
        return np.where(more[:, None], self.clean, kept)

    def robust_by_origin(self) -> list[Array]:
        """One (n, d) array for each place the attack was crafted at."""
        return [self.robust(s) for s in (self.adaptive, self.static, self.bare) if s is not None]

    def similarity(self, cosine: Array | None) -> Array | None:
        """(n,): the mean cosine of each image and its own texts."""
        if cosine is None or self.own is None:
            return None
        return np.asarray(np.where(self.own, cosine, 0).sum(axis=1) / self.own.sum(axis=1))

    def similarity_by_origin(self) -> list[Array]:
        """One (n,) array for each place the attack was crafted at."""
        found = map(self.similarity, (self.cosine_adaptive, self.cosine_static, self.cosine_bare))
        return [s for s in found if s is not None]

    def rows(self, picked: Array) -> Evidence:
        """The images at `picked`."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: v[picked] for k, v in columns.items() if isinstance(v, np.ndarray)}
        return replace(self, **chosen)

    def to_bytes(self) -> bytes:
        return packed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Evidence:
        return unpacked(cls, data)


def ranges(index: Array) -> str:
    """Positions as text, runs joined: `0-4,7,9-12`."""
    ordered = np.sort(index)
    cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(ordered, cuts) if len(run)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def worst_case(robust: Sequence[Array]) -> Array:
    """The per-image worst of several (n, d) arrays, as (n, d').

    For a randomised victim the worst is chosen on half of the draws and reported on the other half, so
    that picking the unluckiest draw does not count as an attack. Few draws choose badly: where one attack on all
    images leaves less than the chosen ones, that attack is the worst case.
    """
    stacked = np.stack([np.asarray(r, dtype=bool) for r in robust])
    if stacked.shape[2] == 1 or len(stacked) == 1:
        return np.asarray(stacked.min(axis=0) if stacked.shape[2] == 1 else stacked[0])
    choice = stacked[:, :, 0::2].mean(axis=2).argmin(axis=0)
    chosen = stacked[choice, np.arange(stacked.shape[1])][:, 1::2]
    return np.asarray(min([chosen, *stacked[:, :, 1::2]], key=lambda bits: float(bits.mean())))


def joined(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several chunks of images as one."""
    columns: dict[str, Any] = {}
    for name in Evidence.__dataclass_fields__:
        values = [getattr(p, name) for p in parts]
        if name == "violations":
            columns[name] = sum(values)
        elif name in ("worst_violation", "minimised", "capped"):
            columns[name] = max(values)
        elif any(v is None for v in values):
            columns[name] = _padded(values, parts)
        else:
            columns[name] = np.concatenate(values)
    return Evidence(**columns)


def _padded(values: Sequence[Array | None], parts: Sequence[Evidence]) -> Array | None:
    """A trace is missing where a chunk had nothing to attack; zeros stand for it there."""
    known = next((v for v in values if v is not None), None)
    if known is None:
        return None
    return np.concatenate(
        [np.zeros((p.n, *known.shape[1:]), known.dtype) if v is None else v for v, p in zip(values, parts, strict=True)]
    )
