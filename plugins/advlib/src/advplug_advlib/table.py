"""One row an attack: what it is called here and there, what it can do, its parameters with their defaults.

Defaults are adv-lib's. The README names the exceptions and their reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from advplug.contracts import Access, AttackCaps, Param, ParamSpec, Spec, Strength

P: Mapping[str, float] = MappingProxyType({"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0})
BOTH = frozenset({"untargeted", "targeted"})


@dataclass(frozen=True)
class Option:
    """A parameter, and the keyword that adv-lib has for it."""

    keyword: str
    spec: ParamSpec


@dataclass(frozen=True)
class Row:
    """An attack of adv-lib.

    `function` is its path inside `adv_lib.attacks`. `norm` and `eps` are the keywords that take the norm (as `order`
    says) and the budget, empty where there is none. `extra` are further keywords by norm; parameters that are not
    none go before them. `dlr` is how many classes the difference of logits ratio needs, (untargeted, targeted), where
    it is the loss or the parameter `loss` says so. `seeks`: it minimises the change; otherwise it stays within a
    budget. `draws`: it draws random numbers, which a batch shares; `entwined`: its stopping rule looks at the whole
    batch.
    """

    name: str
    function: str
    summary: str
    paper: str
    norms: tuple[str, ...]
    options: tuple[Option, ...]
    norm: str = ""
    order: Mapping[str, Any] = field(default_factory=lambda: P)
    eps: str = ""
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dlr: tuple[int, int] | None = None
    goals: frozenset[str] = BOTH
    strength: Strength = Strength.ITERATIVE
    seeks: bool = True
    draws: bool = False
    entwined: bool = False
    min_classes: int = 2

    def spec(self) -> Spec:
        caps = AttackCaps(
            Access.GRADIENT,
            frozenset(self.norms),
            goals=self.goals,
            strength=self.strength,
            stochastic=self.draws,
            min_classes=self.min_classes,
            minimum_norm=self.seeks,
            per_batch=self.draws or self.entwined,
        )
        params = tuple(o.spec for o in self.options)
        target = f"advplug_advlib.adapter:{self.name.replace('-', '_')}"
        return Spec(f"adv.{self.name}", target, caps, self.summary, self.paper, params)


def _int(name: str, keyword: str, default: int | None, text: str, ge: int = 1) -> Option:
    return Option(keyword, ParamSpec(name, "int", default, Param(text, ge=ge), optional=default is None))


def _float(name: str, keyword: str, default: float | None, text: str, **bounds: Any) -> Option:
    info = Param(text, **(bounds or {"gt": 0}))
    return Option(keyword, ParamSpec(name, "float", default, info, optional=default is None))


def _bool(name: str, keyword: str, default: bool, text: str) -> Option:
    return Option(keyword, ParamSpec(name, "bool", default, Param(text)))


def _loss(default: str, *others: str) -> Option:
    text = "loss that is maximised: cross-entropy, difference of logits or its ratio"
    text += "; auto: the ratio where there are classes enough for it" if default == "auto" else ""
    return Option("loss_function", ParamSpec("loss", "str", default, Param(text), choices=(default, *others)))


def _steps(keyword: str, default: int, ge: int = 1) -> Option:
    return _int("steps", keyword, default, "gradient steps", ge)


_RESTARTS = _int("restarts", "n_restarts", 1, "random starts, later ones only for survivors")
_EOT = _int("draws", "eot_iter", 1, "further samples a gradient is averaged over, for randomised victims")
_RHO = _float("rho", "rho", 0.75, "share of rising steps below which the step is halved", gt=0, le=1)
_APGD = (_steps("n_iter", 100, 5), _RESTARTS, _loss("auto", "dlr", "ce"), _EOT, _RHO)
_LARGE = {"l1": {"use_large_reps": True}}
_OVERSHOOT = _float("overshoot", "overshoot", 0.02, "share by which a step crosses the boundary", ge=0)
_SAMPLES = _int("samples", "n_samples", 10, "random sizes tried for the pixel of a step")
_MOST = _int("steps", "max_iter", None, "most channel values that change; none: all there are")
_PRIMAL_DUAL = (
    _steps("num_steps", 500, 2),
    _float("lr_decrease", "primal_lr_decrease", 0.01, "share of the step at the end", gt=0, le=1),
    _float("ratio", "dual_ratio_init", 0.01, "first weight of the distance over that of the misclassification"),
    _float("dual_lr", "dual_lr", 0.1, "first step of the weights"),
)  # fmt: skip

ROWS = (
    Row("apgd", "apgd", "Auto-PGD",
        "Croce and Hein 2020, arXiv 2003.01690; L1: Croce and Hein 2021, arXiv 2103.01208",
        ("linf", "l2", "l1"), _APGD, norm="norm", eps="eps", extra=_LARGE, dlr=(3, 4), strength=Strength.STRONG,
        seeks=False, draws=True),
    Row("apgd-t", "apgd_targeted", "Auto-PGD towards each likely class in turn",
        "Croce and Hein 2020, arXiv 2003.01690; L1: Croce and Hein 2021, arXiv 2103.01208",
        ("linf", "l2", "l1"),
        (*_APGD, _int("targets", "num_targets", 9, "likeliest other classes to aim at; none: all")),
        norm="norm", eps="eps", extra=_LARGE, dlr=(4, 4), goals=frozenset({"untargeted"}), strength=Strength.STRONG,
        seeks=False, draws=True),
    Row("apgd-min", "auto_pgd.minimal_apgd", "Auto-PGD in a bisection for the smallest radius that fools",
        "Croce and Hein 2020, arXiv 2003.01690; L1: Croce and Hein 2021, arXiv 2103.01208",
        ("linf", "l2", "l1"),
        (*_APGD, _int("searches", "binary_search_steps", 20, "bisections, from the largest budget downwards")),
        norm="norm", eps="max_eps", extra=_LARGE, dlr=(3, 4), goals=frozenset({"untargeted"}),
        strength=Strength.STRONG, draws=True),
    Row("pgd", "pgd_linf", "Projected gradient ascent from a random start", "Madry et al. 2018, arXiv 1706.06083",
        ("linf",),
        (_steps("steps", 40), _int("restarts", "restarts", 1, "random starts, later ones only for survivors"),
         _bool("random_start", "random_init", True, "begin at a random point; no: at the clean image"),
         _loss("ce", "dl", "dlr"), _float("step", "relative_step_size", 0.01 / 0.3, "step as a share of eps")),
        eps="ε", dlr=(3, 4), seeks=False, draws=True),
    Row("ddn", "ddn", "Decoupled direction and norm: the smallest change", "Rony et al. 2019, arXiv 1811.09600",
        ("l2",),
        (_steps("steps", 100), _float("gamma", "γ", 0.05, "share by which the norm grows or shrinks", gt=0, lt=1),
         _float("init_norm", "init_norm", 1.0, "first norm"),
         _int("levels", "levels", None, "gray levels that images are rounded to; none: no rounding", 2))),
    Row("fmn", "fmn", "Fast minimum-norm attack", "Pintor et al. 2021, arXiv 2102.12827",
        ("linf", "l2", "l1", "l0"),
        (_steps("steps", 100), _float("alpha", "α_init", 1.0, "first step, in L2"),
         _float("alpha_final", "α_final", None, "last step; none: a hundredth of the first"),
         _float("gamma", "γ_init", 0.05, "first share by which the norm grows or shrinks", gt=0, lt=1),
         _float("gamma_final", "γ_final", 0.001, "last such share", gt=0, lt=1)),
        norm="norm"),
    Row("alma", "alma", "Augmented Lagrangian method for the smallest change", "Rony et al. 2021, arXiv 2011.11857",
        ("l2", "l1"),
        (_steps("num_steps", 1000, 2), _float("lr", "lr_init", None, "first step; none: 0.1, in L1 0.01"),
         _float("lr_reduction", "lr_reduction", 0.01, "share of the step at the end", gt=0, le=1),
         _float("alpha", "α", 0.9, "weight of the past in averages", ge=0, lt=1),
         _float("gamma", "γ", 1.2, "growth of the penalty while nothing is found", gt=1),
         _int("check_steps", "check_steps", 10, "steps between checks of the penalty")),
        norm="distance", order={"l2": "l2", "l1": "l1"},
        extra={"l2": {"lr_init": 0.1}, "l1": {"lr_init": 0.01}}, dlr=(3, 4), min_classes=3),
    Row("pdgd", "pdgd", "Primal-dual gradient descent to the smallest change",
        "Matyasko and Chau 2021, arXiv 2106.01538",
        ("l2",), (_float("lr", "primal_lr", 0.1, "first step"), *_PRIMAL_DUAL)),
    Row("pdpgd", "pdpgd", "Primal-dual proximal gradient descent to the smallest change",
        "Matyasko and Chau 2021, arXiv 2106.01538",
        ("linf", "l2", "l1", "l0"),
        (_float("lr", "primal_lr", None, "first step; none: 0.1, in L0 1"), *_PRIMAL_DUAL,
         _int("proximal_steps", "proximal_steps", 5, "most inner steps of the proximal operator")),
        norm="norm",
        extra={"linf": {"primal_lr": 0.1}, "l2": {"primal_lr": 0.1}, "l1": {"primal_lr": 0.1},
               "l0": {"primal_lr": 1.0, "proximal_operator": 23}}),
    Row("sigma-zero", "sigma_zero", "Sigma-zero: the fewest changed values, by a smoothed count",
        "Cinà et al. 2025, arXiv 2402.01879",
        ("l0",),
        (_steps("num_steps", 1000), _float("eta", "η_0", 1.0, "first step"),
         _float("sigma", "σ", 0.001, "smoothing of the count; smaller is sharper"),
         _float("tau", "τ_0", 0.3, "first size below which changes are dropped", ge=0, le=1),
         _float("tau_factor", "τ_factor", 0.01, "how fast that size moves, as a share of the step")),
        goals=frozenset({"untargeted"}), strength=Strength.STRONG),
    Row("vfga", "vfga", "Greedy, one channel value a step, up or down at random",
        "Césaire et al. 2021, arXiv 2011.12423", ("l0",), (_MOST, _SAMPLES), draws=True),
    Row("fga", "fga", "Greedy, one channel value a step, one way only at random",
        "Césaire et al. 2021, arXiv 2011.12423", ("l0",),
        (_MOST, _SAMPLES, _bool("increasing", "increasing", True, "brighten; no: darken")),
        strength=Strength.ONE_STEP, draws=True),
    Row("cw-l2", "carlini_wagner_l2", "Carlini-Wagner in L2", "Carlini and Wagner 2017, arXiv 1608.04644",
        ("l2",),
        (_steps("max_iterations", 10_000, 10),
         _int("searches", "binary_search_steps", 9, "bisections for the weight of the misclassification"),
         _float("lr", "learning_rate", 0.01, "step"), _float("const", "initial_const", 0.001, "first weight"),
         _float("confidence", "confidence", 0.0, "margin by which the label is left", ge=0),
         _bool("abort_early", "abort_early", True, "stop where no image of the batch improves")),
        entwined=True),
    Row("cw-linf", "carlini_wagner_linf", "Carlini-Wagner in L-inf", "Carlini and Wagner 2017, arXiv 1608.04644",
        ("linf",),
        (_steps("max_iterations", 1000), _float("lr", "learning_rate", 0.01, "step"),
         _float("const", "initial_const", 1e-5, "first weight of the misclassification"),
         _float("largest_const", "largest_const", 20.0, "weight at which the search ends"),
         _float("factor", "const_factor", 2.0, "growth of the weight while nothing is found", gt=1),
         _float("decrease", "decrease_factor", 0.9, "shrinking of the radius after a success", gt=0, lt=1),
         _bool("reduce_const", "reduce_const", False, "halve the weight after a success"),
         _bool("abort_early", "abort_early", True, "end a round when all images of the batch are done")),
        entwined=True),
    Row("fab", "fab", "FAB: projections on linearised decision boundaries", "Croce and Hein 2020, arXiv 1907.02044",
        ("linf", "l2", "l1"),
        (_steps("n_iter", 100),
         _int("targets", "restarts", None, "likeliest other classes to aim at in turn; none: the nearest boundary"),
         _float("alpha", "α_max", 0.1, "largest pull towards the clean image", ge=0, le=1),
         _float("beta", "β", 0.9, "how much of a success is kept for the next step", gt=0, le=1),
         _float("eta", "η", 1.05, "overshooting of the boundary", ge=1)),
        norm="norm", goals=frozenset({"untargeted"})),
    Row("deepfool", "df", "DeepFool: steps to the nearest linearised boundary",
        "Moosavi-Dezfooli et al. 2016, arXiv 1511.04599",
        ("linf", "l2"), (_steps("steps", 100), _OVERSHOOT), norm="norm", goals=frozenset({"untargeted"})),
    Row("superdeepfool", "sdf", "SuperDeepFool: DeepFool, then along the boundary's normal",
        "Abdollahpoorrostam et al. 2024, arXiv 2303.12481",
        ("l2",),
        (_steps("steps", 100), _int("df_steps", "df_steps", 100, "most steps of each DeepFool inside"), _OVERSHOOT,
         _int("searches", "search_iter", 10, "bisections towards the clean image at the end", 0)),
        goals=frozenset({"untargeted"})),
    Row("tr", "tr", "Trust region: many short steps to the nearest boundary", "Yao et al. 2019, arXiv 1812.06371",
        ("linf", "l2"),
        (_steps("iter", 1000), _bool("adaptive", "adaptive", False, "let the radius follow the curvature"),
         _float("radius", "eps", 0.001, "(first) radius a step stays in"),
         _int("targets", "c", 9, "likeliest other classes to choose the nearest of"),
         _bool("worst_case", "worst_case", False, "aim at the farthest of them")),
        norm="p", goals=frozenset({"untargeted"})),
)  # fmt: skip
