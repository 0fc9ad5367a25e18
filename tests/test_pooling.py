"""Several draws of an answer: one loss, one gradient, and what an attack makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from advplug.attacks.engine import GradientAttack, _Run
from advplug.attacks.losses import cross_entropy
from advplug.attacks.pooling import Draws
from advplug.builtin import gradient
from advplug.contracts import Batch, Targeted, Wrap
from advplug.parse import parse_stack
from advplug.victim import Victim
from linear import Function, problem, stream, threat

D, B, K = 7, 3, 4
Y = torch.tensor([0, 1, 3])


def read(draws: int = D) -> tuple[Tensor, Draws, Draws, Tensor]:
    """Images, both ways to take `draws` readings of them together, and all logits (draws, B, K)."""
    g = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(draws, 12, K, generator=g, dtype=torch.float64)
    x = torch.rand(B, 3, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    mean, standing = Draws(False), Draws(True)
    logits = torch.stack([x.flatten(1) @ w for w in weight])
    for z in logits:
        loss = cross_entropy(z, Y)
        (slope,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        for both in (mean, standing):
            both.add(loss.detach(), (z.argmax(1) != Y).double(), slope)
    return x, mean, standing, logits


def test_the_mean_of_the_losses_and_the_loss_of_the_mean_probability() -> None:
    x, mean, standing, logits = read()
    probability = logits.softmax(2)[:, torch.arange(B), Y]
    rate = (logits.argmax(2) != Y).double().mean(0)
    for draws, wanted in ((mean, -probability.log().mean(0)), (standing, -probability.mean(0).log())):
        loss, votes, slope = draws.together()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(votes, rate)
        torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), x, retain_graph=True)[0])


def test_a_single_draw_is_itself() -> None:
    _, mean, standing, _ = read(1)
    for a, b in zip(mean.together(), standing.together(), strict=True):
        assert torch.equal(a, b)


def test_losses_beyond_all_numbers_and_nan_stay_with_their_image() -> None:
    draws = Draws(True)
    one = torch.ones(3, 1, 1, 1)
    draws.add(torch.tensor([300.0, torch.inf, torch.nan]), torch.ones(3), one)
    draws.add(torch.tensor([500.0, torch.inf, 1.0]), torch.ones(3), 3 * one)
    loss, _, slope = draws.together()
    assert loss[0] == pytest.approx(300 + np.log(2))
    assert loss[1] == torch.inf
    assert loss[2].isnan()
    assert slope.flatten()[:2].tolist() == [1.0, 2.0]


def two_faces(x: Tensor) -> list[Tensor]:
    """Two answers with a pixel d off grey: the first is wrong above 0.1 and ever more so, the second below 0.25."""
    d = x.flatten(1)[:, 0] - 0.5
    first, second = 3 - 30 * d, 20 * d.relu() - 5
    return [torch.stack([right, torch.zeros_like(right)], 1) for right in (first, second)]


def either(inner: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator) -> Tensor:
    """One of both for the whole batch, by the toss of a coin."""
    return two_faces(x)[int(torch.randint(2, (1,), generator=rng))]


def coin() -> tuple[Victim, Batch]:
    x = torch.full((8, 1, 1, 1), 0.5, dtype=torch.float64)
    return (
        Victim(Function(lambda x: two_faces(x)[0]), 2, (Wrap(either, stochastic=True, draws=40),)),
        Batch(x, torch.zeros(8, dtype=torch.long), torch.arange(8)),
    )


@pytest.mark.parametrize("attack", [gradient.apgd(40), gradient.pgd(40), gradient.apgd(40, loss="margin")])
def test_no_draw_is_given_up_for_the_loss_of_another(attack: GradientAttack) -> None:
    """Both answers are wrong between 0.1 and 0.25 only. The mean of the losses is highest at the rim of the ball, where
    the second is right; each step sees both faces, up to a chance of 2 ^ -39."""
    victim, batch = coin()
    out = attack(victim, batch, threat(0.5), stream())
    for answer in two_faces(out.x):
        assert (answer.argmax(1) == 1).all()

    def mean(d: float) -> float:
        faces = two_faces(torch.full((1, 1, 1, 1), 0.5 + d))
        return sum(float(functional.cross_entropy(z, torch.tensor([0]))) for z in faces)

    assert mean(0.5) > max(mean(d) for d in np.linspace(0.1, 0.25, 50))


def test_what_is_aimed_at_or_transformed_is_averaged() -> None:
    p = problem(5)
    randomised = (Wrap(lambda f, x, rng: f(x + 0 * torch.rand(1, generator=rng)), stochastic=True, draws=2),)
    moved = gradient.eot_pgd(transforms=parse_stack("noise:sigma=0.05"))
    aimed = Batch(p.batch.x, p.batch.y, p.batch.index, (p.batch.y + 1) % 5)
    for attack, batch, goal, wraps, standing in (
        (gradient.apgd(), p.batch, None, randomised, True),
        (gradient.apgd(), p.batch, None, (), False),
        (moved, p.batch, None, randomised, False),
        (gradient.apgd_t(n_targets=2), p.batch, None, randomised, False),
        (gradient.apgd(), aimed, Targeted(), randomised, False),
    ):
        assert _Run(attack, p.victim(wraps), batch, threat(0.1, goal=goal), stream()).standing is standing
