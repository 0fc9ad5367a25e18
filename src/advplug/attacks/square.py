"""Square attack (Andriushchenko et al. 2019, arXiv 1912.00049): random search over square windows, by scores alone.

Every image under attack tries one window an iteration, all windows of an iteration have the same side, and only
the pixels inside them are read and written. An image leaves as soon as it is fooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advplug.attacks.losses import cross_entropy, margin
from advplug.attacks.slots import Results
from advplug.attacks.unchanged import need_no_change
from advplug.attacks.windows import MOVES, Canvas
from advplug.ball import columns, inside, project, size
from advplug.contracts import Batch, Crafted, Threat, Trace
from advplug.errors import UsageError
from advplug.rng import Stream
from advplug.victim import Victim, cover, span

BLOCK = 256
"""Iterations for which an image's random numbers are drawn at once."""
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of pixels is halved, for a budget of 10000."""


def share_of_pixels(p_init: float, query: int, queries: int, rescale: bool) -> float:
    """The share of an image's pixels that the window covers at this query; `rescale` stretches the schedule."""
    at = query * 10_000 / queries if rescale else query
    return math.ldexp(p_init, -sum(at > h for h in HALVINGS))


@dataclass(frozen=True)
class Square:
    """Random search with `queries` questions an image and restart; implements `contracts.EvasionAttack`.

    Untargeted it raises the margin of the best wrong class, targeted the target's log-probability. A randomised
    victim is asked `victim.draws` times for each proposal, and as often for the image that it has to beat: one
    lucky answer is neither a success nor progress. Without a success an image comes back at its best point.
    """

    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = False
    restarts: int = 1

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Images inside the ball, with success and queries of each.

        Raises UsageError for norms other than L-inf and L2, and for a targeted threat without targets.
        """
        if threat.norm not in MOVES:
            raise UsageError(f"square works in {' and '.join(MOVES)}, not in {threat.norm}")
        with victim.frozen(), torch.no_grad():
            return _Run(self, victim, batch, threat, rng).craft()


@dataclass
class _Search:
    """The images under attack: those in slots 0 to n. What is behind them only fills up batches."""

    canvas: Canvas
    y: Tensor
    target: Tensor | None
    loss: Tensor
    fooled: Tensor
    ever: Tensor
    energy: Tensor
    uniform: Tensor
    n: int

    def drop(self, gone: Tensor) -> None:
        """Takes out the slots where `gone` (n,); the last ones move into the gaps."""
        left = self.n - int(gone.sum())
        gaps = gone[:left].nonzero().flatten()
        movers = (~gone[left:]).nonzero().flatten() + left
        held = [self.canvas.x, self.canvas.row, self.y, self.loss, self.fooled, self.ever, self.energy, self.uniform]
        for values in held if self.target is None else [*held, self.target]:
            values[gaps] = values[movers]
        self.n = left


class _Run:
    """One call of the attack on one batch."""

    def __init__(self, attack: Square, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> None:
        self.attack, self.victim, self.rng = attack, victim, rng
        self.batch = replace(batch, x=batch.x.contiguous())
        self.norm, self.eps = threat.norm, threat.eps
        self.moves = MOVES[threat.norm](threat.eps)
        self.target = batch.aim(threat.goal)
        self.noisy = victim.stochastic
        self.draws = victim.draws if self.noisy else 1
        # Early leaving needs answers that depend on the image alone.
        self.stay = self.noisy or victim.batch_dependent
        self.detects = victim.rejects
        self.cost = 2 * self.draws if self.noisy else 1
        self.steps = max(attack.queries - self.draws, 0) // self.cost if self.eps > 0 else 0
        self.results = Results.blank(batch, 0)
        self.queries = torch.zeros(len(batch), dtype=torch.long)
        self.run = 0

    def craft(self) -> Crafted:
        for run in range(self.attack.restarts if self.eps > 0 else 1):
            self.run = run
            rows = (self.results.solved.logical_not() | self.stay).nonzero().flatten()
            if len(rows):
                self._search(rows)
        r = self.results
        near = inside(self.batch.x, r.x, self.norm, self.eps)
        r.x = torch.where(columns(near, r.x), r.x, project(self.batch.x, r.x, self.norm, self.eps))
        return Crafted(r.x, Trace(r.any_iterate, r.final_iterate, queries=self.queries))

    def _search(self, rows: Tensor) -> None:
        """One restart for these rows of the batch."""
        search = self._begin(rows)
        self._first_answers(search)
        for step in range(1, self.steps + 1):
            if not search.n:
                return
            at = (step - 1) % BLOCK
            if at == 0:
                self._draw(search, (step - 1) // BLOCK)
            share = share_of_pixels(self.attack.p_init, step * self.cost, self.attack.queries, self.attack.rescale)
            side = self.moves.side(share, *self.batch.x.shape[2:])
            for some, whole in self._parts(search.n):
                self._try(search, some, whole, at, side)
            self._leave(search, self.draws + step * self.cost)
        self._hand_in(search, torch.ones(search.n, dtype=torch.bool), self.draws + self.steps * self.cost)

    def _begin(self, rows: Tensor) -> _Search:
        n, device = len(rows), self.batch.x.device
        there = rows.to(device)
        clean = self.batch.x[there]
        index = self.batch.index.cpu()[rows]

        def draw(shape: Sequence[int]) -> Tensor:
            name = "x".join(map(str, shape))
            return self.rng.per_image(
                lambda g: torch.rand(tuple(shape), generator=g), index, "square", "start", self.run, name
            ).to(device)

        x = self.moves.start(clean, draw) if self.eps > 0 else clean
        # As images leave, passes of fewer are filled up with those behind them.
        rest = 0 if self.stay else max(span(left, self.victim.batch_size) for left in range(n + 1)) - n
        x = torch.cat([x, x[:1].expand(rest, *x.shape[1:])]) if rest > 0 else x
        no = torch.zeros(n, dtype=torch.bool, device=device)
        low = torch.full((n,), -math.inf, dtype=x.dtype, device=device)
        target = None if self.target is None else self.target.to(device)[there]
        canvas = Canvas(x.contiguous(), self.batch.x, there)
        y, blank = self.batch.y[there], torch.zeros(n, 1, 1, device=device)
        return _Search(canvas, y, target, low, no, no.clone(), torch.zeros_like(low), blank, n)

    def _draw(self, search: _Search, block: int) -> None:
        """Random numbers for the next iterations, and the images' energies anew: sums of differences drift."""
        n, canvas = search.n, search.canvas
        shape = (min(BLOCK, self.steps), self.moves.numbers(canvas.x.shape[1]))
        index = self.batch.index.cpu()[canvas.row[:n].cpu()]
        drawn = self.rng.per_image(
            lambda g: torch.rand(shape, generator=g), index, "square", "windows", self.run, block
        )
        search.uniform = drawn.to(canvas.x.device)
        if self.norm != "l2":
            return
        for some in torch.split(torch.arange(n), self.victim.batch_size):
            change = canvas.x[some] - canvas.clean[canvas.row[some]]
            search.energy[some] = size(change, "l2").square()

    def _parts(self, n: int) -> Iterator[tuple[slice, int]]:
        """The slots 0 to n by passes, with the size of each: what is beyond its slots only fills it up."""
        most, begin = self.victim.batch_size, 0
        alone = ((min(most, n - at), min(most, n - at)) for at in range(0, n, most))
        for count, whole in alone if self.stay else cover(n, most):
            yield slice(begin, begin + count), whole
            begin += count

    # --- one iteration ---

    def _ask(self, search: _Search, some: slice, whole: int) -> tuple[Tensor, Tensor]:
        """Loss, to be raised, and success (m,) of the images in these slots, in a pass of `whole` images."""
        m = some.stop - some.start
        x = search.canvas.x[some.start : some.start + whole]
        y, target = search.y[some], None if search.target is None else search.target[some]
        total: Tensor | None = None
        votes = torch.zeros(m, dtype=torch.long, device=x.device)
        for _ in range(self.draws):
            accepted = None
            if self.detects:
                answer = self.victim.decide(x)
                assert answer.scores is not None
                logits, accepted = answer.scores[:m], answer.accepted[:m]
            else:
                logits = self.victim.logits(x)[:m]
            finite, label = logits.isfinite().all(1), logits.argmax(1)
            hit = (label != y) | ~finite if target is None else (label == target) & finite
            votes += hit if accepted is None else hit & accepted
            loss = margin(logits, y) if target is None else cross_entropy(logits, y, target)
            total = loss if total is None else total + loss
        assert total is not None
        return (total / self.draws).to(search.loss.dtype), votes * 2 > self.draws

    def _first_answers(self, search: _Search) -> None:
        for some, whole in self._parts(search.n):
            search.loss[some], search.fooled[some] = self._ask(search, some, whole)
            search.ever[some] = search.fooled[some]
        if not self.stay and bool(search.fooled[: search.n].any()):
            early = search.canvas.row[: search.n][search.fooled[: search.n]]
            self._leave(search, self.draws)
            # They may be misclassified as they are.
            kept = need_no_change(self.victim, self.batch, early.cpu(), self.target)
            self.results.x[kept.to(early.device)] = self.batch.x[kept.to(early.device)]
            self.queries[early.cpu()] += 1

    def _try(self, search: _Search, some: slice, whole: int, at: int, side: int) -> None:
        """One proposal for each image in these slots, kept where it is better."""
        canvas = search.canvas
        if self.noisy:
            search.loss[some], _ = self._ask(search, some, whole)
        uniform = search.uniform[some, at]
        pieces, energy = self.moves.propose(canvas, some, uniform, side, search.energy[some])
        for piece in pieces:
            canvas.put(piece.where, piece.new)
        loss, hit = self._ask(search, some, whole)
        best, fooled = search.loss[some], search.fooled[some]
        better = loss > best
        if not self.noisy:
            better = (hit & ~fooled) | ((hit == fooled) & better)
        for piece in pieces:
            canvas.put(piece.where, torch.where(better[:, None], piece.new, piece.old))
        search.loss[some] = torch.where(better, loss, best)
        search.energy[some] = torch.where(better, energy, search.energy[some])
        search.fooled[some] = torch.where(better, hit, fooled)
        search.ever[some] |= hit

    def _leave(self, search: _Search, asked: int) -> None:
        """Hands in the fooled images and forgets them."""
        if self.stay:
            return
        gone = search.fooled[: search.n].cpu()
        if bool(gone.any()):
            self._hand_in(search, gone, asked)
            search.drop(gone.to(search.y.device))

    def _hand_in(self, search: _Search, gone: Tensor, asked: int) -> None:
        slots = gone.nonzero().flatten().to(search.y.device)
        row = search.canvas.row[slots].cpu()
        fooled = search.fooled[slots].cpu()
        self.results.any_iterate[row] |= search.ever[slots].cpu()
        self.results.final_iterate[row] |= fooled
        # Of a randomised victim's answers no single one counts: the highest mean loss wins.
        first = torch.zeros_like(fooled) if self.noisy else fooled
        self.results.offer(row, search.canvas.x[slots], first, search.loss[slots].cpu().double())
        self.queries[row] += asked
