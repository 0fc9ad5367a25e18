"""Where data and models come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol

from advplug.contracts.threats import Norm

if TYPE_CHECKING:
    from torch import nn

    from advplug.data import Dataset


@dataclass(frozen=True)
class DatasetInfo:
    """What a model has to know to fit a dataset, and the customary way to evaluate on it.

    `size` is (height, width) in pixels; `budgets` maps norms to the customary eps; `evaluate` is the
    default number of test images (None: all), `images` how many there are at most, where that is known without
    loading them; `flip` says that mirrored images keep their class;
    `trainable` that there is a training split; `captions` that each image has texts of its own. Captioned data may
    have no classes.
    """

    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    budgets: Mapping[Norm, Fraction]
    evaluate: int | None = None
    flip: bool = False
    modality: str = "image"
    trainable: bool = True
    captions: bool = False
    images: int | None = None


class DatasetSource(Protocol):
    """What a dataset factory returns: cheap facts now, pixels on demand. Imports no torch before `load`."""

    def info(self) -> DatasetInfo: ...
    def fingerprint(self) -> str:
        """Changes whenever the data does; never loads torch."""
        ...

    def load(self, offline: bool = False) -> Dataset: ...


class TextScorer(Protocol):
    """What the module of an image-text model is beside a module: its columns are texts.

    The logits (B, C) are `scale` times the cosine of each image and each text.
    """

    @property
    def scale(self) -> float: ...
    def with_gallery(self, texts: Sequence[str]) -> nn.Module:
        """The same model with these texts for columns; its weights are shared."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: optimiser `sgd` or `adamw`, with one-cycle learning rate.

    `flip` mirrors images at random, `shift` moves them by up to that many pixels; another `seed` gives
    another order and other draws under the same seed of the run.
    """

    epochs: int = 5
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    batch_size: int = 64
    weight_decay: float = 1e-4
    momentum: float = 0.9
    flip: bool = False
    shift: int = 0
    one_cycle: bool = True
    seed: int = 0


class ModelSource(Protocol):
    """What a model factory returns. Imports no torch before `build`.

    A source may also have `fit(model, training) -> Tuned`: how such a model is trained, where no defense takes
    that over, instead of by cross-entropy on the labels; and `weights_recipe() -> Mapping`: those of its parameters
    that trained weights depend on, so that the others need no new training. Where its training begins with what
    another one made, `origin() -> VictimPlan` says which, without defenses, `adopt(fresh, trained) -> module` takes
    over what is used of it, and `identity` holds the origin's `recipe`.
    """

    def identity(self) -> Mapping[str, Any]:
        """What the weights depend on beyond the parameters: file hashes and the like; JSON-ready."""
        ...

    def misfit(self, info: DatasetInfo) -> str | None:
        """Why this model cannot take that dataset, with what would work instead; None if it can."""
        ...

    def schedule(self, info: DatasetInfo) -> Schedule | None:
        """How it is trained for that dataset; None for weights that are used as they are."""
        ...

    def build(self, info: DatasetInfo, offline: bool = False) -> nn.Module:
        """A module from pixels in [0, 1] to logits (B, K); normalisation is inside.

        An attribute `notes`, a tuple of sentences, is shown with the module's cells.
        """
        ...
