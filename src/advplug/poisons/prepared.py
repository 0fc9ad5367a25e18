"""The training set of a victim on its way to the model: poisoned, sifted, and compared with what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from advplug.contracts import DatasetInfo, PoisonAttack, Poisoned, Sifted, Trigger
from advplug.data import Dataset, Split
from advplug.errors import AdvplugError, CellFailure
from advplug.evidence import Array
from advplug.plans import Bound
from advplug.rng import Stream
from advplug.victim import Victim

_LOOKED_AT = 64
"""Poisons whose pixels are checked."""


@dataclass(frozen=True)
class Prepared:
    """What a model is trained on, which of its rows (N,) bool are poisons, and what the data stages told."""

    data: Split
    poisons: Array
    facts: Mapping[str, Any] = field(default_factory=dict)


def poison(bound: Bound, dataset: Dataset, seed: int, needs: Mapping[str, Victim]) -> Poisoned:
    """The training set of `dataset` under the attack, made with the victims that it needs.

    Raises UsageError where the attack refuses, CellFailure where it raises otherwise or returns what cannot be.
    """
    return poisoned_by(bound.make(**needs), dataset, Stream(seed, f"poison/{bound.recipe['name']}"), bound.label)


def poisoned_by(attack: PoisonAttack, dataset: Dataset, stream: Stream, label: str) -> Poisoned:
    """As `poison`, for an attack that is made already."""
    try:
        made = attack(dataset.train, dataset.test, dataset.info, stream)
    except AdvplugError:
        raise
    except Exception as error:  # a plugin's
        raise CellFailure(f"{label} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    wrong = _misfit(made, dataset.test, dataset.info)
    if wrong is not None:
        raise CellFailure(f"{label} returned what is no poisoned training set: {wrong}")
    return made


def _misfit(made: Poisoned, test: Split, info: DatasetInfo) -> str | None:
    """What is wrong with a poisoned set."""
    poisons, classes = np.asarray(made.poisons), len(info.classes)
    if poisons.dtype != bool or poisons.shape != (len(made.data),):
        return f"poisons must be bool of shape ({len(made.data)},), got {poisons.dtype} {poisons.shape}"
    if len(made.originals) != poisons.sum():
        return f"{poisons.sum()} poisons and {len(made.originals)} originals"
    if len(np.unique(made.data.index)) != len(made.data):
        return "several images have the same position"
    if made.trigger is None and made.targets is None:
        return "it has neither a trigger nor targets"
    if classes and (made.data.labels.min(initial=0) < 0 or made.data.labels.max(initial=0) >= classes):
        return f"labels lie outside 0 to {classes - 1}"
    if made.targets is not None:
        rows, wanted = made.targets.rows, made.targets.wanted
        if not len(rows) or len(rows) != len(wanted) or rows.min() < 0 or rows.max() >= len(test):
            return "its targets are no rows of the test split, with a class each"
        if (wanted == test.labels[rows]).any() or wanted.min() < 0 or wanted.max() >= classes:
            return "a target is wanted as its own class or as none of the dataset"
    x = made.data.batch(np.flatnonzero(poisons)[:_LOOKED_AT]).x * 255
    return None if (x - x.round()).abs().max() < 1e-3 else "poisoned images must have 8 bits"


def left_to_judge(test: Split, poisoned: Poisoned | None) -> Split:
    """The test split without the targets: copies of them are in the training set."""
    if poisoned is None or poisoned.targets is None:
        return test
    return test.subset(np.setdiff1d(np.arange(len(test)), poisoned.targets.rows))


def triggered(trigger: Trigger, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) with the trigger, in 8 bits like a file. Raises CellFailure where it makes no such images."""
    made = trigger.apply(x, index)
    if made.shape != x.shape or not bool(torch.isfinite(made).all()):
        raise CellFailure(f"the trigger made {tuple(made.shape)} of {tuple(x.shape)}, or pixels that are no numbers")
    return (made * 255).round().clamp(0, 255) / 255


def sift(data: Split, poisons: Array, sifting: Callable[[], Sifted], label: str) -> tuple[Split, Array, dict[str, Any]]:
    """What is left of `data` and of `poisons`, and the facts. Raises CellFailure where nothing or no mask is left."""
    found = sifting()
    kept = np.asarray(found.kept)
    if kept.dtype != bool or kept.shape != (len(data),):
        raise CellFailure(f"{label} must return bool of shape ({len(data)},), got {kept.dtype} {kept.shape}")
    if kept.sum() < 2:
        raise CellFailure(f"{label} left {kept.sum()} of {len(data)} training images; nothing can be trained on them")
    told = {**found.facts, "removed": int((~kept).sum()), "removed_share": float((~kept).mean())}
    if poisons.any():
        told |= {
            "removed_poisons": int((~kept & poisons).sum()),
            "poisons": int(poisons.sum()),
            "removed_poisons_share": float((~kept)[poisons].mean()),
            "removed_clean_share": float((~kept)[~poisons].mean()) if (~poisons).any() else 0.0,
        }
    return data.subset(np.flatnonzero(kept)), poisons[kept], told


def with_rounds(facts: Mapping[str, Any], trusted: torch.Tensor | None, poisons: Array) -> Mapping[str, Any]:
    """What a training told, with how well it chose: each round's figures join those that it told of that round."""
    if trusted is None:
        return facts
    counted = rounds(trusted, poisons)
    told = facts.get("rounds")
    own = told if isinstance(told, list) and len(told) == len(counted) else [{}] * len(counted)
    return {**facts, "rounds": [{**mine, **count} for mine, count in zip(own, counted, strict=True)]}


def rounds(trusted: torch.Tensor, poisons: Array) -> list[dict[str, Any]]:
    """How well a training chose, round by round: `trusted` (rounds, N) bool against the poisons (N,).

    `precision` is the share of clean images among the trusted ones, `recall` the share of clean images trusted.
    """
    found = []
    for row in trusted.cpu().numpy().astype(bool):
        size, leaks = int(row.sum()), int((row & poisons).sum())
        clean = int((~poisons).sum())
        found.append(
            {
                "trusted": size,
                "poisons": leaks,
                "precision": 1 - leaks / size if size else None,
                "recall": (size - leaks) / clean if clean else None,
            }
        )
    return found
