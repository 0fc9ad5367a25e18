"""What the parts of advplug say to each other: frozen values and small protocols.

Torch appears in annotations only, so that plugins can be listed without importing it.
Images are float32 tensors (B, C, H, W) in [0, 1]; labels are int64 (B,); budgets are in pixel units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from advplug.errors import UsageError
from advplug.params import Param, ParamSpec
from advplug.parse import Reference, Stack, VictimRef
from advplug.perturbations import Ball, MinimumNorm, Perturbation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advplug.data import Dataset, Split
    from advplug.rng import Stream
    from advplug.train import Training
    from advplug.victim import Victim

__all__ = [
    "Access", "AttackCaps", "Ball", "Batch", "Calibrated", "Certified", "Certifier", "Crafted", "DatasetCaps",
    "DatasetInfo", "DatasetSource",
    "Decision", "Defense", "DefenseCaps", "EvasionAttack", "Fit", "Goal", "Gradient", "Metric", "MetricCaps",
    "MinimumNorm", "ModelCaps", "ModelSource", "Norm", "Objective", "Param", "ParamSpec", "Perturbation", "Reference",
    "Schedule", "Spec", "Stack", "Stage", "Strength", "Targeted", "Threat", "Trace", "TrainingData", "Tune",
    "Tuned", "Untargeted", "VictimRef", "Wrap",
]  # fmt: skip

Norm: TypeAlias = str
"""One of `perturbations.SETS`: 'linf', 'l2', 'l1', 'l0', 'spatial', 'patch' or 'unrestricted'."""


# --- threats ---------------------------------------------------------------------------------------


class Access(StrEnum):
    """What an attacker needs of the victim."""

    GRADIENT = "gradient"
    SCORE = "score"
    DECISION = "decision"
    TRAINING_SET = "training-set"


class Gradient(StrEnum):
    """How gradients pass a defense: exactly, through a declared stand-in (BPDA), or not at all."""

    EXACT = "exact"
    BPDA = "bpda"
    NONE = "none"


class Strength(IntEnum):
    """What a failed attack proves: nothing (FLOOR) up to APGD-strength evidence (STRONG)."""

    FLOOR = 0
    ONE_STEP = 1
    ITERATIVE = 2
    STRONG = 3


@dataclass(frozen=True)
class Untargeted:
    """Any wrong answer is a success."""

    def __str__(self) -> str:
        return "untargeted"


@dataclass(frozen=True)
class Targeted:
    """Only the target class is a success.

    `to` is 'next' (label + 1), 'random' (any other class), 'least-likely' (the smallest clean score)
    or the index of a class.
    """

    to: str | int = "next"

    def __str__(self) -> str:
        return f"targeted:{self.to}"


Goal: TypeAlias = Untargeted | Targeted


@dataclass(frozen=True)
class Threat:
    """One point: what may change, to what end, with which access, for how many queries."""

    perturbation: Perturbation
    goal: Goal = Untargeted()
    access: Access = Access.GRADIENT
    queries: int | None = None

    @property
    def norm(self) -> Norm:
        return self.perturbation.norm

    @property
    def eps(self) -> float:
        return float(self.perturbation.eps)


# --- batches and what comes back -------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Images with labels.

    `index` (B,) are positions in the dataset: random draws are seeded by them, so that results do not
    depend on batch size. `target` (B,) is set for targeted goals. `start` (B, C, H, W), where given, is
    a point to begin from (the end of the sweep's smaller budget).
    """

    x: Tensor
    y: Tensor
    index: Tensor
    target: Tensor | None = None
    start: Tensor | None = None
    text: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def aim(self, goal: Goal) -> Tensor | None:
        """The classes to reach, None for an untargeted goal. Raises UsageError for a targeted one without targets."""
        if not isinstance(goal, Targeted):
            return None
        if self.target is None:
            raise UsageError("a targeted attack needs Batch.target")
        return self.target

    def take(self, rows: Tensor) -> Batch:
        """The images at `rows` (indices or a mask, on any device)."""
        # Positions may stay on the CPU, and a tensor takes rows of its own device or of the CPU only.
        rows = rows.cpu()
        picked = {n: getattr(self, n)[rows] for n in ("x", "y", "index")}
        for name in ("target", "start"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[rows]
        chosen = None
        if self.text is not None:
            positions = rows.nonzero().flatten() if str(rows.dtype) == "torch.bool" else rows
            chosen = tuple(self.text[int(i)] for i in positions)
        return replace(self, text=chosen, **picked)


@dataclass(frozen=True)
class Decision:
    """What the deployed system answers: label (B,), whether it answered at all (B,), scores (B, K)."""

    label: Tensor
    accepted: Tensor
    scores: Tensor | None = None

    def fooled(self, y: Tensor, target: Tensor | None = None) -> Tensor:
        """(B,) bool: accepted, and `target`, or where that is None anything but `y`."""
        return self.accepted & (self.label != y if target is None else self.label == target)


@dataclass(frozen=True)
class Trace:
    """How an attack went, per image, as far as it knows; every tensor is (B,) on the CPU, `loss_path` (B, steps + 1)
    with NaN after an image was solved.

    `any_iterate`: fooled at some iterate; `final_iterate`: fooled at the last one. `zero_gradient` and
    `nonfinite` count steps whose gradient vanished or was not finite. `queries` counts the images that the victim
    was asked for. `black_box`: fooled by a part that sees scores only, after every gradient had failed.
    """

    any_iterate: Tensor | None = None
    final_iterate: Tensor | None = None
    steps: Tensor | None = None
    zero_gradient: Tensor | None = None
    nonfinite: Tensor | None = None
    loss_path: Tensor | None = None
    queries: Tensor | None = None
    black_box: Tensor | None = None


@dataclass(frozen=True)
class Crafted:
    """An attack's output: images of the shape of the input, and how it got there.

    `applied` (B, ...) is what was done to each image, for perturbation sets that cannot be read off the images.
    """

    x: Tensor
    trace: Trace | None = None
    applied: Tensor | None = None


class EvasionAttack(Protocol):
    """Returns changed images; the engine, not the attack, decides which of them succeed.

    An attack whose perturbation set has parameters of its own also has a method
    `perturbation(norm, eps) -> Perturbation`.
    """

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted: ...


# --- datasets and models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetInfo:
    """What a model has to know to fit a dataset, and the customary way to evaluate on it.

    `size` is (height, width) in pixels; `budgets` maps norms to the customary eps; `evaluate` is the
    default number of test images (None: all); `flip` says that mirrored images keep their class;
    `trainable` that there is a training split.
    """

    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    budgets: Mapping[Norm, Fraction]
    evaluate: int | None = None
    flip: bool = False
    modality: str = "image"
    trainable: bool = True


class DatasetSource(Protocol):
    """What a dataset factory returns: cheap facts now, pixels on demand. Imports no torch before `load`."""

    def info(self) -> DatasetInfo: ...
    def fingerprint(self) -> str:
        """Changes whenever the data does; never loads torch."""
        ...

    def load(self, offline: bool = False) -> Dataset: ...


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
    """What a model factory returns. Imports no torch before `build`."""

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
        """A module from pixels in [0, 1] to logits (B, K); normalisation is inside."""
        ...


# --- defenses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """A data stage: split and seeded stream in, split out (poison filters, augmentation offline)."""

    apply: Callable[[Split, Stream], Split]


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
    `warnings` are noted at every cell.
    """

    model: nn.Module
    structure: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """The training itself, where another loss is not enough: (fresh model, training) to the trained one with facts.

    It stands in the place of an `Objective`, and `DefenseCaps.stages` calls it that too. The shapes stay.
    """

    apply: Callable[[nn.Module, Training], Tuned]


@dataclass(frozen=True)
class Tune:
    """A stage that changes trained weights; it gets a copy and leaves the original alone.

    `rebuild` (model, structure) is needed where the stage changes shapes.
    """

    apply: Callable[[nn.Module, Training], Tuned]
    rebuild: Callable[[nn.Module, Mapping[str, Tensor]], nn.Module] | None = None


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
    those to report where no budget asks for others, `draws` is how many passes an image takes.
    """

    norm: Norm
    certify: Callable[[Callable[[Tensor], Tensor], Tensor, Any, int], Certified]
    error: float = 0.0
    radii: tuple[float, ...] = ()
    draws: int = 1


@dataclass(frozen=True)
class Wrap:
    """A stage around the deployed model.

    `forward(inner, x, rng)` gives the true logits; `inner` maps images to logits, `rng` is a
    torch.Generator to draw randomness from. `surrogates` are differentiable stand-ins of the same
    signature for the attacker (BPDA), all of which are attacked; empty if `forward` is differentiable.
    `draws` is how many samples an attacker averages over (EOT). `gradient` says how gradients pass. `certifier`
    proves answers of the wrapped system; such a wrap is the outermost.

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


Stage: TypeAlias = TrainingData | Objective | Fit | Tune | Wrap | Calibrated
Defense: TypeAlias = tuple[Stage, ...]
"""What a defense factory returns: its stages, in the order in which they apply."""


class Metric(Protocol):
    """Named values from the per-image evidence of one cell; None where a quantity does not apply."""

    def __call__(self, evidence: Any) -> Mapping[str, Any]: ...


# --- what a plugin registers -----------------------------------------------------------------------


@dataclass(frozen=True)
class AttackCaps:
    """What an attack can do.

    `min_classes` and `max_classes` bound the class counts it is defined for, `channels` the images' channels
    (None: any). `minimum_norm`: it seeks the smallest change, so one run answers for every budget.
    `per_batch`: its random draws are shared by a batch, so results depend on the batch size. `threat` names the
    parameters that describe the perturbation set rather than the attack.
    """

    access: Access
    norms: frozenset[Norm]
    goals: frozenset[str] = frozenset({"untargeted"})
    strength: Strength = Strength.ITERATIVE
    stochastic: bool = False
    warm_start: bool = False
    min_classes: int = 2
    max_classes: int | None = None
    channels: tuple[int, ...] | None = None
    minimum_norm: bool = False
    per_batch: bool = False
    threat: tuple[str, ...] = ()
    modality: str = "image"


@dataclass(frozen=True)
class DefenseCaps:
    """What a defense is made of: stages among data, objective, tune, wrap; and how gradients pass it.

    `certifies` is the norm in which it proves its answers. `loaded` is what to write instead for weights that are
    only loaded, where the defense trains.
    """

    stages: tuple[str, ...]
    gradient: Gradient = Gradient.EXACT
    stochastic: bool = False
    rejects: bool = False
    certifies: Norm | None = None
    loaded: str | None = None
    modality: str = "image"


@dataclass(frozen=True)
class ModelCaps:
    """`task` is what the columns of the logits are: classes, or entries of a caption gallery."""

    task: str = "classification"
    modality: str = "image"


@dataclass(frozen=True)
class DatasetCaps:
    """`embedded` data needs no file and no network."""

    modality: str = "image"
    embedded: bool = False


@dataclass(frozen=True)
class MetricCaps:
    """The names of the values that a metric returns."""

    values: tuple[str, ...]


Caps: TypeAlias = AttackCaps | DefenseCaps | ModelCaps | DatasetCaps | MetricCaps


@dataclass(frozen=True)
class Spec:
    """One registered thing.

    `target` is "module:factory", imported on use; the factory's annotated signature gives the
    parameters unless `params` states them. `needs` maps the bound parameters to further victims that
    the factory gets as keyword arguments (surrogates, proxies, clean twins): `"model"` inside such a
    reference stands for the attacked model. Parameters of type VictimRef are needs by themselves. `narrow` gives
    the capabilities where they depend on the bound parameters; `caps` are then those of the defaults.
    """

    name: str
    target: str
    caps: Caps
    summary: str
    paper: str = ""
    params: tuple[ParamSpec, ...] | None = None
    needs: Callable[[Mapping[str, Any]], Mapping[str, VictimRef]] | None = None
    narrow: Callable[[Mapping[str, Any]], Caps] | None = None

    def caps_of(self, params: Mapping[str, Any]) -> Caps:
        """The capabilities with these bound parameters."""
        return self.narrow(params) if self.narrow else self.caps
