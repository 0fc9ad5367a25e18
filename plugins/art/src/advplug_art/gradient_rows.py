"""Gradient attacks in norm balls and minimum-norm searches: one row each. Imports no torch and no ART."""

from __future__ import annotations

from typing import Any

from advplug.contracts import Strength
from advplug_art.rows import (
    ALPHA,
    BOTH,
    CONFIDENCE,
    LOSS,
    Row,
    Setting,
    at_least,
    choice,
    positive,
    restarts,
    steps,
    text,
    whole,
)

_EVASION = "art.attacks.evasion:"
_OURS = "advplug_art.variants:"
_BALL = ("norm", "eps", "targeted", "batch_size", "verbose")
_SEARCH = ("targeted", "batch_size", "verbose")


def _fgm(setting: Setting) -> dict[str, Any]:
    return {"eps_step": setting.eps}


def _bim(setting: Setting) -> dict[str, Any]:
    # The same share as the core's: it can cross the ball and still settle.
    return {"eps_step": setting.step(min(1.0, 2.5 / setting.params["steps"]))}


def _momentum(setting: Setting) -> dict[str, Any]:
    return {"eps_step": setting.step(1 / setting.params["steps"])}


def _adaptive(setting: Setting) -> dict[str, Any]:
    # ART's 0.1 is no share of eps; the papers start from 2 eps.
    return {"eps_step": 2 * setting.eps}


_CW = {"steps": "max_iter", "search_steps": "binary_search_steps", "lr": "learning_rate"}
_CW_PARAMS = (
    whole("steps", 100, "descent steps for each constant (ART's own default is 10)"),
    whole("search_steps", 10, "constants that are tried"),
    positive("lr", 0.01, "step length at the start of each line search"),
    positive("initial_const", 0.01, "first weight of the misclassification term"),
    CONFIDENCE,
)
_ADAPTIVE: dict[str, Any] = {
    "norms": ("linf", "l2"),
    "goals": BOTH,
    "stochastic": True,
    "per_batch": True,
    "given": _BALL,
    "renamed": {"steps": "max_iter", "restarts": "nb_random_init", "loss": "loss_type"},
    "arguments": _adaptive,
    "params": (steps(100), restarts(1), LOSS),
}

ROWS: tuple[Row, ...] = (
    Row(
        "fgm", _EVASION + "FastGradientMethod",
        "Fast gradient method: one step of length eps",
        "Goodfellow et al. 2014, arXiv 1412.6572",
        ("linf", "l2"), goals=BOTH, strength=Strength.ONE_STEP,
        given=("norm", "eps", "targeted", "batch_size"), arguments=_fgm,
    ),
    Row(
        "bim", _EVASION + "BasicIterativeMethod",
        "Basic iterative method: small steps from the clean image, last iterate",
        "Kurakin et al. 2016, arXiv 1607.02533",
        ("linf",), goals=BOTH, given=("eps", *_SEARCH), renamed={"steps": "max_iter"}, arguments=_bim,
        params=(steps(10), ALPHA),
    ),
    Row(
        "pgd", _EVASION + "ProjectedGradientDescent",
        "Projected gradient descent: last iterate of each start (ART's own default has no random start)",
        "Madry et al. 2017, arXiv 1706.06083",
        ("linf", "l2"), goals=BOTH, stochastic=True, per_batch=True, given=_BALL,
        renamed={"steps": "max_iter", "restarts": "num_random_init"}, arguments=_bim,
        params=(steps(20), ALPHA, whole("restarts", 1, "random starts; 0 starts at the clean image", ge=0)),
    ),
    Row(
        "mim", _EVASION + "MomentumIterativeMethod",
        "Momentum iterative method",
        "Dong et al. 2017, arXiv 1710.06081",
        ("linf", "l2"), goals=BOTH, given=_BALL, renamed={"steps": "max_iter"}, arguments=_momentum,
        params=(steps(10), ALPHA, at_least("decay", 1.0, "share of the momentum that is kept")),
    ),
    Row(
        "apgd", _OURS + "apgd",
        "Auto-PGD as ART writes it: weaker than its authors' own (aa.apgd-ce)",
        "Croce and Hein 2020, arXiv 2003.01690", **_ADAPTIVE,
    ),
    Row(
        "acg", _OURS + "acg",
        "Auto conjugate gradient",
        "Yamamura et al. 2022, arXiv 2206.09628", **_ADAPTIVE,
    ),
    Row(
        "reacg", _OURS + "reacg",
        "Rescaling auto conjugate gradient",
        "Yamamura et al. 2024, arXiv 2405.15082", **_ADAPTIVE,
    ),
    Row(
        "autoattack", _OURS + "autoattack",
        "APGD-CE, APGD-DLR, DeepFool, Square: not the published one",
        "after Croce and Hein 2020, arXiv 2003.01690",
        ("linf",), stochastic=True, per_batch=True, min_classes=3,
        given=("norm", "eps", "batch_size"), arguments=lambda s: {"p_init": s.squares(0.8)},
        params=(
            whole("steps", 100, "steps of each APGD and of DeepFool"), restarts(5),
            whole("square_steps", 5000, "steps of Square, for each of the restarts"),
        ),
    ),
    Row(
        "deepfool", _OURS + "deepfool",
        "DeepFool: the nearest boundary of a linearised model, again and again",
        "Moosavi-Dezfooli et al. 2015, arXiv 1511.04599",
        ("l2",), minimum_norm=True, given=("batch_size", "verbose"),
        renamed={"steps": "max_iter", "overshoot": "epsilon", "candidates": "nb_grads"},
        params=(
            whole("steps", 50, "linearisations"),
            at_least("overshoot", 0.02, "share by which the change is enlarged in the end (ART's own default is 1e-6)"),
            whole("candidates", 10, "best-scoring classes that are considered", ge=2),
        ),
    ),
    Row(
        "cw-l2", _EVASION + "CarliniL2Method",
        "Carlini and Wagner, L2",
        "Carlini and Wagner 2016, arXiv 1608.04644",
        ("l2",), goals=BOTH, minimum_norm=True, renamed=_CW, params=_CW_PARAMS,
    ),
    Row(
        "cw-linf", _EVASION + "CarliniLInfMethod",
        "Carlini and Wagner, L-inf",
        "Carlini and Wagner 2016, arXiv 1608.04644",
        ("linf",), goals=BOTH, strength=Strength.FLOOR, minimum_norm=True,
        renamed={"steps": "max_iter", "lr": "learning_rate"},
        params=(
            whole("steps", 30, "descent steps for each constant (ART: 10)"), _CW_PARAMS[2],
            positive("decrease_factor", 0.9, "how the allowed distance shrinks after a success", le=0.999),
            positive("initial_const", 1e-5, "first weight of the misclassification term"),
            positive("largest_const", 20.0, "largest weight that is tried"),
            at_least("const_factor", 2.0, "growth of the weight", ge=1.001), CONFIDENCE,
        ),
    ),
    Row(
        "elastic-net", _EVASION + "ElasticNet",
        "EAD: elastic-net regularised changes",
        "Chen et al. 2017, arXiv 1709.04114",
        ("l1",), goals=BOTH, minimum_norm=True,
        renamed={"steps": "max_iter", "search_steps": "binary_search_steps", "lr": "learning_rate",
                 "rule": "decision_rule"},
        params=(
            whole("steps", 100, "descent steps for each constant"),
            whole("search_steps", 9, "constants that are tried"), _CW_PARAMS[2],
            positive("initial_const", 1e-3, "first weight of the misclassification term"),
            positive("beta", 1e-3, "weight of the L1 norm"),
            choice("rule", "L1", "what the best success is least in", "EN", "L1", "L2"), CONFIDENCE,
        ),
    ),
    Row(
        "jsma", _OURS + "jsma",
        "Saliency maps: raises the two values with the largest gradient; untargeted, toward the runner-up",
        "Papernot et al. 2015, arXiv 1511.07528",
        ("l0",), goals=BOTH, strength=Strength.FLOOR, minimum_norm=True, ours=(),
        params=(
            positive("theta", 0.1, "how much a value is raised at a time", le=1),
            positive("gamma", 1.0, "largest share of values to change", le=1),
        ),
    ),
    Row(
        "newtonfool", _EVASION + "NewtonFool",
        "NewtonFool: descends the probability of the predicted class",
        "Jang et al. 2017, doi 10.1145/3134600.3134635",
        ("l2",), strength=Strength.FLOOR, minimum_norm=True, probabilities=True, given=("batch_size", "verbose"),
        renamed={"steps": "max_iter"},
        params=(steps(100), positive("eta", 0.01, "step as a share of the image's norm")),
    ),
    Row(
        "brendel-bethge", _OURS + "brendel_bethge",
        "Brendel and Bethge: along the decision boundary, from a random misclassified image; needs numba",
        "Brendel et al. 2019, arXiv 1907.01003",
        ("linf", "l2", "l1"), strength=Strength.FLOOR, stochastic=True, one_by_one=True, minimum_norm=True,
        given=("norm", "targeted", "batch_size"), needs="numba", min_classes=2,
        params=(
            whole("steps", 1000, "steps along the boundary"), positive("lr", 1e-3, "size of the trust region"),
            at_least("momentum", 0.8, "of the boundary's normal"),
            at_least("overshoot", 1.1, "how far across the boundary a step aims", ge=1.0),
        ),
    ),
    Row(
        "feature-adversaries", _OURS + "feature_adversaries",
        "Moves a layer's features toward those of another image of the batch, of another class or the target",
        "Sabour et al. 2015, arXiv 1511.05122",
        ("linf",), goals=BOTH, strength=Strength.FLOOR, per_batch=True,
        given=("eps", "batch_size", "verbose", "targeted"), renamed={"steps": "max_iter"},
        arguments=lambda s: {"step_size": s.step(min(1.0, 2.5 / s.params["steps"]))},
        params=(
            steps(100), ALPHA,
            text("layer", "", "submodule whose output is matched; empty: the model's logits"),
        ),
    ),
)  # fmt: skip
