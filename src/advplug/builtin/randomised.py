"""Randomised defenses: dropout at inference, votes under Gaussian noise. Torch is imported only when they act."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from advplug.contracts import Defense, DefenseCaps, Gradient, Param, Spec, Stack, Tune, Tuned, Wrap
from advplug.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from advplug.train import Training

TOGETHER = 4
"""Noisy copies that are averaged inside one attacked pass; a gradient takes several such passes."""
DECISIONS = 4
"""Fresh votes on each image: a vote of many copies hardly varies, and each costs as many passes."""
PROBES = 2
BEFORE = "before:"


def dropout(
    rate: Annotated[
        float | None, Param("share that is dropped; none: each layer's own, 0.3 where it is put in", gt=0, lt=1)
    ] = None,
    layers: Annotated[
        Stack | None,
        Param("in front of which to put it, as (fc1+fc2); none: the last linear one, if there is none yet"),
    ] = None,
    draws: Annotated[int, Param("fresh masks that an attacker draws at each step", ge=1)] = 20,
) -> Defense:
    """Keeps dropout on when the model is judged; puts it in where the model has none.

    `Tune.apply` raises UsageError where a layer is unknown or there is nowhere to put it.
    """
    names = _names(layers)

    def apply(model: nn.Module, training: Training) -> Tuned:
        import torch

        from advplug.defenses.dropout import USUAL, place

        info = training.info
        x = torch.full((PROBES, info.channels, *info.size), 0.5, device=training.device)
        chosen, calls = place(model.to(training.device).eval(), x, names, rate or USUAL)
        where = ", ".join(chosen)
        facts = {"dropout": f"in front of {where}" if where else "the model's own", "dropouts_a_pass": calls}
        return Tuned(model, {f"{BEFORE}{name}": torch.tensor([1]) for name in chosen}, facts)

    def rebuild(model: nn.Module, structure: Mapping[str, Tensor]) -> nn.Module:
        from advplug.defenses.dropout import USUAL, put_in

        put_in(model, (key.removeprefix(BEFORE) for key in structure), rate or USUAL)
        return model

    def forward(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.dropout import drop

        return drop(inner, x, rate, rng)

    return (Tune(apply, rebuild), Wrap(forward, stochastic=True, draws=draws))


def _names(layers: Stack | None) -> tuple[str, ...]:
    for part in layers or ():
        if part.params:
            raise UsageError(f"dropout: '{part}' is no layer name; write layers={part.name}")
    return tuple(part.name for part in layers or ())


def noise_vote(
    sigma: Annotated[float, Param("standard deviation of the noise, pixels in [0, 1]", gt=0)] = 0.05,
    votes: Annotated[int, Param("noisy copies of an image that vote on its class", ge=1)] = 100,
    draws: Annotated[int, Param("noisy copies that an attacker draws at each step", ge=1)] = 20,
) -> Defense:
    """The class of most votes among noisy copies of the image."""
    return (voting(sigma, votes, draws),)


def together(draws: int) -> int:
    """Noisy copies of one attacked pass: two passes at least, where it can be, since a gradient weighs passes, and not
    only answers."""
    return min(TOGETHER, max(1, draws // 2))


def voting(
    sigma: float, votes: int, draws: int, accepts: Callable[[Tensor, Tensor], Tensor] | None = None, **rest: Any
) -> Wrap:
    """Votes under noise, attacked through the mean softmax and the mean logits; `rest` are further fields of the wrap.

    Scores are logarithms of the shares of the votes.
    """

    def forward(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.noise import vote

        return vote(inner, x, sigma, votes, rng)

    def mean_softmax(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.noise import mean_softmax

        return mean_softmax(inner, x, sigma, copies, rng)

    def mean_logits(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.noise import mean_logits

        return mean_logits(inner, x, sigma, copies, rng)

    copies = together(draws)
    views = (mean_softmax, mean_logits)
    return Wrap(forward, Gradient.BPDA, views, True, math.ceil(draws / copies), accepts, decisions=DECISIONS, **rest)


DEFENSES: list[Spec] = [
    Spec(
        "dropout",
        "advplug.builtin.randomised:dropout",
        DefenseCaps(("tune", "wrap"), stochastic=True),
        "Dropout that stays on when the model is judged; put in front of the last linear layer where there is none",
        "Gal and Ghahramani 2016, arXiv 1506.02142; Feinman et al. 2017, arXiv 1703.00410",
    ),
    Spec(
        "noise-vote",
        "advplug.builtin.randomised:noise_vote",
        DefenseCaps(("wrap",), Gradient.BPDA, stochastic=True, keeps_scores=False, asks_many=True),
        "Majority of votes over Gaussian noise, without a certificate",
        "Cao and Gong 2017, arXiv 1709.05583; through the mean softmax: Salman et al. 2019, arXiv 1906.04584",
    ),
]
