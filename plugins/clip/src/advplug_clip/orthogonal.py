"""Orthogonal fine-tuning: weights are only rotated, so that angles and lengths between neurons stay.

A weight W (out, in) becomes W R^T with a block-diagonal rotation R of its inputs (Qiu et al. 2023, section 3; the
input side as in Liu et al. 2024). The rotations are parametrisations of the model's own weights, not layers around
its layers: open_clip's attention reads its weights past any wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from advplug.errors import CellFailure

QKV = "in_proj_weight"
"""The joint weight of queries, keys and values in torch's and open_clip's attention, (3 D, D)."""
Layout: TypeAlias = Literal["rows", "columns", "qkv"]
"""How a weight's numbers are a matrix (out, in): as a layer's, transposed, or three of them one upon the other."""
BARE = ("proj", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that a tower holds without a layer of their own: `x @ proj`, and attention of unequal widths."""


@dataclass(frozen=True)
class Oft:
    """Blocks of `block` inputs are rotated together; `coft` bounds how far, by the Frobenius norm of each weight's
    skew-symmetric generators, shared evenly among its blocks (COFT; None: no bound)."""

    block: int = 16
    coft: float | None = None


@dataclass(frozen=True)
class Place:
    """A weight that `module` holds under `name`."""

    module: nn.Module
    name: str
    layout: Layout = "rows"

    @property
    def weight(self) -> Tensor:
        held = getattr(self.module, self.name)
        assert isinstance(held, Tensor)
        return held


class Rotation(nn.Module):
    """W to W R^T. R = (I + Q)(I - Q)^-1 (Cayley) for each block, solved exactly in float32; Q = -Q^T starts at zero.

    `generators` are the entries of Q above the diagonal: (matrices, blocks, b (b - 1) / 2). Inputs that fill no block
    make a smaller one, whose entries are in `rest`.
    """

    def __init__(self, weight: Tensor, layout: Layout, oft: Oft) -> None:
        super().__init__()
        self.layout = layout
        matrices, _, inputs = self._matrices(weight).shape
        self.block, self.coft = min(oft.block, inputs), oft.coft
        self.whole, self.left = inputs // self.block, inputs % self.block
        where = weight.device
        self.generators = nn.Parameter(torch.zeros(matrices, self.whole, _entries(self.block), device=where))
        self.rest = nn.Parameter(torch.zeros(matrices, 1, _entries(self.left), device=where)) if self.left > 1 else None

    def forward(self, weight: Tensor) -> Tensor:
        """A weight of the same shape and type."""
        flat = self._matrices(weight).to(torch.promote_types(weight.dtype, torch.float32))
        cut = self.whole * self.block
        parts = [_turned(flat[..., :cut], self._rotations(self.generators, self.block))]
        if self.rest is not None:
            parts.append(_turned(flat[..., cut:], self._rotations(self.rest, self.left)))
        elif self.left:  # a single input has nothing to be rotated with
            parts.append(flat[..., cut:])
        turned = torch.cat(parts, -1).to(weight.dtype)
        return turned[0].T if self.layout == "columns" else turned.reshape(weight.shape)

    def _matrices(self, weight: Tensor) -> Tensor:
        """(matrices, out, in)."""
        if self.layout == "qkv":
            return weight.view(3, -1, weight.shape[1])
        return (weight.T if self.layout == "columns" else weight.flatten(1))[None]

    def _rotations(self, entries: Tensor, side: int) -> Tensor:
        """(matrices, blocks, side, side)."""
        above = torch.triu_indices(side, side, 1, device=entries.device)
        upper = entries.new_zeros(*entries.shape[:2], side, side)
        upper[..., above[0], above[1]] = entries
        skew = upper - upper.transpose(-1, -2)
        if self.coft is not None:
            bound = self.coft / (self.whole + (self.rest is not None)) ** 0.5
            size = torch.linalg.vector_norm(skew, dim=(-2, -1), keepdim=True)
            skew = skew * (bound / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(max=1.0)
        unit = torch.eye(side, device=entries.device)
        rotations: Tensor = torch.linalg.solve(unit - skew, unit + skew)
        return rotations


def _entries(side: int) -> int:
    return side * (side - 1) // 2


def _turned(flat: Tensor, rotations: Tensor) -> Tensor:
    """Matrices (M, out, in) times the transposed block-diagonal of (M, blocks, b, b)."""
    blocks = flat.reshape(*flat.shape[:2], *rotations.shape[1:3])
    return torch.einsum("morb,mrcb->morc", blocks, rotations.to(flat)).flatten(-2)


def places(tower: nn.Module) -> Iterator[Place]:
    """All weight matrices of an image tower: linear layers, convolutions, attention's, and bare projections.

    Biases, norms, embeddings of positions and transposed convolutions are none.
    """
    for module in tower.modules():
        held = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield Place(module, "weight")
        for name in (QKV, *BARE):
            weight = held.get(name)
            if weight is None or weight.ndim != 2:
                continue
            if name == QKV and weight.shape[0] == 3 * weight.shape[1]:
                yield Place(module, name, "qkv")
            else:
                yield Place(module, name, "columns" if name == "proj" else "rows")


def attach(tower: nn.Module, oft: Oft) -> list[nn.Parameter]:
    """Puts a rotation on every weight matrix of the tower and freezes all else; returns what is to be trained.

    The tower computes the same as before. Raises CellFailure for a tower without weight matrices.
    """
    found = list(places(tower))
    if not found:
        raise CellFailure("the image tower has no weight matrices that could be rotated; use adapter=none")
    tower.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for place in found:
        rotation = Rotation(place.weight, place.layout, oft)
        parametrize.register_parametrization(place.module, place.name, rotation)
        trained += list(rotation.parameters())
    return trained


def merge(tower: nn.Module) -> None:
    """Makes rotated weights plain again; the tower computes the same, and all of its parameters may be trained."""
    modules: Sequence[nn.Module] = list(tower.modules())
    for module in modules:
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    tower.requires_grad_(True)
