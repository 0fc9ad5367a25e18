"""Changed scores: what a deployed system says of its certainty, for the trouble of attackers who climb by it.

Scores are answered as logits whose softmax gives the probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Probabilities are at least this before their logarithm is taken."""
LEAD = 1e-5
"""By how much a label's logarithm exceeds that of a tie."""


def noisy(logits: Tensor, sigma: float, on: str, keep_label: bool, rng: torch.Generator) -> Tensor:
    """Logits (B, K) with Gaussian noise of standard deviation `sigma` on themselves or `on` 'probabilities'.

    With `keep_label` the answer stays: where noise made another class the first, the two change places. Rows that
    are not finite stay as they are.
    """
    draws = torch.randn(logits.shape, generator=rng, device=rng.device, dtype=torch.float32).to(logits)
    before = logits.softmax(1) if on == "probabilities" else logits
    after = before + sigma * draws
    if keep_label:
        after = first(after, logits.argmax(1))
    made = _log(after.clamp_min(0)) if on == "probabilities" else after
    return torch.where(logits.isfinite().all(1, keepdim=True), made, logits)


def rounded(logits: Tensor, decimals: int) -> Tensor:
    """Logits (B, K) of the probabilities rounded to so many decimals; the answer stays.

    Rounding makes ties; the label goes first among them by a hair. Rows that are not finite stay as they are.
    """
    label = logits.argmax(1, keepdim=True)
    made = _log(logits.double().softmax(1).mul(10**decimals).round().div(10**decimals))
    lead = made.gather(1, label) + LEAD
    made = made.scatter(1, label, lead).to(logits)
    return torch.where(logits.isfinite().all(1, keepdim=True), made, logits)


def first(scores: Tensor, label: Tensor) -> Tensor:
    """`scores` (B, K) in which the best one and that of `label` (B,) have changed places."""
    best, own = scores.max(1, keepdim=True), scores.gather(1, label[:, None])
    return scores.scatter(1, best.indices, own).scatter(1, label[:, None], best.values)


def _log(weights: Tensor) -> Tensor:
    """Logarithms of the weights' shares; those of equal classes where nothing is left."""
    total = weights.sum(1, keepdim=True)
    shares = torch.where(total > 0, weights / total.clamp_min(FLOOR), 1 / weights.shape[1])
    return shares.clamp_min(FLOOR).log()
