"""Passes of few sizes, since prepared kernels are kept for each; none that costs more than it has to."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from advplug.contracts import Gradient, Wrap
from advplug.victim import PASS_COST, Victim, cover, decide_padded, parts_of, span


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 100, 128])
def test_passes_hold_the_images_and_sizes_are_few(most: int) -> None:
    used = set()
    for n in range(3 * most):
        passes = cover(n, most)
        assert sum(count for count, _ in passes) == n
        assert all(0 < count <= size <= most for count, size in passes)
        assert all(count == size for count, size in passes[:-1]), "only the last is filled up"
        assert span(n, most) == sum(size for _, size in passes)
        used |= {size for _, size in passes}
    assert len(used) <= 2 * most.bit_length()


def test_no_other_cover_is_cheaper() -> None:
    sizes = sorted({size for n in range(1, 65) for _, size in cover(n, 64)})
    for n in range(1, 65):
        best = min(
            sum(way) + PASS_COST * len(way)
            for k in (1, 2, 3)
            for way in itertools.combinations_with_replacement(sizes, k)
            if sum(way) >= n
        )
        assert sum(size + PASS_COST for _, size in cover(n, 64)) <= best


def test_little_is_wasted_of_large_batches() -> None:
    assert all(span(n, 128) - n < 2 * PASS_COST for n in range(1, 129))


def _first_pixel(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, 0, 0, 0], 0.5 - x[:, 0, 0, 0]], 1)


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return _first_pixel(x)


def test_answers_are_those_of_the_images_alone() -> None:
    net = Recorder()
    victim = Victim(net, 2, batch_size=32)
    x = torch.rand(75, 1, 1, 1)
    answer = decide_padded(victim, x)
    assert answer.label.equal(_first_pixel(x).argmax(1))
    assert answer.accepted.all()
    assert answer.scores is not None
    assert answer.scores.equal(_first_pixel(x))
    assert net.sizes == [size for _, size in cover(75, 32)]
    assert decide_padded(victim, x[:0]).label.shape == (0,)


@pytest.mark.parametrize("how", ["stochastic", "batch_dependent"])
def test_nothing_is_filled_up_where_company_matters(how: str) -> None:
    noisy = Wrap(lambda inner, x, rng: inner(x), Gradient.EXACT, stochastic=how == "stochastic")
    victim = Victim(nn.Identity(), 2, (noisy,), batch_size=32, batch_dependent=how == "batch_dependent")
    assert [(len(rows), count) for rows, count in parts_of(victim, 70)] == [(32, 32), (32, 32), (6, 6)]
