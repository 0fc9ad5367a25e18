"""Several attacks on one training set, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from advplug.contracts import DatasetInfo, PoisonAttack, PoisonCaps, Poisoned
from advplug.data import ArrayImages, Split
from advplug.errors import UsageError
from advplug.parse import Stack
from advplug.registry import Entry, registry
from advplug.rng import Stream

Found = tuple[Entry, dict[str, Any], PoisonCaps]


def found(attacks: Stack) -> list[Found]:
    """The attacks with their checked parameters and capabilities. Raises UsageError for what cannot be combined."""
    if len(attacks) < 2:
        raise UsageError(f"together takes two attacks or more, as (ba:count=80+tdpa), got '{attacks}'")
    known = []
    for reference in attacks:
        entry = registry().get("attack", reference.name)
        if not isinstance(entry.spec.caps, PoisonCaps) or entry.name == "together":
            raise UsageError(f"together combines attacks on training data, such as ba and tdpa, not {entry.name}")
        params = entry.bind(reference)
        if entry.needs(params):
            raise UsageError(f"together cannot hand a model to {entry.name}; run that one by itself")
        caps = entry.spec.caps_of(params)
        assert isinstance(caps, PoisonCaps)
        known.append((entry, params, caps))
    return known


@dataclass(frozen=True)
class Together:
    """Each attack works on what the one before it left. There may be one trigger and one choice of targets."""

    attacks: tuple[tuple[str, PoisonAttack], ...]

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned:
        """Raises UsageError where two of them have a trigger, or targets."""
        made: list[Poisoned] = []
        facts: dict[str, Any] = {}
        for number, (label, attack) in enumerate(self.attacks):
            made.append(attack(made[-1].data if made else data, test, info, rng.child(number)))
            facts[label] = dict(made[-1].facts)
        for what in ("trigger", "targets"):
            if sum(getattr(m, what) is not None for m in made) > 1:
                raise UsageError(f"together: {' and '.join(label for label, _ in self.attacks)} each bring {what}")
        final = made[-1].data
        poisoned = np.unique(np.concatenate([m.data.index[m.poisons] for m in made]))
        poisons = np.isin(final.index, poisoned)
        return Poisoned(
            final,
            poisons,
            _originals(made, final.index[poisons]),
            next((m.trigger for m in made if m.trigger is not None), None),
            next((m.targets for m in made if m.targets is not None), None),
            facts,
        )


def _originals(made: list[Poisoned], index: np.ndarray[Any, Any]) -> Split:
    """The images at these positions as they were before the first attack that touched them."""
    earliest: dict[int, tuple[Split, int]] = {}
    for m in made:
        for row, position in enumerate(m.data.index[m.poisons].tolist()):
            earliest.setdefault(position, (m.originals, row))
    kept = [earliest[position] for position in index.tolist()]
    texts = [None if split.captions is None else split.captions[row] for split, row in kept]
    captions = tuple(t for t in texts if t is not None)
    return Split(
        ArrayImages(np.concatenate([split.batch(np.array([row])).x.numpy() for split, row in kept])),
        np.array([split.labels[row] for split, row in kept]),
        np.array([split.index[row] for split, row in kept]),
        captions if len(captions) == len(kept) else None,
    )


def caps(bound: Mapping[str, Any]) -> PoisonCaps:
    """What all of them are for."""
    known = [c for _, _, c in found(bound["attacks"])]
    modalities = frozenset.intersection(*(c.modalities for c in known))
    if not modalities:
        raise UsageError("together: no kind of model is attacked by all of these")
    return PoisonCaps(modalities, all(c.clean_label for c in known), max(c.min_classes for c in known))
