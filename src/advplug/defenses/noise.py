"""Classifiers under Gaussian noise: the votes that decide, and what an attacker differentiates in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from advplug.rng import Stream

Inner = Callable[[Tensor], Tensor]

ROWS = 32
"""Few images are repeated up to this many rows a pass, without gradient; more than that pass once a draw."""
HALF = 0.5
"""What every class gets beside its votes, so that no score is infinite (Krichevsky and Trofimov's estimator)."""


def noisy(x: Tensor, sigma: float, rng: torch.Generator) -> Tensor:
    """`x` with Gaussian noise of standard deviation `sigma` in pixel units; never clamped, as certificates demand."""
    return x + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def tally(logits: Tensor) -> Tensor:
    """(B, K) int64: one vote a row for the largest logit, none where a logit is not finite."""
    chosen = functional.one_hot(logits.nan_to_num().argmax(1), logits.shape[1])
    return chosen * logits.isfinite().all(1, keepdim=True)


def votes(inner: Inner, x: Tensor, sigma: float, n: int, rng: torch.Generator) -> Tensor:
    """How often each class wins (B, K) in `n` draws of noise around each image (B, C, H, W)."""
    total: Tensor | None = None
    for k in _copies(len(x), n):
        won = tally(inner(noisy(x.repeat(k, 1, 1, 1), sigma, rng)))
        won = won.view(k, len(x), -1).sum(0)
        total = won if total is None else total + won
    assert total is not None
    return total


def _copies(rows: int, n: int) -> Iterator[int]:
    most = max(1, ROWS // max(rows, 1))
    while n > 0:
        yield min(most, n)
        n -= most


def scores(won: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Votes (B, K) out of `n` as logits whose softmax are the shares of the votes, each class given half a vote more.

    NaN where nobody voted, which no label answers.
    """
    shares = (won.to(dtype) + HALF) / (n + HALF * won.shape[1])
    return shares.log().masked_fill(won.sum(1, keepdim=True) == 0, torch.nan)


def counted(logits: Tensor, n: int) -> Tensor:
    """The inverse of `scores`: votes (B, K) int64 out of `n`."""
    won = logits.double().exp() * (n + HALF * logits.shape[1]) - HALF
    return won.round().nan_to_num().long()


def vote(inner: Inner, x: Tensor, sigma: float, n: int, rng: torch.Generator) -> Tensor:
    """The voting classifier's logits (B, K): see `votes` and `scores`."""
    return scores(votes(inner, x, sigma, n, rng), n, x.dtype)


def _draws(inner: Inner, x: Tensor, sigma: float, n: int, rng: torch.Generator) -> Tensor:
    return torch.stack([inner(noisy(x, sigma, rng)) for _ in range(n)])


def _log_mean(drawn: Tensor) -> Tensor:
    return drawn.log_softmax(2).logsumexp(0) - math.log(len(drawn))


def mean_softmax(inner: Inner, x: Tensor, sigma: float, n: int, rng: torch.Generator) -> Tensor:
    """Differentiable logits (B, K): the log of the mean softmax over `n` draws.

    Salman et al. 2019, arXiv 1906.04584: cross-entropy of the mean, not the mean of cross-entropies.
    """
    return _log_mean(_draws(inner, x, sigma, n, rng))


def mean_logits(inner: Inner, x: Tensor, sigma: float, n: int, rng: torch.Generator) -> Tensor:
    """The values of `mean_softmax` with the gradients of the mean logits, which do not vanish where a draw is sure.

    Values of one kind let an attack compare what it found through either.
    """
    drawn = _draws(inner, x, sigma, n, rng)
    mean = drawn.mean(0)
    return mean + (_log_mean(drawn) - mean).detach()


def noise_loss(model: Inner, x: Tensor, y: Tensor, sigma: float, stream: Stream) -> Tensor:
    """Cross-entropy on one noisy copy of each image (Cohen et al. 2019, arXiv 1902.02918, section 3.3)."""
    rng = stream.generator("noise", device=x.device)
    return functional.cross_entropy(model(noisy(x, sigma, rng)), y)
