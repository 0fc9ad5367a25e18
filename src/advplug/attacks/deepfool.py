"""DeepFool: steps to the nearest class boundary of the linearised victim (Moosavi-Dezfooli et al. 2015,
arXiv 1511.04599, algorithm 2; other norms: its section on lp norms)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from advplug.ball import columns, direction, distance
from advplug.contracts import Batch, Crafted, Decision, Threat, Trace
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim, decide_padded, parts_of

DUAL = {"linf": 1.0, "l2": 2.0}
"""The order of the dual norm, in which gradients are measured."""

SHORTEST = 1e-6
"""The least change a pixel gets in a step (root mean square in L2): below it, float32 would not move at all."""


@dataclass(frozen=True)
class DeepFool:
    """Seeks the smallest change that is misclassified, in L2 or L-inf; implements `contracts.EvasionAttack`.

    Each step goes (1 + overshoot) times the way to the nearest of the linearised boundaries between the label and
    the other best-scoring classes of the clean image (`candidates` with the label), then clips to [0, 1]. Targeted
    (not in the paper), it goes to the farthest of the boundaries before the target, which is exact where one
    boundary decides. An image leaves once the deployed system is fooled; one that fools it as it is stays as it is.

    What is clipped is missing, so images with much black or white need more steps than the paper's unclipped ones.
    In the second half of the steps, pixels that cannot go the way they should are left out: they might take most
    of every step.

    `refine` halves the way back to the clean image that many times and keeps what still fools (0 is the published
    method); not for randomised victims, where it would pick lucky draws. Of a defense's several stand-ins each
    gets a search of its own, and the smallest success counts. Gradients and decisions of a randomised victim are
    taken over `Victim.draws` samples.
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10
    refine: int = 0

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Images of the batch's shape in [0, 1]; those that were not fooled are the last iterates. The budget is
        not used: the engine compares it with what was found.

        Raises UsageError for another norm, and where a targeted threat comes without targets.
        """
        if threat.norm not in DUAL:
            raise UsageError(f"deepfool works in {' and '.join(DUAL)}, not in {threat.norm}")
        goal = batch.aim(threat.goal)
        found = []
        with victim.frozen():
            for view in range(victim.views):
                search = _Search(self, victim, batch, goal, threat.norm, view)
                search.run()
                found.append(search)
        return _smallest(found)


class _Slopes(NamedTuple):
    """The linearised victim at n images: `lead` (m, n) of the wanted over the unwanted class for each of m pairs,
    and its gradients (m, n, C, H, W)."""

    lead: Tensor
    gradient: Tensor


class _Search:
    """One search, through one of the victim's stand-ins; the books are on the CPU, the images on the device."""

    def __init__(
        self, attack: DeepFool, victim: Victim, batch: Batch, target: Tensor | None, norm: str, view: int
    ) -> None:
        self.attack, self.victim, self.batch, self.target = attack, victim, batch, target
        self.norm, self.view = norm, view
        n = len(batch)
        self.x = batch.x.detach().clone()
        self.fooled = torch.zeros(n, dtype=torch.bool)
        self.stuck = torch.zeros(n, dtype=torch.bool)
        self.steps = torch.zeros(n, dtype=torch.long)
        self.zero, self.nonfinite = self.steps.clone(), self.steps.clone()
        self.rivals = torch.zeros(n, max(1, min(attack.candidates, victim.classes) - 1), dtype=torch.long)
        self.draws = victim.draws

    def run(self) -> None:
        """All steps, with a look at the deployed system before the first and after each."""
        self._judge(first=True)
        unfooled = ~self.fooled
        for step in range(self.attack.steps):
            if not bool(self._open().any()):
                break
            for part in self._parts(self._open()):
                self._move(part, late=2 * step >= self.attack.steps)
            self._judge()
        if self.attack.refine and not self.victim.stochastic:
            self._refine(self.fooled & unfooled)

    def _open(self) -> Tensor:
        return ~(self.fooled | self.stuck)

    def _parts(self, picked: Tensor) -> Sequence[Tensor]:
        """The picked rows, at most a batch at a time; all rows where answers depend on their company."""
        rows = torch.arange(len(picked)) if self.victim.batch_dependent else picked.nonzero().flatten()
        return torch.split(rows, max(1, self.victim.batch_size)) if len(rows) else ()

    # --- the deployed system ---

    def _judge(self, first: bool = False) -> None:
        for part in self._parts(self._open()):
            there = part.to(self.x.device)
            hit, answer = self._hits(self.x[there], part)
            self.fooled[part] |= hit & self._open()[part]
            if first:
                scores = self._scores(answer, self.x[there])
                scores = scores.scatter(1, self.batch.y[there, None], -torch.inf)
                self.rivals[part] = scores.topk(self.rivals.shape[1], dim=1).indices.cpu()

    def _scores(self, answer: Decision, x: Tensor) -> Tensor:
        scores = self.victim.logits(x) if answer.scores is None else answer.scores
        return scores.nan_to_num()

    def _hits(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Decision]:
        """Whether most answers to each image are a success (CPU), and the last of them."""
        there, votes = rows.to(x.device), torch.zeros(len(rows), dtype=torch.long)
        for _ in range(self.draws):
            answer = decide_padded(self.victim, x)
            votes += answer.fooled(self.batch.y[there], None if self.target is None else self.target[there]).cpu()
        return votes * 2 > self.draws, answer

    def _refine(self, picked: Tensor) -> None:
        """Halves the way back to the clean image, and keeps what still fools."""
        for part in self._parts(picked):
            there = part.to(self.x.device)
            clean = self.batch.x[there]
            change = self.x[there] - clean
            low = torch.zeros(len(part), dtype=clean.dtype, device=clean.device)
            high = torch.ones_like(low)
            for _ in range(self.attack.refine):
                middle = (low + high) / 2
                tried = (clean + columns(middle, clean) * change).clamp_(0, 1)
                hit = (self._hits(tried, part)[0] & picked[part]).to(clean.device)
                self.x[there[hit]] = tried[hit]
                low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)

    # --- one step ---

    def _move(self, part: Tensor, late: bool) -> None:
        """Moves the open images of `part` to their nearest linearised boundary and a little beyond."""
        there, open_ = part.to(self.x.device), self._open()[part]
        x = self.x[there]
        lead, gradient = self._linearised(x, part)
        usable = gradient.flatten(2).isfinite().all(2) & lead.isfinite()
        if not bool(usable.all()):  # gradients of all pairs are large: no copy without need
            gradient = torch.where(usable.view(*usable.shape, *[1] * (x.dim() - 1)), gradient, 0)
        flat = usable.all(0) & ~gradient.flatten(2).any(2).any(0)
        if late:
            gradient = gradient.masked_fill(((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0)), 0)
        steepness = _length(gradient, DUAL[self.norm])
        known = usable & (steepness > 0)
        which, each = self._nearest(lead, steepness, known), torch.arange(len(part), device=x.device)
        way = lead[which, each].abs() / steepness[which, each]
        way = torch.where(known.any(0), way.nan_to_num(), 0).clamp_min(self._shortest(x))
        step = columns((1 + self.attack.overshoot) * way, x) * direction(gradient[which, each], self.norm)
        moves = known.any(0) & open_.to(x.device)
        self.x[there] = torch.where(columns(moves, x), (x + step).clamp(0, 1), x)
        self.steps[part] += open_
        self.nonfinite[part] += open_ & ~usable.all(0).cpu()
        self.zero[part] += open_ & flat.cpu()
        if not self.victim.stochastic:
            # Without a way to go, the next step would find the same.
            self.stuck[part] |= open_ & ~known.any(0).cpu()

    def _nearest(self, lead: Tensor, steepness: Tensor, known: Tensor) -> Tensor:
        """The pair (n,) to go for: the nearest boundary, or the farthest of those before the target."""
        if self.target is None:
            return torch.where(known, lead.abs() / steepness, torch.inf).argmin(0)
        return torch.where(known, -lead / steepness, -torch.inf).argmax(0)

    def _shortest(self, x: Tensor) -> float:
        return SHORTEST * (math.sqrt(x[0].numel()) if self.norm == "l2" else 1.0)

    def _linearised(self, x: Tensor, part: Tensor) -> _Slopes:
        """The leads and their gradients, averaged over the draws of a randomised victim."""
        found = []
        for rows, n in parts_of(self.victim, len(x)):
            slopes = self._linearised_pass(x[rows.to(x.device)], part[rows])
            found.append(_Slopes(slopes.lead[:, :n], slopes.gradient[:, :n]))
        return found[0] if len(found) == 1 else _Slopes(*(torch.cat(t, 1) for t in zip(*found, strict=True)))

    def _linearised_pass(self, x: Tensor, rows: Tensor) -> _Slopes:
        total: _Slopes | None = None
        pairs: tuple[Tensor, Tensor] | None = None
        for _ in range(self.draws):
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                logits = self.victim.attacked(point, self.view)
                wanted, unwanted = pairs = pairs or self._pairs(logits.detach(), rows)
                lead = logits.gather(1, wanted) - logits.gather(1, unwanted)
                gradient = _gradients(lead, point)
            self.victim.passes.backward += lead.numel()
            slopes = _Slopes(lead.detach().T, gradient)
            total = slopes if total is None else _Slopes(total.lead + slopes.lead, total.gradient + slopes.gradient)
        assert total is not None
        return _Slopes(total.lead / self.draws, total.gradient / self.draws)

    def _pairs(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Wanted and unwanted classes (n, m): rivals over the label, or the target over those that score best."""
        there = rows.to(logits.device)
        if self.target is None:
            rivals = self.rivals[rows].to(logits.device)
            return rivals, self.batch.y[there, None].expand_as(rivals)
        target = self.target[there, None]
        others = logits.nan_to_num().scatter(1, target, -torch.inf).topk(self.rivals.shape[1], dim=1).indices
        return target.expand_as(others), others


def _gradients(values: Tensor, point: Tensor) -> Tensor:
    """The input gradients (m, n, ...) of values (n, m), a pass back for each column; zero where the graph is cut."""
    rows = []
    for k in range(values.shape[1]):
        gradient = None
        if values.requires_grad:
            keep = k + 1 < values.shape[1]
            (gradient,) = torch.autograd.grad(values[:, k].sum(), point, retain_graph=keep, allow_unused=True)
        rows.append(torch.zeros_like(point) if gradient is None else gradient)
    return torch.stack(rows)


def _length(gradient: Tensor, order: float) -> Tensor:
    """The norms (m, n) of gradients (m, n, ...), scaled first: squares of small gradients underflow in float32."""
    lengths = []
    for one in gradient.flatten(2):
        largest = one.abs().amax(1)
        scaled = one / largest.clamp_min(1e-30)[:, None]
        lengths.append(torch.linalg.vector_norm(scaled, order, dim=1) * largest)
    return torch.stack(lengths)


def _smallest(found: Sequence[_Search]) -> Crafted:
    """For each image the smallest success of the searches, the first search's image where none succeeded."""
    best = found[0]
    x, fooled = best.x, best.fooled.clone()
    for other in found[1:]:
        clean = best.batch.x
        nearer = (distance(clean, other.x, best.norm) < distance(clean, x, best.norm)).cpu()
        better = other.fooled & (nearer | ~fooled)
        x = torch.where(columns(better.to(x.device), x), other.x, x)
        fooled |= better
    steps, zero, nonfinite = (
        torch.stack([getattr(s, name) for s in found]).sum(0) for name in ("steps", "zero", "nonfinite")
    )
    return Crafted(x, Trace(fooled, fooled.clone(), steps, zero, nonfinite))
