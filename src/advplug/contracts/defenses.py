"""The stages that a defense is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from advplug.contracts.threats import Norm

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from advplug.data import Split
    from advplug.rng import Stream
    from advplug.train import Training


class Gradient(StrEnum):
    """How gradients pass a defense: exactly, through a declared stand-in (BPDA), or not at all."""

    EXACT = "exact"
    BPDA = "bpda"
    NONE = "none"


@dataclass(frozen=True)
class TrainingData:
    """A data stage: split and seeded stream in, split out (poison filters, augmentation offline)."""

    apply: Callable[[Split, Stream], Split]


@dataclass(frozen=True)
class Sifted:
    """Which of the training images are kept, (N,) bool, with facts."""

    kept: np.ndarray[Any, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sift:
    """A data stage that looks at the training set through a model, and leaves out what it suspects.

    `apply` (trained, training): `trained()` gives the model as it becomes on the data so far, undefended, in evaluation
    mode and on the device; it is trained once for all that ask. `DefenseCaps.stages` calls it data.
    """

    apply: Callable[[Callable[[], nn.Module], Training], Sifted]


@dataclass(frozen=True)
class Objective:
    """A training loss in place of cross-entropy: (model, x, y, stream) to a scalar tensor.

    `depends` names the defense's parameters that matter to it, so that others need no new training; None: all.
    """

    loss: Callable[[nn.Module, Tensor, Tensor, Stream], Tensor]
    depends: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Tuned:
    """A tuned model.

    `structure` are integer tensors from which `Tune.rebuild` gives an untuned model the tuned one's
    shapes; `facts` are JSON-ready figures to report (parameter counts). Sentences in a list of facts called
    `warnings` are noted at every cell. `trusted` (rounds, N) bool says of a training that chooses among its images
    which it took to be clean, round by round; the engine compares them with the poisons it knows of.
    """

    model: nn.Module
    structure: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    trusted: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """The training itself, where another loss is not enough: (fresh model, training) to the trained one with facts.

    It stands in the place of an `Objective`, and `DefenseCaps.stages` calls it that too. The shapes stay.
    """

    apply: Callable[[nn.Module, Training], Tuned]


@dataclass(frozen=True)
class Tune:
    """A stage that changes trained weights; it gets a copy and leaves the original alone.

    `rebuild` (model, structure) is needed where the stage changes shapes. `reads_columns`: what it makes depends on
    what the model's columns are, and so on parameters that a `weights_recipe` leaves out.
    """

    apply: Callable[[nn.Module, Training], Tuned]
    rebuild: Callable[[nn.Module, Mapping[str, Tensor]], nn.Module] | None = None
    reads_columns: bool = True


@dataclass(frozen=True)
class Certified:
    """What is proven of one image: no change smaller than `radius` alters the answer `label`; -1 and 0: nothing."""

    label: int
    radius: float


@dataclass(frozen=True)
class Certifier:
    """Proves answers, image by image.

    `certify` (inner, image (C, H, W), rng, size) passes at most `size` images at once through `inner`, which maps
    images to logits; its draws come from `rng`, a torch.Generator of the image's own, and do not depend on `size`.
    Radii are in `norm`, in pixel units. `error` is the probability with which a proof may be wrong, `radii` are
    those to report where no budget asks for others.
    """

    norm: Norm
    certify: Callable[[Callable[[Tensor], Tensor], Tensor, Any, int], Certified]
    error: float = 0.0
    radii: tuple[float, ...] = ()


@dataclass(frozen=True)
class Wrap:
    """A stage around the deployed model.

    `forward(inner, x, rng)` gives the true logits; `inner` maps images to logits, `rng` is a
    torch.Generator to draw randomness from. `surrogates` are differentiable stand-ins of the same
    signature for the attacker (BPDA), all of which are attacked; empty if `forward` is differentiable.
    `draws` is how many samples an attacker needs for a gradient (EOT), `decisions` how many times an image is decided
    afresh where the wrap is stochastic. `gradient` says how gradients pass. `certifier` proves answers of the wrapped
    system; such a wrap is the outermost.

    Two things make it a detector: `accepts` (x, logits) -> (B,) bool, by the answer alone, and `rejection`
    (inner, x, rng) -> (B,), positive where the image is rejected. Attackers lower the latter by its gradient, so
    parts that have none need a stand-in whose value is theirs.
    """

    forward: Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor]
    gradient: Gradient = Gradient.EXACT
    surrogates: tuple[Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor], ...] = ()
    stochastic: bool = False
    draws: int = 1
    accepts: Callable[[Tensor, Tensor], Tensor] | None = None
    certifier: Certifier | None = None
    rejection: Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor] | None = None
    decisions: int = 10

    @property
    def rejects(self) -> bool:
        return self.accepts is not None or self.rejection is not None


@dataclass(frozen=True)
class Calibrated:
    """A wrap that is measured before it is made, such as a detector's threshold.

    `measure` (inner, training) gives figures, JSON-ready; `inner` maps images to logits, through the wraps inside.
    They are cached, reported among the facts, and make the wrap. `DefenseCaps.stages` calls it a wrap.
    """

    measure: Callable[[Callable[[Tensor], Tensor], Training], Mapping[str, Any]]
    wrap: Callable[[Mapping[str, Any]], Wrap]


Stage: TypeAlias = TrainingData | Sift | Objective | Fit | Tune | Wrap | Calibrated


Defense: TypeAlias = tuple[Stage, ...]
"""What a defense factory returns: its stages, in the order in which they apply."""
