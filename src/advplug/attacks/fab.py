"""FAB-T: the fast adaptive boundary attack toward each of several classes (Croce and Hein 2019, arXiv 1907.02044).

Written from the paper; its targeted form is that of Croce and Hein 2020, arXiv 2003.01690. An iterate
moves to the linearised boundary between the label and one other class, drawn toward the clean image by as much as
it can afford, and back toward the clean image once it is across.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advplug.attacks.losses import margin
from advplug.attacks.plane import nearest_on_plane
from advplug.attacks.slots import Asked, Queue, Reading, Slots, reading
from advplug.attacks.unchanged import best_wrong_classes
from advplug.ball import columns, project, size
from advplug.contracts import Batch, Crafted, MinimumNorm, Threat, Trace
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim, decide_padded, input_gradient, parts_of

NORMS = ("linf", "l2", "l1")
SEARCH = 3
"""Steps of the final search between the clean image and the closest success (the final search of the paper)."""
_TINY = 1e-30


@dataclass(frozen=True)
class FabT:
    """Seeks the smallest change that succeeds; implements `contracts.EvasionAttack`.

    One run of `steps` toward each of the `n_targets` best-scoring wrong classes, or toward the target that is set.
    `alpha_max` bounds the pull toward the clean image, `eta` is the overshoot, `beta` the share of a success that
    the step back keeps. Under a `MinimumNorm` threat every image takes all steps; under a ball it leaves once a
    success lies inside. A randomised victim's gradients and answers are averaged over `victim.draws`.
    """

    steps: int = 100
    n_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """The closest success of each image, or the clean image; under a ball, moved into it.

        Raises UsageError for norms other than L-inf, L2 and L1, and for a targeted threat without targets.
        """
        if threat.norm not in NORMS:
            raise UsageError(f"fab-t works in {', '.join(NORMS)}, not in {threat.norm}")
        with victim.frozen(), torch.enable_grad():
            return _Run(self, victim, batch, threat).craft()


class _Run:
    """One call of the attack on one batch."""

    def __init__(self, attack: FabT, victim: Victim, batch: Batch, threat: Threat) -> None:
        self.attack, self.victim, self.batch, self.norm = attack, victim, batch, threat.norm
        self.target = batch.aim(threat.goal)
        self.budget = None if isinstance(threat.perturbation, MinimumNorm) else threat.eps
        self.noisy = victim.stochastic
        self.draws = victim.draws if self.noisy else 1
        self.size = max(1, min(victim.batch_size, len(batch)))
        n = len(batch)
        self.best_x = batch.x.clone()
        self.best = torch.full((n,), torch.inf, dtype=batch.x.dtype, device=batch.x.device)
        self.steps, self.zero, self.nonfinite = (torch.zeros(n, dtype=torch.long) for _ in range(3))
        self.goals: Tensor = batch.y
        self.view = 0

    def craft(self) -> Crafted:
        if not len(self.batch) or self.budget == 0:
            return self._result()
        self.goals = self.batch.y if self.target is None else self.target.to(self.batch.y)
        for part in torch.split(torch.arange(len(self.batch)), self.size):
            # What is wrong as it is needs no change.
            clean = self._begin(part)
            self._note(clean, self._judge(clean)[0])
        table = self.goals[:, None]
        if self.target is None:
            table = best_wrong_classes(self.victim, self.batch, self.attack.n_targets)
        for column in range(table.shape[1]):
            self.goals = table[:, column]
            for view in range(self.victim.views):
                self.view = view
                rows = self._open()
                if len(rows):
                    self._pool(rows)
        if not self.noisy:
            self._search()
        return self._result()

    def _open(self) -> Tensor:
        """Rows, on the CPU, of images that no success inside the budget, and no change of size 0, has settled."""
        return (self.best > (self.budget or 0)).nonzero().flatten().cpu()

    def _result(self) -> Crafted:
        x, limit = self.best_x, self.budget
        solved = self.best.isfinite() if limit is None else self.best <= limit
        if limit is not None:
            x = torch.where(columns(solved, x), x, project(self.batch.x, x, self.norm, limit))
        done = solved.cpu()
        return Crafted(x, Trace(done, done.clone(), self.steps, self.zero, self.nonfinite))

    # --- one target ---

    def _pool(self, rows: Tensor) -> None:
        """Keeps a batch full of waiting images until each is settled or has taken all steps."""
        queue = Queue(rows, [], self._begin)
        slots = queue.fill(None, self.size)
        while slots is not None:
            self._advance(slots, self._read(slots))
            there = slots.row.to(self.best.device)
            settled = (self.best[there] <= (self.budget or 0)).cpu()
            rest = ~settled & (slots.taken < self.attack.steps)
            if not bool(rest.all()):
                slots = slots.pick(rest.nonzero().flatten())
            slots = queue.fill(slots, self.size)

    def _begin(self, rows: Tensor) -> Slots:
        there = rows.to(self.batch.x.device)
        clean = self.batch.x[there]
        return Slots(rows, torch.zeros_like(rows), clean, clean.clone(), self.batch.y[there], self.goals[there], {})

    def _advance(self, slots: Slots, seen: Reading) -> None:
        """A step for each image; back toward the clean image for those that are across the boundary."""
        slots.x = moved = self._step(slots, seen)
        fooled, _ = self._judge(slots)
        self._note(slots, fooled)
        back = slots.clean + self.attack.beta * (moved - slots.clean)
        slots.x = torch.where(columns(fooled, moved), back, moved)
        slots.taken = slots.taken + 1
        self.steps[slots.row] += 1

    def _step(self, slots: Slots, seen: Reading) -> Tensor:
        """The paper's update: projections of iterate and clean image on the linearised boundary, combined."""
        attack, n = self.attack, len(slots)
        assert seen.gradient is not None
        x, clean = slots.x.flatten(1), slots.clean.flatten(1)
        normal, gap = seen.gradient.flatten(1), seen.loss.to(x.dtype)
        need = torch.cat([-gap, -gap - (normal * (clean - x)).sum(1)])
        both = nearest_on_plane(torch.cat([x, clean]), normal.repeat(2, 1), need, self.norm)
        own, other = both[:n], both[n:]
        length, other_length = size(own, self.norm), size(other, self.norm)
        pull = (length / (length + other_length).clamp_min(_TINY)).clamp_max(attack.alpha_max)[:, None]
        moved = (1 - pull) * (x + attack.eta * own) + pull * (clean + attack.eta * other)
        return moved.clamp_(0, 1).view_as(slots.x)

    # --- asking the victim ---

    def _read(self, slots: Slots) -> Reading:
        """By how much the target beats the label, and the gradient of that: one backward pass a draw."""
        n = len(slots)
        parts = list(parts_of(self.victim, n))
        gaps: list[Tensor] = []
        gradients: list[Tensor] = []
        for _ in range(self.draws):
            read = [self._read_part(slots.asked(None if len(rows) == n == m else rows), m) for rows, m in parts]
            gap, gradient = (torch.cat(t) if len(parts) > 1 else t[0] for t in zip(*read, strict=True))
            gaps.append(gap)
            gradients.append(gradient)
        loss = _mean(gaps)
        seen = reading(loss, _mean(gradients), torch.zeros_like(loss, dtype=torch.bool))
        self.zero[slots.row] += seen.zero
        self.nonfinite[slots.row] += seen.nonfinite
        return seen

    def _read_part(self, asked: Asked, n: int) -> tuple[Tensor, Tensor]:
        """Gaps and gradients of the first `n` images of a pass, the others only fill it up."""
        assert asked.target is not None
        point = asked.x.detach().requires_grad_(True)
        logits, y, wanted = self.victim.attacked(point, self.view)[:n], asked.y[:n], asked.target[:n]
        if self.target is not None:
            gap = margin(logits, y, wanted)
        else:
            pick = logits.gather(1, torch.stack([wanted, y], 1))
            gap = pick[:, 0] - pick[:, 1]
        gradient = input_gradient(gap, point)[:n]
        self.victim.passes.backward += len(point)
        return gap.detach(), gradient

    def _judge(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Success (n,) at the deployed system, by a majority of draws, and the mean margin by which it succeeds."""
        votes = torch.zeros(len(slots), dtype=torch.long, device=slots.x.device)
        margins = []
        for _ in range(self.draws):
            answer = decide_padded(self.victim, slots.x)
            wanted = None if self.target is None else slots.target
            votes += answer.fooled(slots.y, wanted)
            assert answer.scores is not None
            margins.append(margin(answer.scores, slots.y, wanted))
        return votes * 2 > self.draws, _mean(margins)

    def _note(self, slots: Slots, fooled: Tensor) -> None:
        """Keeps successes that are closer than any before."""
        if not bool(fooled.any()):
            return
        there = slots.row.to(slots.x.device)
        found = size((slots.x - slots.clean).flatten(1), self.norm)
        closer = fooled & (found < self.best[there])
        self.best[there[closer]] = found[closer]
        self.best_x[there[closer]] = slots.x[closer]

    # --- the end ---

    def _search(self) -> None:
        """Moves each success toward the clean image, by false position on the margin between the two.

        Under a ball only those outside need it.
        """
        rows = ((self.best > (self.budget or 0)) & self.best.isfinite()).nonzero().flatten().cpu()
        if self.target is not None:
            self.goals = self.target.to(self.batch.y)
        for part in torch.split(rows, self.size) if len(rows) else ():
            slots = self._begin(part)
            change = self.best_x[part.to(slots.x.device)] - slots.clean
            low, high = slots.x.new_zeros(len(slots)), slots.x.new_ones(len(slots))
            below = self._judge(slots)[1]
            slots.x = slots.clean + change
            above = self._judge(slots)[1]
            for _ in range(SEARCH):
                root = low - below * (high - low) / (above - below)
                sane = (root > low) & (root < high)
                root = torch.where(sane, root, (low + high) / 2)
                # A little beyond the root, where rounding does not undo it.
                at = (root + 0.01 * (high - root)).to(low.dtype)
                slots.x = slots.clean + columns(at, change) * change
                fooled, gap = self._judge(slots)
                self._note(slots, fooled)
                high, above = torch.where(fooled, at, high), torch.where(fooled, gap, above)
                low, below = torch.where(fooled, low, at), torch.where(fooled, below, gap)


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
