"""Training losses of adversarial training, TRADES, MART and gradient regularisation.

Each maker returns (model, x, y, stream) -> scalar, as `contracts.Objective` wants it. Where a loss needs clean and
adversarial images they pass together, so that batch norm normalises both by the statistics it keeps for later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from advplug.defenses.adversarial import Examples, divergence
from advplug.rng import Stream

TrainingLoss: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Stream], Tensor]


def mixed(examples: Examples, share: float) -> TrainingLoss:
    """Cross-entropy of batches in which a `share` of the images, at least one, is replaced by its adversarial example
    (Madry et al. 2017, arXiv 1706.06083, eq. 2.1; mixtures: Kurakin et al. 2016, arXiv 1611.01236)."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        count = max(1, round(share * len(x)))
        changed = examples(model, x[:count], y[:count], stream)
        return cross_entropy(model(torch.cat([changed, x[count:]])), y)

    return loss


def added(examples: Examples, weight: float) -> TrainingLoss:
    """CE(x) + weight CE(x_adv)."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        clean, worst = _both(model, x, examples(model, x, y, stream))
        return cross_entropy(clean, y) + weight * cross_entropy(worst, y)

    return loss


def trades(examples: Examples, beta: float) -> TrainingLoss:
    """CE(x) + beta KL(f(x) || f(x_adv)) (Zhang et al. 2019, arXiv 1901.08573, algorithm 1)."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        clean, worst = _both(model, x, examples(model, x, y, stream))
        apart = divergence(clean.log_softmax(1), worst.log_softmax(1))
        return cross_entropy(clean, y) + beta * apart.mean()

    return loss


def mart(examples: Examples, weight: float) -> TrainingLoss:
    """BCE(x_adv) + weight KL(f(x) || f(x_adv)) (1 - f_y(x)) (Wang et al. 2020, ICLR, section 3).

    BCE is -log p_y - log(1 - p_k), with k the best wrong class; the published code bounds the second logarithm's
    argument from below by 0.0001, here it is computed from the logits and needs no bound.
    """

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        clean, worst = _both(model, x, examples(model, x, y, stream))
        p, q, own = clean.log_softmax(1), worst.log_softmax(1), y[:, None]
        rival = q.detach().scatter(1, own, -torch.inf).argmax(1, keepdim=True)
        boosted = -q.gather(1, own) - q.scatter(1, rival, -torch.inf).logsumexp(1, keepdim=True)
        unsure = 1 - p.gather(1, own).exp()
        return boosted.mean() + weight * (divergence(p, q) * unsure.squeeze(1)).mean()

    return loss


def smooth_in_the_input(weight: float) -> TrainingLoss:
    """CE(x) + weight mean ||grad_x CE(x_i)||_2^2, by double backpropagation (Ross and Doshi-Velez 2018,
    arXiv 1711.09404), with pixels in [0, 1]."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        leaf = x.detach().requires_grad_()
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            total = cross_entropy(model(leaf), y, reduction="sum")
        (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
        return (total + weight * slope.square().sum()) / len(y)

    return loss


def _both(model: nn.Module, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    clean, worst = model(torch.cat([x, x_adv])).chunk(2)
    return clean, worst
