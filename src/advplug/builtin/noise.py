"""Random noise: the floor that every attack must beat. Torch is imported only when the attack runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from advplug.contracts import Access, AttackCaps, Batch, Crafted, Param, Spec, Strength, Threat, Trace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from advplug.rng import Stream
    from advplug.victim import Victim


@dataclass(frozen=True)
class Noise:
    """Draws changes of size eps, `draws` of them for an image, and keeps the first one that fools.

    `sign` has entries of equal size and random sign; `gaussian` has normal entries, of standard deviation
    eps in L-inf before they are clipped to the ball, of norm eps in L2 and L1.
    """

    kind: str = "sign"
    draws: int = 1

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Uses decisions only; an image that none of the draws fools comes back with the first draw."""
        import torch

        x = batch.x.clone()
        solved = torch.zeros(len(batch), dtype=torch.bool)
        used = torch.zeros(len(batch), dtype=torch.long)
        for draw in range(self.draws):
            open_rows = solved.logical_not().nonzero().flatten()
            for begin in range(0, len(open_rows), victim.batch_size):
                rows = open_rows[begin : begin + victim.batch_size]
                tried = self._draw(batch.take(rows), threat, rng, draw)
                fooled = _fooled(victim, batch, rows, tried, threat)
                kept = torch.ones_like(fooled) if draw == 0 else fooled
                x[rows[kept].to(x.device)] = tried[kept.to(x.device)]
                solved[rows], used[rows] = fooled, draw + 1
        none = torch.zeros_like(used)
        return Crafted(x, Trace(solved, solved.clone(), none, none.clone(), none.clone(), queries=used))

    def _draw(self, some: Batch, threat: Threat, rng: Stream, draw: int) -> Tensor:
        import torch

        from advplug.ball import columns, project, size

        shape, norm, eps = some.x.shape[1:], threat.norm, threat.eps

        def one(generator: torch.Generator) -> Tensor:
            if self.kind == "gaussian":
                return torch.randn(shape, generator=generator, dtype=some.x.dtype)
            return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(some.x.dtype)

        change = rng.per_image(one, some.index, "noise", self.kind, draw).to(some.x.device)
        if norm != "linf":
            change = change / columns(size(change, norm).clamp_min(1e-30), change)
        return project(some.x, some.x + eps * change, norm, eps)


def _fooled(victim: Victim, batch: Batch, rows: Tensor, tried: Tensor, threat: Threat) -> Tensor:
    there, target = rows.to(batch.y.device), batch.aim(threat.goal)
    return victim.decide(tried).fooled(batch.y[there], None if target is None else target[there]).cpu()


def noise(
    kind: Annotated[Literal["sign", "gaussian"], Param("random signs of equal size, or normal")] = "sign",
    draws: Annotated[int, Param("tries for an image; the first that fools is kept", ge=1)] = 1,
) -> Noise:
    """Noise of size eps."""
    return Noise(kind, draws)


ATTACKS: list[Spec] = [
    Spec(
        "noise",
        "advplug.builtin.noise:noise",
        AttackCaps(
            Access.DECISION,
            frozenset({"linf", "l2", "l1"}),
            frozenset({"untargeted", "targeted"}),
            Strength.FLOOR,
            stochastic=True,
        ),
        "Random noise of size eps: the floor that every attack must beat",
        "Carlini et al. 2019, arXiv 1902.06705, section 4.3",
        effort=lambda params: (params["draws"], 0),
    )
]
