"""Attacks that only query the deployed system, each image within a budget: one row each. Imports no torch, no ART."""

from __future__ import annotations

import math
from typing import Any

from advplug.contracts import Access, Strength
from advplug_art.rows import BOTH, UNLIMITED, Row, Setting, at_least, choice, positive, queries, share, whole

_EVASION = "art.attacks.evasion:"
_OURS = "advplug_art.variants:"
_POPULATION = 400
"""Images that ART's differential evolution asks for at a time, at least."""


def _square(setting: Setting) -> dict[str, Any]:
    # ART asks three times a step, and shrinks the squares along its number of steps.
    return {"max_iter": max(1, setting.params["queries"] // 3), "p_init": setting.squares(setting.params["p_init"])}


def _simba(setting: Setting) -> dict[str, Any]:
    _, height, width = setting.shape
    space = setting.params["space"]
    if space == "auto":
        space = "dct" if height == width else "px"
    return {"attack": space, "max_iter": setting.params["queries"], "freq_dim": min(4, height), "batch_size": 1}


def _zoo(setting: Setting) -> dict[str, Any]:
    together = min(setting.params["parallel"], math.prod(setting.shape))
    return {"nb_parallel": together, "max_iter": setting.params["steps"], "batch_size": 1}


def _geoda(setting: Setting) -> dict[str, Any]:
    # What it plans with; below 500 it has no plan. It draws its noise in batches, which must not follow the victim's.
    return {"max_iter": max(500, setting.params["queries"]), "batch_size": 64}


def _evolution(setting: Setting) -> dict[str, Any]:
    return {"max_iter": max(1, setting.params["queries"] // _POPULATION), "es": 1}


def _pixel(setting: Setting) -> dict[str, Any]:
    return _evolution(setting) | {"th": int(setting.eps)}


def _threshold(setting: Setting) -> dict[str, Any]:
    # In steps of 1/255, rounded up: what lies outside is asked for at its nearest point in the ball.
    return _evolution(setting) | {"th": max(1, math.ceil(setting.eps * 255))}


_QUERY: dict[str, Any] = {"strength": Strength.FLOOR, "stochastic": True, "one_by_one": True}
_DECISION: dict[str, Any] = {**_QUERY, "access": Access.DECISION, "minimum_norm": True}
_SCORE: dict[str, Any] = {**_QUERY, "access": Access.SCORE}

ROWS: tuple[Row, ...] = (
    Row(
        "boundary", _OURS + "boundary",
        "Boundary attack: a random walk along the decision boundary",
        "Brendel et al. 2017, arXiv 1712.04248",
        ("l2",), fixed={"max_iter": UNLIMITED}, **_DECISION,
        params=(
            queries(5000), positive("delta", 0.01, "first step along the boundary"),
            positive("epsilon", 0.01, "first step toward the image"),
            positive("step_adapt", 0.667, "factor by which steps shrink", le=0.999),
            whole("num_trial", 25, "tries a step"), whole("sample_size", 20, "samples a try"),
        ),
    ),
    Row(
        "hopskipjump", _OURS + "hopskipjump",
        "HopSkipJump: gradients of the boundary, estimated from decisions",
        "Chen et al. 2019, arXiv 1904.02144",
        ("linf", "l2"), given=("norm", "targeted", "batch_size", "verbose"), fixed={"max_iter": UNLIMITED}, **_DECISION,
        params=(
            queries(5000), whole("init_eval", 100, "decisions for the first gradient"),
            whole("max_eval", 10000, "decisions for a gradient at most"),
        ),
    ),
    Row(
        "geoda", _OURS + "geoda",
        "GeoDA: gradients of a nearly flat boundary in a subspace of low frequencies",
        "Rahmati et al. 2020, arXiv 2003.06468",
        ("linf", "l2"), given=("norm", "verbose"), arguments=_geoda, **_DECISION,
        params=(
            queries(4000), whole("sub_dim", 10, "low frequencies a side"),
            positive("bin_search_tol", 0.001, "L2 distance at which the boundary counts as found (ART: 0.1)"),
            positive("lambda_param", 0.6, "how queries grow from one gradient to the next", le=0.999),
            positive("sigma", 0.0002, "size of the noise"),
        ),
    ),
    Row(
        "signopt", _EVASION + "SignOPTAttack",
        "Sign-OPT: signs of directional derivatives of the distance to the boundary",
        "Cheng et al. 2019, arXiv 1909.10773",
        ("l2",), min_classes=3, fixed={"max_iter": UNLIMITED, "query_limit": UNLIMITED}, **_DECISION,
        params=(
            queries(10000), whole("num_trial", 100, "random directions to start from"),
            whole("k", 200, "decisions for a gradient"), positive("epsilon", 0.001, "length of the differences"),
            positive("alpha", 0.2, "first step"), positive("beta", 0.001, "tolerance of line searches"),
        ), ours=("queries",),
    ),
    Row(
        "square", _EVASION + "SquareAttack",
        "Square attack, L-inf: random squares, kept where the margin falls",
        "Andriushchenko et al. 2019, arXiv 1912.00049",
        ("linf",), given=("norm", "eps", "batch_size", "verbose"), arguments=_square, ours=("queries", "p_init"),
        params=(queries(5000), positive("p_init", 0.8, "share of pixels in the first squares", le=0.999)), **_SCORE,
    ),
    Row(
        "simba", _EVASION + "SimBA",
        "SimBA: one frequency or pixel at a time, kept where the probability falls",
        "Guo et al. 2019, arXiv 1905.07121",
        ("l2",), goals=BOTH, minimum_norm=True, probabilities=True, given=("targeted", "verbose"), arguments=_simba,
        ours=("queries", "space"), renamed={"step": "epsilon"}, **_SCORE,
        params=(
            queries(5000), positive("step", 0.1, "length of a step"),
            choice("space", "auto", "frequencies or pixels; auto: frequencies of square images", "auto", "dct", "px"),
            choice("order", "random", "order of pixels", "random", "diag"),
        ),
    ),
    Row(
        "zoo", _EVASION + "ZooAttack",
        "ZOO: Carlini and Wagner's L2 attack on differences of scores",
        "Chen et al. 2017, arXiv 1708.03999",
        ("l2",), goals=BOTH, minimum_norm=True, given=("targeted", "verbose"), arguments=_zoo, clip=(-1.0, 1.0),
        ours=("queries", "parallel", "steps"), renamed={"lr": "learning_rate", "search_steps": "binary_search_steps"},
        fixed={"use_resize": False, "use_importance": False, "abort_early": False}, **_SCORE,
        params=(
            queries(20000), whole("steps", 100, "steps for each constant"),
            whole("search_steps", 3, "constants that are tried"),
            whole("parallel", 128, "values whose derivative is taken in a step"),
            positive("lr", 0.01, "Adam's step"), positive("initial_const", 1.0, "first weight of misclassification"),
            positive("variable_h", 0.01, "length of the differences; float32 scores drown shorter ones"),
            at_least("confidence", 0.0, "margin that the logits must reach"),
        ),
    ),
    Row(
        "virtual-adversarial", _EVASION + "VirtualAdversarialMethod",
        "Virtual adversarial direction, from differences of scores: two passes a value and step",
        "Miyato et al. 2015, arXiv 1507.00677",
        ("l2",), access=Access.SCORE, strength=Strength.FLOOR, stochastic=True, per_batch=True, probabilities=True,
        given=("eps", "batch_size", "verbose"), renamed={"steps": "max_iter"},
        params=(
            whole("steps", 1, "power iterations"),
            positive("finite_diff", 0.01, "length of the differences (ART: 1e-6, which float32 cannot resolve)"),
        ),
    ),
    Row(
        "pixel", _EVASION + "PixelAttack",
        "Few-pixel attack by differential evolution; the number of pixels is eps",
        "Su et al. 2017, arXiv 1710.08864; Vargas and Kotyan 2019, arXiv 1906.06026",
        ("l0",), goals=BOTH, min_classes=3, given=("targeted", "verbose"), arguments=_pixel, params=(queries(10000),),
        probabilities=True, **_SCORE,
    ),
    Row(
        "threshold", _EVASION + "ThresholdAttack",
        "L-inf changes in steps of 1/255 by differential evolution",
        "Vargas and Kotyan 2019, arXiv 1906.06026",
        ("linf",), goals=BOTH, min_classes=3, given=("targeted", "verbose"), arguments=_threshold, in_ball=True,
        params=(queries(10000),), probabilities=True, **_SCORE,
    ),
    Row(
        "spatial", _EVASION + "SpatialTransformation",
        "Shifts and rotations from a grid, for each image by itself",
        "Engstrom et al. 2017, arXiv 1712.02779",
        ("unrestricted",), access=Access.DECISION, strength=Strength.FLOOR, one_by_one=True,
        threat=("max_translation", "max_rotation"), given=("verbose",),
        params=(
            queries(1000), at_least("max_translation", 10.0, "largest shift in percent of each side"),
            whole("num_translations", 5, "shifts a direction"),
            at_least("max_rotation", 30.0, "largest angle in degrees"), whole("num_rotations", 31, "angles"),
        ),
    ),
    Row(
        "laser", _OURS + "laser",
        "A laser beam across the image, found by greedy search",
        "Duan et al. 2021, arXiv 2103.06504",
        ("unrestricted",), channels=(3,), threat=("width",), given=(), params=(
            queries(500), whole("iterations", 50, "steps from each random beam"),
            share("width", 0.2, "largest width as a share of the shorter side"),
        ), **_SCORE,
    ),
)  # fmt: skip
