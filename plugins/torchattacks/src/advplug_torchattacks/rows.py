"""What a row of the table says, and the parameters that many rows share. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from advplug.contracts import Access, AttackCaps, Param, ParamSpec, Spec, Strength

PREFIX = "ta."
HOME = "advplug_torchattacks.adapter:factories."


def whole(name: str, default: int | None, text: str, ge: float = 1, le: float | None = None) -> ParamSpec:
    """A whole number; optional where the default is None."""
    return ParamSpec(name, "int", default, Param(text, ge=ge, le=le), optional=default is None)


def number(
    name: str,
    default: float | None,
    text: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> ParamSpec:
    """A number; optional where the default is None."""
    return ParamSpec(name, "float", default, Param(text, ge, gt, le, lt), optional=default is None)


def choice(name: str, default: str, text: str, *others: str) -> ParamSpec:
    return ParamSpec(name, "str", default, Param(text), choices=(default, *others))


def switch(name: str, default: bool, text: str) -> ParamSpec:
    return ParamSpec(name, "bool", default, Param(text))


def steps(default: int = 10) -> ParamSpec:
    return whole("steps", default, "gradient steps")


def queries(text: str) -> ParamSpec:
    return whole("queries", None, f"most images an image's search may ask for; none: {text}")


def alpha(share: str) -> ParamSpec:
    text = f"step in pixel units; none: {share}"
    return ParamSpec("alpha", "fraction", None, Param(text, gt=0), optional=True)


DECAY = number("decay", 1.0, "share of the momentum that is kept", ge=0)
START = switch("random_start", True, "begin at a random point; no: at the clean image")
EOT = whole("eot_iter", 1, "gradients that are averaged in a step, for randomised victims")
NOISE = (
    choice("noise_type", "gaussian", "distribution of the smoothing noise", "uniform"),
    number(
        "noise_sd", 0.5, "standard deviation of the noise, or half the width of uniform noise, in pixel units", gt=0
    ),
    whole("noise_batch_size", 5, "noisy copies that a gradient is averaged over"),
)
DIVERSITY = (
    number("resize_rate", 0.9, "smallest size of the resized image, as a share", gt=0, lt=1),
    number("diversity_prob", 0.5, "share of the steps that resize and pad", ge=0, le=1),
)


@dataclass(frozen=True)
class Row:
    """One attack: its class in torchattacks and how the budget, the step and the parameters reach it.

    `budget` is the class's argument that takes eps (None: it takes none). `step` sets `alpha` where it is not given:
    step / steps of eps, at most eps, or that share of eps where there are no steps. `rename` maps parameters to the
    class's arguments, None for those that only the adapter reads. `draws` says whose the random draws are: "none",
    "batch" (shared by a batch) or "image" (images are handed over one by one); `coupled` says that images of a batch
    end each other's search.

    What is worked around: `positive` keeps the logits above zero for losses that mask by multiplication with zero;
    `colour` gives gray images three equal channels; `both_labels` hands a targeted attack the true label, too.
    """

    name: str
    attack: str
    summary: str
    paper: str
    norms: tuple[str, ...] = ("linf",)
    access: Access = Access.GRADIENT
    targeted: bool = True
    strength: Strength = Strength.ITERATIVE
    draws: str = "none"
    coupled: bool = False
    minimum_norm: bool = False
    min_classes: int = 2
    params: tuple[ParamSpec, ...] = ()
    budget: str | None = "eps"
    step: float | None = None
    rename: Mapping[str, str | None] = field(default_factory=dict)
    positive: bool = False
    colour: bool = False
    both_labels: bool = False

    def spec(self) -> Spec:
        caps = AttackCaps(
            self.access,
            frozenset(self.norms),
            frozenset({"untargeted", "targeted"} if self.targeted else {"untargeted"}),
            self.strength,
            stochastic=self.draws != "none",
            min_classes=self.min_classes,
            channels=(1, 3) if self.colour else None,
            minimum_norm=self.minimum_norm,
            per_batch=self.draws == "batch" or self.coupled,
        )
        return Spec(PREFIX + self.name, HOME + self.name, caps, self.summary, self.paper, self.params)

    def arguments(self, given: Mapping[str, Any], eps: float) -> dict[str, Any]:
        """The class's arguments for the parameters `given` at the budget eps, in pixel units."""
        passed: dict[str, Any] = {}
        for spec in self.params:
            into = self.rename.get(spec.name, spec.name)
            if into is not None:
                value = given[spec.name]
                passed[into] = float(value) if spec.kind in ("float", "fraction") and value is not None else value
        if self.budget is not None:
            passed[self.budget] = eps
        if self.step is not None and passed["alpha"] is None:
            passed["alpha"] = eps * (min(1.0, self.step / given["steps"]) if "steps" in given else self.step)
        return passed
