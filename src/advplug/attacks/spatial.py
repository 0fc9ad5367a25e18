"""Translation, rotation and scaling: the worst of a grid or of random draws (Engstrom et al. 2017, arXiv 1712.02779).

A transformation is four numbers: shift to the right and down in pixels, angle in degrees (counter-clockwise on the
screen), and growth (0.2: 1.2 times as large). The image is scaled and turned about its centre, then shifted;
bilinear, black outside. Four zeros leave it as it is, bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from advplug.ball import columns, in_box, within
from advplug.contracts import Batch, Crafted, Threat, Trace
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim, decide_padded

SHIFTS, ANGLES = 5, 31
"""The published grid: 5 x 5 x 31 = 775 transformations."""

SAME = 1e-5
"""How far a pixel may lie from where the stated transformation puts it: the rounding of float32."""


@dataclass(frozen=True)
class Ranges:
    """The largest change of each number at budget 1: `shift` as a share of the image's side, in whole pixels and at
    least one; `angle` in degrees; `scale` relative. 0 rules a change out."""

    shift: float = 0.1
    angle: float = 30.0
    scale: float = 0.0

    def limits(self, height: int, width: int) -> Tensor:
        """(4,) float64: pixels right, pixels down, degrees, growth."""
        return torch.tensor([self._pixels(width), self._pixels(height), self.angle, self.scale], dtype=torch.float64)

    def _pixels(self, side: int) -> float:
        # 0.1 stands for the published 3 pixels, of 28 as of 32.
        return float(max(1, math.floor(self.shift * side + 0.5))) if self.shift else 0.0


@dataclass(frozen=True)
class Spatial:
    """All transformations whose four numbers stay within `eps` times their ranges."""

    eps: Fraction
    ranges: Ranges = Ranges()
    norm: str = "spatial"

    def measure(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        """The largest of the numbers (B,) as a share of its range; infinite where `applied` (B, 4) does not turn x
        into x_adv. Without `applied` only unchanged images have a size."""
        values = torch.zeros(len(x), 4) if applied is None else applied
        values = values.to(device="cpu", dtype=torch.float64)
        limits = self.ranges.limits(*x.shape[2:])
        # A number without a range may not differ from 0 at all.
        share = torch.where(values == 0, 0, values.abs() / limits).nan_to_num(nan=torch.inf, posinf=torch.inf)
        differs = (transformed(x, values) - x_adv).abs().flatten(1).amax(1)
        same = differs <= SAME  # false for NaN
        return torch.where(same, share.amax(1).to(x), torch.inf)

    def check(self, x: Tensor, x_adv: Tensor, applied: Tensor | None = None) -> Tensor:
        return in_box(x_adv) & within(self.measure(x, x_adv, applied), float(self.eps))


def transformed(x: Tensor, values: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after the transformations `values` (B, 4); shifts by whole pixels are exact."""
    height, width = x.shape[2:]
    values = values.to(device="cpu", dtype=torch.float64)
    right, down, angle, growth = values.unbind(1)
    cos = angle.deg2rad().cos() / (1 + growth)
    sin = angle.deg2rad().sin() / (1 + growth)
    right, down, cos, sin = (columns(v.to(x), x[:, 0]) for v in (right, down, cos, sin))
    # Where each pixel comes from, counted from the centre: the inverse transformation.
    across = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2 - right
    along = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] - (height - 1) / 2 - down
    # With align_corners=False, -1 and 1 are the outer edges of the first and last pixel.
    grid = torch.stack([(cos * across - sin * along) * (2 / width), (sin * across + cos * along) * (2 / height)], dim=3)
    made = functional.grid_sample(x, grid, align_corners=False).clamp_(0, 1)
    plain = (values[:, 2:] == 0).all(1) & (values[:, :2] == values[:, :2].round()).all(1)
    if bool(plain.any()):
        rows = plain.nonzero().flatten()
        made[rows.to(x.device)] = _shifted(x[rows.to(x.device)], values[rows, :2].long())
    return made


def _shifted(x: Tensor, pixels: Tensor) -> Tensor:
    """Images moved right and down by whole `pixels` (B, 2): interpolation would round."""
    pixels = pixels.to(x.device)
    column = torch.arange(x.shape[3], device=x.device) - pixels[:, :1]
    row = torch.arange(x.shape[2], device=x.device) - pixels[:, 1:]
    inside = _within(row, x.shape[2])[:, :, None] & _within(column, x.shape[3])[:, None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    row, column = row.clamp(0, x.shape[2] - 1), column.clamp(0, x.shape[3] - 1)
    moved = x.permute(0, 2, 3, 1)[image, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(inside[:, None], moved, 0)


def _within(position: Tensor, count: int) -> Tensor:
    return (position >= 0) & (position < count)


@dataclass(frozen=True)
class SpatialAttack:
    """Tries transformations of each image and keeps the worst; implements `contracts.EvasionAttack`.

    `grid` takes 5 shifts along each axis, 31 angles and `scales` sizes, evenly spaced over eps times `ranges`; the
    largest come first, for they fool most often. `random` takes `tries` uniform draws. The unchanged image is
    always among them. An image's choice is the first that fools, otherwise the one of highest cross-entropy
    (targeted: of lowest toward the target); of a randomised victim, the one of highest mean cross-entropy over
    `Victim.draws` answers. Only scores are asked for.
    """

    ranges: Ranges = Ranges()
    method: Literal["grid", "random"] = "grid"
    tries: int = 10
    scales: int = 5

    def __post_init__(self) -> None:
        if self.scales % 2 == 0 or self.scales < 3:
            raise UsageError(
                f"spatial: scales must be 3, 5, 7, ..., so that no change is among them, got {self.scales}"
            )

    def perturbation(self, norm: str, eps: Fraction) -> Spatial:
        """What the attack may do at one budget, a share of its ranges."""
        return Spatial(eps, self.ranges)

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Transformed images, with the numbers of each (B, 4) as `applied`.

        Raises UsageError where a targeted threat comes without targets.
        """
        target = batch.aim(threat.goal)
        table = self._table(batch, threat.eps, rng)
        if threat.queries is not None:
            table = table[:, : max(1, threat.queries // victim.draws)]
        search = _Search(victim, batch, table, target)
        with victim.frozen(), torch.no_grad():
            search.run()
        parts = torch.split(torch.arange(len(batch)), max(1, victim.batch_size))
        made = [transformed(batch.x[rows.to(batch.x.device)], search.best[rows]) for rows in parts if len(rows)]
        x = torch.cat(made) if made else batch.x.clone()
        return Crafted(x, Trace(search.fooled, search.fooled.clone(), queries=search.queries), search.best)

    def _table(self, batch: Batch, eps: float, rng: Stream) -> Tensor:
        """The transformations (B, tries, 4) in the order in which they are tried, the identity first."""
        limits = eps * self.ranges.limits(*batch.x.shape[2:])
        identity = torch.zeros(len(batch), 1, 4, dtype=torch.float64)
        if not bool(limits.any()) or not len(batch):
            return identity
        if self.method == "grid":
            tries = (_grid(self.scales, limits) * limits).expand(len(batch), -1, -1)
        else:
            unit = rng.per_image(self._draw, batch.index.cpu(), "spatial")
            tries = unit * limits
        return torch.cat([identity, tries], 1)

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.rand(self.tries, 4, generator=generator, dtype=torch.float64) * 2 - 1


def _grid(scales: int, limits: Tensor) -> Tensor:
    """Every combination (T, 4) of evenly spaced numbers in [-1, 1] but four zeros, the largest first."""
    counts = [n if limit else 1 for n, limit in zip((SHIFTS, SHIFTS, ANGLES, scales), limits.tolist(), strict=True)]
    # Counted from the middle, which is 0 exactly.
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / max(1, n // 2) for n in counts]
    points = torch.cartesian_prod(*axes)
    points = points[points.any(1)]
    return points[(points**2).sum(1).argsort(descending=True, stable=True)]


class _Search:
    """The tries of one call: images leave once fooled, and what they free is filled with more tries of the others."""

    def __init__(self, victim: Victim, batch: Batch, table: Tensor, target: Tensor | None) -> None:
        self.victim, self.batch, self.table, self.target = victim, batch, table, target
        self.best = table[:, 0].clone()
        self.loss = torch.full((len(batch),), -torch.inf, dtype=torch.float64)
        self.fooled = torch.zeros(len(batch), dtype=torch.bool)
        self.queries = torch.zeros(len(batch), dtype=torch.long)
        # Of random answers the luckiest would be kept.
        self.stay = victim.stochastic or victim.batch_dependent

    def run(self) -> None:
        size, at, last = max(1, self.victim.batch_size), 0, self.table.shape[1]
        while at < last:
            rows = torch.arange(len(self.fooled))[~self.fooled | self.stay]
            if not len(rows):
                break
            # A batch-dependent victim sees each try in the company of the same try of the others.
            many = 1 if self.victim.batch_dependent else max(1, size // len(rows))
            for part in torch.split(rows, size):
                self._try(part, self.table[part, at : at + many])
            at += many

    def _try(self, rows: Tensor, values: Tensor) -> None:
        """Enters the answers to `values` (n, k, 4) of the images at `rows`."""
        n, k = values.shape[:2]
        each = rows.repeat_interleave(k)
        x = transformed(self.batch.x[each.to(self.batch.x.device)], values.reshape(n * k, 4))
        hit, loss = (v.view(n, k) for v in self._answers(x, each))
        self.queries[rows] += k * self.victim.draws
        ranked = hit & (not self.victim.stochastic)
        chosen = torch.where(ranked.any(1), ranked.int().argmax(1), loss.argmax(1))[:, None]
        hit, ranked, loss = (v.gather(1, chosen).squeeze(1) for v in (hit, ranked, loss))
        before = self.fooled[rows] & (not self.victim.stochastic)
        better = (ranked & ~before) | ((ranked == before) & (loss > self.loss[rows]))
        kept = rows[better]
        self.best[kept] = values[torch.arange(n), chosen.squeeze(1)][better]
        self.loss[kept], self.fooled[kept] = loss[better], hit[better]

    def _answers(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Whether most answers to each image are a success, and their mean loss in float64; both on the CPU."""
        y = self.batch.y.cpu()[rows]
        target = None if self.target is None else self.target.cpu()[rows]
        votes, total = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.float64)
        for _ in range(self.victim.draws):
            answer = decide_padded(self.victim, x)
            scores = self.victim.logits(x) if answer.scores is None else answer.scores
            votes += answer.fooled(y.to(x.device), None if target is None else target.to(x.device)).cpu()
            loss = _cross_entropy(scores.cpu().double(), y if target is None else target)
            total += loss if target is None else -loss
        return votes * 2 > self.victim.draws, (total / self.victim.draws).nan_to_num(nan=-torch.inf)


def _cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy (B,) by the log-odds of all other classes: the usual form is 0 for every confident answer."""
    own = scores.gather(1, classes[:, None])
    others = scores.scatter(1, classes[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return functional.softplus(others - own).squeeze(1)
