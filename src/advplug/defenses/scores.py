"""Changed scores: what a deployed system says of its certainty, for the trouble of attackers who climb by it.

Scores are answered as logits whose softmax gives the probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Probabilities are at least this before their logarithm is taken."""
LEAD = 1e-5
"""What the label's logarithm gets on top, for it to lead where rounding makes ties."""


def noisy(logits: Tensor, sigma: float, on: str, keep_label: bool, rng: torch.Generator) -> Tensor:
    """Logits (B, K) with Gaussian noise of standard deviation `sigma` on themselves or `on` 'probabilities'.

    With `keep_label` the answer stays: where noise made another class the first, the two change places. Rows that
    are not finite stay as they are.
    """
    draws = torch.randn(logits.shape, generator=rng, device=rng.device, dtype=torch.float32).to(logits)
    before = logits.softmax(1) if on == "probabilities" else logits
    after = before + sigma * draws
    made = _log(after.clamp_min(0)) if on == "probabilities" else after
    if keep_label:
        made = first(made, logits.argmax(1))
    return torch.where(logits.isfinite().all(1, keepdim=True), made, logits)


def rounded(logits: Tensor, decimals: int) -> Tensor:
    """Logits (B, K) of the probabilities rounded to so many decimals; the answer stays.

    Rows that are not finite stay as they are.
    """
    made = _log(logits.double().softmax(1).mul(10**decimals).round().div(10**decimals))
    made = first(made, logits.argmax(1)).to(logits)
    return torch.where(logits.isfinite().all(1, keepdim=True), made, logits)


def first(scores: Tensor, label: Tensor) -> Tensor:
    """`scores` (B, K) in which the best one and that of `label` (B,) have changed places; a tie it wins by a hair."""
    best, own = scores.max(1, keepdim=True), scores.gather(1, label[:, None])
    return scores.scatter(1, best.indices, own).scatter(1, label[:, None], best.values + LEAD)


def _log(weights: Tensor) -> Tensor:
    """Logarithms of the weights' shares; those of equal classes where nothing is left."""
    total = weights.sum(1, keepdim=True)
    shares = torch.where(total > 0, weights / total.clamp_min(FLOOR), 1 / weights.shape[1])
    return shares.clamp_min(FLOOR).log()
