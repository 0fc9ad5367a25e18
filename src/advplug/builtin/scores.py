"""Defenses against attackers who read scores: parameters and specs. Torch is imported only when one acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from advplug.contracts import Defense, DefenseCaps, Gradient, Param, Spec, Wrap

if TYPE_CHECKING:
    from torch import Tensor


def score_noise(
    sigma: Annotated[float, Param("standard deviation of the noise", gt=0)] = 0.05,
    on: Annotated[Literal["probabilities", "logits"], Param("what is noisy")] = "probabilities",
    keep_label: Annotated[bool, Param("the answered class stays the best one; no: noise may change it")] = True,
) -> Defense:
    """Noise on every answer's scores. An attacker with the weights differentiates the scores without noise."""

    def forward(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.scores import noisy

        return noisy(inner(x), sigma, on, keep_label, rng)

    return (Wrap(forward, Gradient.BPDA, (_inside,), stochastic=True),)


def score_round(
    decimals: Annotated[int, Param("decimals that each probability keeps", ge=0, le=10)] = 1,
) -> Defense:
    """Rounded probabilities; the answered class stays. An attacker with the weights differentiates those inside."""

    def forward(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
        from advplug.defenses.scores import rounded

        return rounded(inner(x), decimals)

    return (Wrap(forward, Gradient.BPDA, (_inside,)),)


def _inside(inner: Callable[[Tensor], Tensor], x: Tensor, rng: Any) -> Tensor:
    return inner(x)


DEFENSES: list[Spec] = [
    Spec(
        "score-noise",
        "advplug.builtin.scores:score_noise",
        DefenseCaps(("wrap",), Gradient.BPDA, stochastic=True, keeps_scores=False, stand_ins=1),
        "Noise on the scores, against attackers who read them",
        "Aithal and Li 2022, doi 10.1109/ACCESS.2022.3146198",
    ),
    Spec(
        "score-round",
        "advplug.builtin.scores:score_round",
        DefenseCaps(("wrap",), Gradient.BPDA, keeps_scores=False, stand_ins=1),
        "Rounded probabilities, against attackers who read them",
        "Tramer et al. 2016, arXiv 1609.02943",
    ),
]
