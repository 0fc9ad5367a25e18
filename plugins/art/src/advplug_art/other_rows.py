"""Gradient attacks on other sets: shared changes, patches, shades, transport. Imports no torch and no ART."""

from __future__ import annotations

from typing import Any

from advplug.contracts import Strength
from advplug_art.rows import BOTH, Row, Setting, at_least, choice, positive, share, steps, whole

_OURS = "advplug_art.variants:"


def _targeted_universal(setting: Setting) -> dict[str, Any]:
    inner = {"eps": setting.eps * setting.params["step"], "norm": setting.order, "targeted": True}
    # ART checks eps_step although a single step does not use it.
    return {"attacker": "fgsm", "attacker_params": inner | {"eps_step": inner["eps"]}}


def _shadow(setting: Setting) -> dict[str, Any]:
    return {"batch_size": setting.params["copies"]}


def _wasserstein(setting: Setting) -> dict[str, Any]:
    # ART enlarges its budget every `eps_iter` steps until it succeeds; here a budget stays what it is.
    return {"eps_iter": setting.params["steps"] + 1, "ball": "wasserstein"}


def _composite(setting: Setting) -> dict[str, Any]:
    p = setting.params
    return {
        "hue_epsilon": (-p["hue"], p["hue"]),
        "sat_epsilon": (1 - p["saturation"], 1 + p["saturation"]),
        "rot_epsilon": (-p["rotation"], p["rotation"]),
        "bri_epsilon": (-p["brightness"], p["brightness"]),
        "con_epsilon": (1 - p["contrast"], 1 + p["contrast"]),
        "pgd_epsilon": (-p["linf"], p["linf"]),
    }


_COMPOSITE_SET = ("hue", "saturation", "rotation", "brightness", "contrast", "linf")

ROWS: tuple[Row, ...] = (
    Row(
        "universal", _OURS + "universal",
        "One change for the whole batch, built from DeepFool steps",
        "Moosavi-Dezfooli et al. 2016, arXiv 1610.08401",
        ("linf", "l2"), strength=Strength.FLOOR, stochastic=True, per_batch=True,
        given=("norm", "eps", "batch_size", "verbose"), renamed={"rounds": "max_iter"},
        params=(
            whole("rounds", 20, "passes over the batch"),
            positive("delta", 0.2, "share of images that may stay right", le=0.999),
        ),
    ),
    Row(
        "targeted-universal", _OURS + "targeted_universal",
        "One change for the whole batch, built from targeted FGSM steps",
        "Hirano and Takemoto 2019, arXiv 1911.06502",
        ("linf", "l2"), goals=frozenset({"targeted"}), strength=Strength.FLOOR, stochastic=True, per_batch=True,
        given=("norm", "eps", "targeted"), renamed={"rounds": "max_iter"}, ours=("step",),
        arguments=_targeted_universal,
        params=(
            whole("rounds", 20, "passes over the batch"),
            positive("delta", 0.2, "share of images that may miss the target", le=0.999),
            positive("step", 0.5, "FGSM step as a share of eps", le=1),
        ),
    ),
    Row(
        "adversarial-patch", _OURS + "adversarial_patch",
        "One square patch for the whole batch, pasted without rotation or scaling",
        "Brown et al. 2017, arXiv 1712.09665",
        ("patch",), goals=BOTH, strength=Strength.FLOOR, per_batch=True, stochastic=True,
        given=("eps", "targeted", "batch_size", "verbose"), renamed={"steps": "max_iter", "lr": "learning_rate"},
        params=(
            steps(200), positive("lr", 0.05, "Adam's step in pixel units (ART: 5, meant for 0 to 255)"),
            choice("place", "centre", "where the patch goes; random: one place a batch", "centre", "corner", "random"),
        ),
    ),
    Row(
        "shadow", _OURS + "shadow",
        "Shadow attack: a smooth shade over the image, with gradients averaged over noise",
        "Ghiasi et al. 2020, arXiv 2003.08937",
        ("unrestricted",), goals=BOTH, strength=Strength.FLOOR, stochastic=True, one_by_one=True, channels=(1, 3),
        threat=("lambda_tv", "lambda_c", "lambda_s"), given=("targeted", "verbose"), ours=("copies",),
        renamed={"steps": "nb_steps", "lr": "learning_rate"}, arguments=_shadow,
        params=(
            steps(300), positive("lr", 0.1, "step length"),
            positive("sigma", 0.05, "noise on the copies (ART: 0.5, for smoothed classifiers)"),
            whole("copies", 32, "noisy copies a step (ART: 400)"),
            at_least("lambda_tv", 0.3, "weight of the shade's total variation"),
            at_least("lambda_c", 1.0, "weight of its mean size"),
            at_least("lambda_s", 0.5, "weight of differences between channels"),
        ),
    ),
    Row(
        "wasserstein", _OURS + "wasserstein",
        "Moves pixel mass: projected Sinkhorn steps inside a Wasserstein ball of fixed size",
        "Wong et al. 2019, arXiv 1902.07906",
        ("unrestricted",), goals=BOTH, strength=Strength.FLOOR, one_by_one=True,
        threat=("mass", "kernel_size", "power", "regularization"),
        renamed={"steps": "max_iter", "mass": "eps", "power": "p", "step": "eps_step", "step_norm": "norm"},
        arguments=_wasserstein,
        params=(
            positive("mass", 0.3, "size of the ball: share of all pixel mass times the distance that it moves"),
            whole("kernel_size", 5, "pixels across which mass may move; odd"),
            whole("power", 2, "p of the ground distance"),
            positive("regularization", 3000.0, "weight of the entropy"), steps(40),
            positive("step", 0.1, "step length, at most the mass"),
            choice("step_norm", "inf", "norm of the steepest direction", "inf", "2", "1"),
            whole("projected_sinkhorn_max_iter", 400, "iterations of each projection"),
        ),
    ),
    Row(
        "composite", _OURS + "composite",
        "Hue, saturation, rotation, brightness, contrast and an L-inf change together; needs kornia",
        "Hsiung et al. 2022, arXiv 2202.04235",
        ("unrestricted",), strength=Strength.FLOOR, stochastic=True, per_batch=True, channels=(3,),
        threat=_COMPOSITE_SET, given=("batch_size", "verbose"), needs="kornia",
        renamed={"rounds": "max_iter", "steps": "max_inner_iter", "order": "attack_order"}, ours=_COMPOSITE_SET,
        arguments=_composite,
        params=(
            whole("rounds", 5, "times that all parts are gone through, where their order is scheduled"),
            whole("steps", 10, "steps of each part"),
            choice("order", "scheduled", "order of the parts", "scheduled", "random", "fixed"),
            positive("hue", 3.1415, "largest turn of the hue, in radians", le=3.1415),
            share("saturation", 0.3, "largest relative change"),
            positive("rotation", 10.0, "largest angle in degrees", le=360),
            positive("brightness", 0.2, "largest shift of all pixels", le=1),
            share("contrast", 0.3, "largest relative change"),
            positive("linf", 8 / 255, "size of the L-inf part", le=1),
        ),
    ),
)  # fmt: skip
