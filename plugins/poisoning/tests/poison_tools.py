"""Datasets and attacks as the command line makes them, small."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from advplug.contracts import PoisonAttack, Poisoned
from advplug.data import Dataset, Split
from advplug.parse import parse_reference
from advplug.registry import registry
from advplug.rng import Stream

SCENES = "digit-scenes:train=400,n=60"
DATASETS = ("digits:size=16", SCENES, "fake:train=200,n=40")
"""Grey ones, coloured ones with captions, coloured ones with labels alone."""


def make(kind: str, text: str) -> Any:
    reference = parse_reference(text)
    entry = registry().get(kind, reference.name)
    bound = entry.bind(reference)
    entry.spec.caps_of(bound)  # what is looked at before anything is loaded
    return entry.make(bound)


@cache
def dataset(text: str) -> Dataset:
    found: Dataset = make("dataset", text).load(offline=True)
    return found


def poisoned(attack: str, data: str, seed: int = 0) -> Poisoned:
    made: PoisonAttack = make("attack", attack)
    found = dataset(data)
    return made(found.train, found.test, found.info, Stream(seed, "poison"))


def pixels(split: Split, rows: np.ndarray[Any, Any] | None = None) -> torch.Tensor:
    """Images (B, C, H, W) in 0 to 255."""
    return split.batch(np.arange(len(split)) if rows is None else rows).x * 255


def same(one: Split, other: Split) -> bool:
    return (
        torch.equal(pixels(one), pixels(other))
        and np.array_equal(one.labels, other.labels)
        and np.array_equal(one.index, other.index)
        and one.captions == other.captions
    )
