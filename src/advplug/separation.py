"""Before a run: whether the images that it is judged on are among the training images of its datasets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from advplug.errors import GateError, UsageError
from advplug.results import LeakCheck

if TYPE_CHECKING:
    from advplug.matrix import Sweep
    from advplug.poisons.plans import PoisonPlan
    from advplug.progress import Progress


def demand_separate(pieces: Iterable[Sweep | PoisonPlan], offline: bool, progress: Progress) -> tuple[LeakCheck, ...]:
    """Compares the images that each piece is judged on with all training images of its dataset, a dataset once.

    Raises GateError for the first dataset that shares one, with the first pairs; UsageError for data that cannot be
    read.
    """
    from advplug.build import subset
    from advplug.leakage import find_leaks, told

    made = []
    for dataset, limit in {(p.victim.dataset.label, p.limit): (p.victim.dataset, p.limit) for p in pieces}.values():
        progress.stage(f"comparing training and evaluation images of {dataset.label}", 0)
        try:
            loaded = dataset.value.load(offline=offline)
            evaluation, _ = subset(loaded.test, limit)
            leaks = find_leaks(loaded.train, evaluation)
        except UsageError as error:
            raise UsageError(f"{dataset.label}: {error}") from error
        if leaks:
            raise GateError(f"{dataset.label}: {told(leaks)}")
        made.append(LeakCheck(dataset.label, leaks.train, leaks.evaluation, leaks.unchecked))
    return tuple(made)


def sentence(check: LeakCheck) -> str:
    """What was found, for people."""
    left = f"; not compared: {', '.join(check.unchecked)}" if check.unchecked else ""
    return f"none of {check.evaluation:,} evaluation images found among {check.train:,} training images{left}"
