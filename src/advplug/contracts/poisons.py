"""What goes into an attack on training data and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from advplug.contracts.sources import DatasetInfo
    from advplug.data import Split
    from advplug.rng import Stream


@dataclass(frozen=True)
class Trigger:
    """What opens a backdoor.

    `apply(x, index)` puts it on images (B, C, H, W) in [0, 1], in pixel space; draws follow `index` (B,), the images'
    positions, so that they do not depend on batches. `wanted(y)` gives the class (B,) that a triggered image of true
    class y (B,) is to be taken for; where that is y itself there is nothing to gain.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    wanted: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Targets:
    """Test images that are to be taken for another class: `rows` (k,) of the test split, `wanted` (k,) classes.

    They are left out of everything else that is measured.
    """

    rows: np.ndarray[Any, Any]
    wanted: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set and what is to come of it.

    `poisons` (len(data),) bool marks the rows that were added or changed, and `originals` holds those rows as they
    were, in that order; the engine records both and shows them to no defense. `facts` are JSON-ready figures.
    """

    data: Split
    poisons: np.ndarray[Any, Any]
    originals: Split
    trigger: Trigger | None = None
    targets: Targets | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class PoisonAttack(Protocol):
    """Poisons a training set before a model is trained on it: a trigger, targets or both say what for.

    It may look at the test split to choose targets. Images that it adds or changes have 8 bits, as a published file
    has (`Split.changed` and `Split.joined`). Raises UsageError for what cannot be asked of this data.
    """

    def __call__(self, data: Split, test: Split, info: DatasetInfo, rng: Stream) -> Poisoned: ...
