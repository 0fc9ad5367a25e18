"""Randomised smoothing with certificates: parameters and spec. Torch is imported only when it acts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from advplug.builtin.randomised import voting
from advplug.contracts import Certified, Certifier, Defense, DefenseCaps, Gradient, Objective, Param, Spec
from advplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advplug.rng import Stream

GRID = (0.5, 1.0, 1.5, 2.0)
"""Radii that are reported unless budgets ask for others, as multiples of sigma."""


def smoothing(
    sigma: Annotated[float, Param("standard deviation of the noise, pixels in [0, 1]", gt=0)] = 0.25,
    train: Annotated[
        bool, Param("train the model under the same noise; no: smooth weights as they are, loaded ones too")
    ] = True,
    votes: Annotated[int, Param("noisy copies of an image that vote on its class", ge=1)] = 100,
    n0: Annotated[int, Param("noisy copies that choose the class of a certificate", ge=1)] = 100,
    n: Annotated[int, Param("further noisy copies that bound the class's share; 100,000 in the paper", ge=1)] = 1000,
    alpha: Annotated[
        float, Param("probability with which an answer or a certificate may be wrong", gt=0, lt=0.5)
    ] = 0.001,
    draws: Annotated[int, Param("noisy copies that an attacker draws at each step", ge=1)] = 20,
) -> Defense:
    """The likeliest class under Gaussian noise, or no answer; certified in L2. Noisy images are not clamped."""

    _demand_answers(votes, alpha)

    def accepts(x: Tensor, logits: Tensor) -> Tensor:
        from advplug.defenses.smoothing import sure

        return sure(logits, votes, alpha)

    def certify(inner: Callable[[Tensor], Tensor], image: Tensor, rng: Any, size: int) -> Certified:
        from advplug.defenses.smoothing import certify

        return Certified(*certify(inner, image, sigma, (n0, n), alpha, rng, size))

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        from advplug.defenses.noise import noise_loss

        return noise_loss(model, x, y, sigma, stream)

    certifier = Certifier("l2", certify, alpha, tuple(share * sigma for share in GRID))
    wrap = voting(sigma, votes, draws, accepts, certifier=certifier)
    return (Objective(loss, ("sigma",)), wrap) if train else (wrap,)


def _demand_answers(votes: int, alpha: float) -> None:
    """Raises UsageError where even a unanimous vote is no answer."""
    if 2.0 ** (1 - votes) > alpha:
        least = math.ceil(1 - math.log2(alpha))
        raise UsageError(
            f"smoothing: {votes} votes are never sure at alpha={alpha:g}, so that it would always abstain; "
            f"use votes={least} or more"
        )


TRAINED = DefenseCaps(
    ("objective", "wrap"),
    Gradient.BPDA,
    stochastic=True,
    rejects=True,
    certifies="l2",
    loaded="smoothing:train=no",
    keeps_scores=False,
    asks_many=True,
)


def _caps(params: Mapping[str, Any]) -> DefenseCaps:
    _demand_answers(params["votes"], params["alpha"])
    return TRAINED if params["train"] else replace(TRAINED, stages=("wrap",))


DEFENSES: list[Spec] = [
    Spec(
        "smoothing",
        "advplug.builtin.smoothing:smoothing",
        TRAINED,
        "Randomised smoothing: votes under Gaussian noise with abstention, and certified L2 radii",
        "Cohen et al. 2019, arXiv 1902.02918",
        narrow=_caps,
    )
]
