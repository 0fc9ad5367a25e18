"""Sets of allowed changes to an image: norm balls, minimum-norm searches, patches, transformations of the plane.

Torch-free until something is measured, so that a matrix can be planned without it. `norm` names the measure and
`eps` the budget in it: pixel units for linf, l2 and l1; changed pixels (positions, whatever the channels) for l0;
the share of the attack's own range for spatial; the side, as a share of the shorter image side, for patch;
unrestricted changes have no measure, and 1 for a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

LP = ("linf", "l2", "l1")
"""Norms whose ball can be attacked by gradient steps and projections."""
BALLS = (*LP, "l0")
SETS = (*BALLS, "spatial", "patch", "unrestricted")
CUSTOMARY = {"l0": Fraction(24), "spatial": Fraction(1), "patch": Fraction(1, 4), "unrestricted": Fraction(1)}
"""Budgets where the dataset has none of its own (l0: Croce et al. 2020, arXiv 2006.12834, section 5)."""


class Perturbation(Protocol):
    """A set of allowed changes to an image. `applied` (B, ...) is what an attack says that it did, where images
    alone do not tell."""

    @property
    def norm(self) -> str: ...
    @property
    def eps(self) -> Fraction: ...
    def measure(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        """The size of each change, shape (B,)."""
        ...

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        """True (B,) where the change is allowed, within one fixed tolerance."""
        ...


@dataclass(frozen=True)
class Ball:
    """All images within distance `eps` of the clean one, in L-inf, L2, L1 or L0, inside [0, 1]."""

    norm: str
    eps: Fraction

    def measure(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        from advplug.ball import distance

        return distance(x, x_adv, self.norm)

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        from advplug.ball import inside

        return inside(x, x_adv, self.norm, float(self.eps))


@dataclass(frozen=True)
class MinimumNorm(Ball):
    """The smallest change that succeeds is sought. `eps` is the largest budget of interest: a change beyond it
    is a failure at that budget, no violation."""

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        from advplug.ball import in_box

        return in_box(x_adv)


@dataclass(frozen=True)
class Patch:
    """Anything inside one square whose side is `eps` times the shorter image side, rounded up to pixels."""

    eps: Fraction
    norm: str = "patch"

    def measure(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        """The side of the smallest square that holds all changes, as a share of the shorter image side."""
        import torch

        changed = (x_adv != x).any(1)
        spans = []
        for axis in (1, 2):
            hit = changed.any(axis)
            position = torch.arange(hit.shape[1], device=hit.device)
            last = torch.where(hit, position, -1).amax(1)
            first = torch.where(hit, position, hit.shape[1]).amin(1)
            spans.append((last - first + 1).clamp_min(0))
        return torch.maximum(*spans) / min(x.shape[2:])

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        from advplug.ball import in_box

        shorter = min(x.shape[2:])
        side = -(-self.eps.numerator * shorter // self.eps.denominator)
        return ((self.measure(x, x_adv) * shorter).round() <= side) & in_box(x_adv)


@dataclass(frozen=True)
class Unrestricted:
    """Whatever the attack's own parameters allow: the engine can only see to it that pixels stay in [0, 1]."""

    eps: Fraction = Fraction(1)
    norm: str = "unrestricted"

    def measure(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        """1 where anything changed, 0 elsewhere."""
        return (x_adv != x).flatten(1).any(1).to(x.dtype)

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        from advplug.ball import in_box

        return in_box(x_adv)


def perturbation(norm: str, eps: Fraction) -> Perturbation:
    """The set named `norm` at budget `eps`; spatial ones come from their attack (`EvasionAttack.perturbation`).

    Raises UsageError for a set that only an attack can describe.
    """
    if norm in BALLS:
        return Ball(norm, eps)
    if norm == "patch":
        return Patch(eps)
    if norm == "unrestricted":
        return Unrestricted(eps)
    from advplug.errors import UsageError

    raise UsageError(f"the attack has to say what its '{norm}' changes are: a method perturbation(norm, eps)")


def beyond(allowed: Perturbation, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
    """By how much (B,) each image leaves the set: over the budget or out of [0, 1], whichever is more; inside, at
    most 0. A search for the smallest change has no budget to exceed."""
    import torch

    flat = x_adv.flatten(1)
    box = torch.maximum(-flat.amin(1), flat.amax(1) - 1)
    if isinstance(allowed, MinimumNorm):
        return box
    return torch.maximum(allowed.measure(x, x_adv, applied) - float(allowed.eps), box)
