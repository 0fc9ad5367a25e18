"""Randomised smoothing (Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918): prediction and certification."""

from __future__ import annotations

import functools

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor

from advplug.defenses.noise import Inner, counted, noisy, tally

BLOCK = 100
"""Noise is drawn in blocks of this many copies, so that it is the same whatever the size of a batch."""
ABSTAINS = -1


@functools.lru_cache(maxsize=4096)
def lower_bound(k: int, n: int, alpha: float) -> float:
    """Clopper and Pearson's lower bound of a share, of which `k` of `n` draws were seen; it fails with `alpha`."""
    return float(beta.ppf(alpha, k, n - k + 1)) if k > 0 else 0.0


def radius(k: int, n: int, alpha: float, sigma: float) -> float | None:
    """The certified L2 radius in pixel units where the class got `k` of `n` votes; None: it abstains (theorem 1)."""
    low = lower_bound(k, n, alpha)
    return None if low < 0.5 else sigma * float(norm.ppf(low))


@functools.lru_cache(maxsize=4096)
def is_sure(first: int, second: int, alpha: float) -> bool:
    """Whether the class of most votes is the likeliest: a two-sided binomial test against the second at `alpha`."""
    if first + second == 0:
        return False
    return bool(binomtest(first, first + second, 0.5).pvalue <= alpha)


def sure(logits: Tensor, n: int, alpha: float) -> Tensor:
    """(B,) bool: which answers are given; `logits` (B, K) are those of `noise.vote` over `n` draws."""
    top = counted(logits, n).topk(2, dim=1).values.tolist()
    given = [is_sure(first, second, alpha) for first, second in top]
    return torch.tensor(given, dtype=torch.bool, device=logits.device)


def sample(inner: Inner, image: Tensor, sigma: float, n: int, rng: torch.Generator, size: int) -> Tensor:
    """Votes (K,) of `n` noisy copies of one image (C, H, W), of which at most `size` pass at once."""
    blocks = [min(BLOCK, n - done) for done in range(0, n, BLOCK)]
    at_once = max(1, size // BLOCK)
    total: Tensor | None = None
    for start in range(0, len(blocks), at_once):
        drawn = [noisy(image.expand(k, *image.shape), sigma, rng) for k in blocks[start : start + at_once]]
        for part in torch.split(torch.cat(drawn), size):
            won = tally(inner(part)).sum(0)
            total = won if total is None else total + won
    assert total is not None
    return total


def certify(
    inner: Inner, image: Tensor, sigma: float, counts: tuple[int, int], alpha: float, rng: torch.Generator, size: int
) -> tuple[int, float]:
    """(label, L2 radius in pixel units) of one image (C, H, W); (`ABSTAINS`, 0) where nothing can be said.

    `counts` are the draws that choose the class and those, independent of them, that bound its share. Within the
    radius the smoothed classifier answers this label, but for a probability of at most `alpha` over the draws.
    """
    chosen = int(sample(inner, image, sigma, counts[0], rng, size).argmax())
    seen = int(sample(inner, image, sigma, counts[1], rng, size)[chosen])
    found = radius(seen, counts[1], alpha, sigma)
    return (ABSTAINS, 0.0) if found is None else (chosen, found)
