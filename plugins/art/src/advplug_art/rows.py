"""What one row of the tables of attacks says, and how ART's arguments follow from it. Imports no torch and no ART."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from advplug.contracts import Access, AttackCaps, Norm, Param, ParamSpec, Spec, Strength

UNLIMITED = 10**9
"""For ART's own iteration limits, where the query budget is to end the search."""

UNTARGETED = frozenset({"untargeted"})
BOTH = frozenset({"untargeted", "targeted"})
ORDERS: Mapping[Norm, Any] = MappingProxyType({"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0})


@dataclass(frozen=True)
class Setting:
    """One call: the bound parameters, the budget, images (C, H, W) and classes."""

    params: Mapping[str, Any]
    norm: Norm
    eps: float
    shape: tuple[int, int, int]
    classes: int
    batch_size: int
    targeted: bool

    @property
    def order(self) -> Any:
        """ART's name of the norm: inf, 2, 1 or 0."""
        return ORDERS[self.norm]

    def step(self, share: float) -> float:
        """The parameter `alpha`, or a share of eps where it is not given."""
        alpha = self.params.get("alpha")
        return share * self.eps if alpha is None else float(alpha)

    def squares(self, wanted: float) -> float:
        """The share of pixels in the first squares of the Square attack: ART fails where one spans the image."""
        _, height, width = self.shape
        return min(wanted, (min(height, width) - 1) ** 2 / (height * width))


Arguments = Callable[[Setting], dict[str, Any]]


def _nothing(setting: Setting) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """One attack of ART.

    `maker` is "module:callable"; called with an estimator and keyword arguments it returns something with ART's
    `generate(x, y)`. Its arguments are the parameters under ART's names (`renamed`), those of `given` that the
    setting answers ("norm", "eps", "targeted", "batch_size", "verbose"), `fixed` values and what `arguments` derives.
    Parameters in `ours` are not ART's. `asks` is what the attack is handed: "gradients" is a PyTorch classifier,
    "answers" a black box, "answers-last" the same for images (B, H, W, C). Black boxes are asked at the nearest point
    of [0, 1], with `in_ball` of the L-inf ball.
    """

    name: str
    maker: str
    summary: str
    paper: str
    norms: tuple[Norm, ...]
    access: Access = Access.GRADIENT
    goals: frozenset[str] = UNTARGETED
    strength: Strength = Strength.ITERATIVE
    stochastic: bool = False
    per_batch: bool = False
    one_by_one: bool = False
    minimum_norm: bool = False
    probabilities: bool = False
    min_classes: int = 2
    channels: tuple[int, ...] | None = None
    threat: tuple[str, ...] = ()
    params: tuple[ParamSpec, ...] = ()
    given: tuple[str, ...] = ("targeted", "batch_size", "verbose")
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ours: tuple[str, ...] = ("alpha", "queries")
    arguments: Arguments = _nothing
    in_ball: bool = False
    clip: tuple[float, float] = (0.0, 1.0)
    needs: str = ""

    @property
    def asks(self) -> Literal["gradients", "answers", "answers-last"]:
        if self.access is Access.GRADIENT:
            return "gradients"
        return "answers-last" if self.name in ("spatial", "laser") else "answers"

    def spec(self) -> Spec:
        """What is registered."""
        caps = AttackCaps(
            self.access,
            frozenset(self.norms),
            self.goals,
            self.strength,
            stochastic=self.stochastic,
            min_classes=self.min_classes,
            channels=self.channels,
            minimum_norm=self.minimum_norm,
            per_batch=self.per_batch,
            threat=self.threat,
        )
        attribute = self.name.replace("-", "_")
        return Spec(f"art.{self.name}", f"advplug_art.attacks:{attribute}", caps, self.summary, self.paper, self.params)

    def keywords(self, setting: Setting) -> dict[str, Any]:
        """ART's arguments, without the estimator."""
        known = {
            "eps": setting.eps,
            "targeted": setting.targeted,
            "batch_size": setting.batch_size,
            "verbose": False,
            "norm": setting.order if "norm" in self.given else None,
        }
        made = {name: known[name] for name in self.given}
        made |= {self.renamed.get(n, n): value for n, value in setting.params.items() if n not in self.ours}
        return made | dict(self.fixed) | self.arguments(setting)


# --- parameters that several rows share --------------------------------------------------------------


def whole(name: str, default: int, text: str, ge: int = 1) -> ParamSpec:
    """A whole number."""
    return ParamSpec(name, "int", default, Param(text, ge=ge))


def positive(name: str, default: float, text: str, le: float | None = None) -> ParamSpec:
    """A number above 0."""
    return ParamSpec(name, "float", default, Param(text, gt=0, le=le))


def share(name: str, default: float, text: str) -> ParamSpec:
    """A number from 0 to 1."""
    return ParamSpec(name, "float", default, Param(text, ge=0, le=1))


def at_least(name: str, default: float, text: str, ge: float = 0) -> ParamSpec:
    """A number from a bound on."""
    return ParamSpec(name, "float", default, Param(text, ge=ge))


def choice(name: str, default: str, text: str, *choices: str) -> ParamSpec:
    """One of several words."""
    return ParamSpec(name, "str", default, Param(text), choices)


def text(name: str, default: str, meaning: str) -> ParamSpec:
    """Any word."""
    return ParamSpec(name, "str", default, Param(meaning))


def steps(default: int) -> ParamSpec:
    return whole("steps", default, "gradient steps")


def restarts(default: int) -> ParamSpec:
    return whole("restarts", default, "random starts")


def queries(default: int) -> ParamSpec:
    return whole("queries", default, "images that may be asked for each image; the closest success counts")


ALPHA = ParamSpec("alpha", "fraction", None, Param("step in pixel units; none: a share of eps", gt=0), optional=True)
LOSS = choice("loss", "ce", "loss that is maximised; dlr needs 3 classes", "ce", "dlr")
CONFIDENCE = at_least("confidence", 0.0, "margin that the logits must reach")
