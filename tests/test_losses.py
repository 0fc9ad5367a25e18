"""Losses: values by hand, direction, invariances, class counts."""

from __future__ import annotations

import pytest
import torch

from advplug.attacks.losses import LOSSES, cross_entropy, dlr, loss_named, margin
from advplug.errors import CellFailure, UsageError

Z = torch.tensor([[4.0, 1.0, 3.0, 0.0], [2.0, 5.0, 1.0, 0.5]], dtype=torch.float64)
Y = torch.tensor([0, 0])
T = torch.tensor([2, 3])


def test_values_by_hand() -> None:
    assert margin(Z, Y).tolist() == [-1.0, 3.0]
    assert margin(Z, Y, T).tolist() == [-1.0, -4.5]
    # -(z_y - best other) / (z_1 - z_3)
    assert dlr(Z, Y).tolist() == pytest.approx([-(4 - 3) / (4 - 1), -(2 - 5) / (5 - 1)])
    # -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)
    assert dlr(Z, Y, T).tolist() == pytest.approx([-(4 - 3) / (4 - 0.5), -(2 - 0.5) / (5 - 0.75)])
    expected = torch.logsumexp(Z, 1) - Z[:, 0]
    torch.testing.assert_close(cross_entropy(Z, Y), expected)
    torch.testing.assert_close(cross_entropy(Z, Y, T), Z[[0, 1], T] - torch.logsumexp(Z, 1))


@pytest.mark.parametrize("target", [None, T])
def test_dlr_ignores_shift_and_scale(target: torch.Tensor | None) -> None:
    torch.testing.assert_close(dlr(7 * Z - 3, Y, target), dlr(Z, Y, target))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("target", [None, T])
def test_gradients_against_finite_differences(name: str, target: torch.Tensor | None) -> None:
    z = Z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, Y, target), (z,))


def test_losses_grow_with_the_attack() -> None:
    for loss in LOSSES.values():
        assert loss(torch.tensor([[0.0, 2.0, 1.0, 0.5]]), Y[:1], None) > loss(Z[:1], Y[:1], None)
        assert loss(torch.tensor([[1.0, 0.0, 3.0, 0.5]]), Y[:1], T[:1]) > loss(Z[:1], Y[:1], T[:1])


def test_class_counts_and_names() -> None:
    with pytest.raises(CellFailure, match=r"dlr loss needs at least 3 classes, the model has 2; use loss=margin"):
        dlr(Z[:, :2], Y)
    with pytest.raises(CellFailure, match="at least 4 classes"):
        dlr(Z[:, :3], Y, torch.tensor([1, 1]))
    with pytest.raises(UsageError, match="did you mean 'margin'"):
        loss_named("margn")
