"""What a plugin declares of what it registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from advplug.contracts.defenses import Gradient
from advplug.contracts.threats import Access, Norm, Strength
from advplug.params import ParamSpec
from advplug.parse import VictimRef


class Metric(Protocol):
    """Named values from the per-image evidence of one cell; None where a quantity does not apply."""

    def __call__(self, evidence: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class AttackCaps:
    """What an attack can do.

    `min_classes` and `max_classes` bound the class counts it is defined for, `channels` the images' channels
    (None: any). `minimum_norm`: it seeks the smallest change, so one run answers for every budget.
    `per_batch`: its random draws are shared by a batch, so results depend on the batch size. `threat` names the
    parameters that describe the perturbation set rather than the attack. `goals` are among untargeted, targeted and
    minimise; an attack without untargeted ones minimises unless it is given a target. `fewer_classes` are (count,
    sentence): below that many classes the attack does something else, and the sentence, which says what, is noted at
    the cell. `modality` is image-text for attacks on models that compare images with texts.
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
    fewer_classes: tuple[tuple[int, str], ...] = ()
    threat: tuple[str, ...] = ()
    modality: str = "image"


@dataclass(frozen=True)
class PoisonCaps:
    """What an attack on training data can do, a `PoisonAttack`.

    `modalities` are those of the models that it is for: `image` for classifiers, `image-text` for models trained on
    captions. `channels` and `min_classes` as of `AttackCaps`. `clean_label`: labels and captions stay true.
    """

    modalities: frozenset[str] = frozenset({"image"})
    clean_label: bool = False
    min_classes: int = 2
    channels: tuple[int, ...] | None = None
    access: Access = Access.TRAINING_SET


@dataclass(frozen=True)
class DefenseCaps:
    """What a defense is made of: stages among data, objective, tune, wrap; and how gradients pass it.

    `certifies` is the norm in which it proves its answers. `loaded` is what to write instead for weights that are
    only loaded, where the defense trains, and where there are no images that it could learn from. `modality` is
    image-text for what needs captions and a model of texts. `keeps_scores`: the scores it hands on are still the
    model's own, so that similarities can be read off them. `needs_data`: it learns from training images, whoever
    trained the model, and, where `modality` is image, from their labels, unless it is a wrap. `asks_many`: it asks
    what is inside it several times an image, as a vote does. `stand_ins`: where `gradient` is bpda, through how many
    gradients it is attacked; forecasts count 2 where it is not told.
    """

    stages: tuple[str, ...]
    gradient: Gradient = Gradient.EXACT
    stochastic: bool = False
    rejects: bool = False
    certifies: Norm | None = None
    loaded: str | None = None
    modality: str = "image"
    keeps_scores: bool = True
    needs_data: bool = False
    asks_many: bool = False
    stand_ins: int | None = None


@dataclass(frozen=True)
class ModelCaps:
    """`task` is what the columns of the logits are: `classification`, or `retrieval` for the captions of the evaluated
    images. `modality` is image-text for models that compare images with texts."""

    task: str = "classification"
    modality: str = "image"


@dataclass(frozen=True)
class DatasetCaps:
    """`embedded` data needs no file and no network."""

    modality: str = "image"
    embedded: bool = False


@dataclass(frozen=True)
class MetricCaps:
    """The names of the values that a metric returns; `shown` are (value, heading) of those, shares all, that the table
    of cells has a column for."""

    values: tuple[str, ...]
    shown: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TrackerCaps:
    """Nothing that the core has to know of a tracker."""


Caps: TypeAlias = AttackCaps | PoisonCaps | DefenseCaps | ModelCaps | DatasetCaps | MetricCaps | TrackerCaps


@dataclass(frozen=True)
class Spec:
    """One registered thing.

    `target` is "module:factory", imported on use; the factory's annotated signature gives the
    parameters unless `params` states them. `needs` maps the bound parameters to further victims that
    the factory gets as keyword arguments (surrogates, proxies, clean twins): `"model"` inside such a
    reference stands for the attacked model. Parameters of type VictimRef are needs by themselves. `narrow` gives
    the capabilities where they depend on the bound parameters; `caps` are then those of the defaults. `effort` gives
    how many times an attack sends an image forward and backward at most, for attacks whose parameters `steps`,
    `restarts`, `n_targets`, `queries` and `draws` do not say it; beside the bound parameters it gets `classes`, their
    number, and `stochastic`, whether the victim is randomised.
    """

    name: str
    target: str
    caps: Caps
    summary: str
    paper: str = ""
    params: tuple[ParamSpec, ...] | None = None
    needs: Callable[[Mapping[str, Any]], Mapping[str, VictimRef]] | None = None
    narrow: Callable[[Mapping[str, Any]], Caps] | None = None
    effort: Callable[[Mapping[str, Any]], tuple[float, float]] | None = None

    def caps_of(self, params: Mapping[str, Any]) -> Caps:
        """The capabilities with these bound parameters."""
        return self.narrow(params) if self.narrow else self.caps
