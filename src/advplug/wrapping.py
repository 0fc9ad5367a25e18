"""Other libraries' attacks: the victim as a plain module, a batch at a time, everything put back afterwards.

An adapter writes one function, `call(module, part, threat) -> images`, and `wrapped` does the rest: it seeds and
isolates the call, tries every stand-in of a defense and keeps the best image, counts passes and queries, ends the call
when its queries are spent, and fails the cell where what comes back is no image inside the perturbation set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advplug.ball import columns, project
from advplug.contracts import Access, Ball, Batch, Crafted, Decision, MinimumNorm, Threat, Trace
from advplug.errors import CellFailure
from advplug.isolation import isolated
from advplug.perturbations import beyond
from advplug.rng import Stream
from advplug.victim import Victim

ROUNDING = 1e-3
"""Share of eps by which a library may overshoot through rounding; such images are projected. Beyond it, it failed."""


class QueriesSpent(Exception):  # noqa: N818 - an end, no error
    """The victim was asked as often as the query budget allows."""


class AsModule(nn.Module):
    """The victim as other libraries expect one: pixels (B, C, H, W) to logits (B, K), with parameters and modes.

    With gradient access it is the attacked view `view`, of a randomised victim the logarithms of its mean probabilities
    over as many draws as it declares: its cross-entropy is what advplug's own attacks raise (`pooling.Draws`);
    with score access the deployed system's logits without gradient; with decision access 1 for the label that was
    answered and 0 elsewhere, for images that the system rejects 1 for `withheld`, where it is set. `probabilities`
    turns logits into probabilities. Images are converted to the victim's precision and device. `asked` counts the
    images it was asked for; with `limit`, `QueriesSpent` ends the run. `tally` (B,) are the queries of each image of
    the batch, where the adapter can tell them apart.
    """

    def __init__(self, victim: Victim, access: Access, view: int = 0, probabilities: bool = False) -> None:
        super().__init__()
        self.inner = victim.module
        # Libraries take the device from the first parameter, and a user's model may have none.
        self.anchor = nn.Parameter(torch.zeros((), device=victim.device), requires_grad=False)
        self.classes = victim.classes
        self.asked = 0
        self.limit: int | None = None
        self.tally: Tensor | None = None
        self.seen: Callable[[Tensor, Decision], None] | None = None
        self.passed: Callable[[Tensor, Tensor], None] | None = None
        self.withheld: Tensor | None = None
        self._victim, self._access, self._view, self._probabilities = victim, access, view, probabilities
        self._dtype = next((p.dtype for p in victim.module.parameters() if p.is_floating_point()), None)

    @property
    def draws(self) -> int:
        """Of how many samples of a randomised victim one answer with gradient is made."""
        several = self._victim.stochastic and self._access is Access.GRADIENT
        return self._victim.draws if several else 1

    @property
    def stochastic(self) -> bool:
        return self._victim.stochastic

    @property
    def batch_size(self) -> int:
        """The most images that should pass at once."""
        return self._victim.batch_size

    def deployed(self) -> AsModule:
        """The same victim as a black box: the deployed system's logits, for libraries that also query it."""
        if self._access is not Access.GRADIENT:
            return self
        return AsModule(self._victim, Access.SCORE, self._view, self._probabilities).eval()

    def fooled(self, x: Tensor, part: Batch, threat: Threat) -> Tensor:
        """(B,) on the CPU: which of the images `x` (B, C, H, W) the deployed system gets wrong, or takes for the
        target; for ensembles that leave solved images out."""
        return _fooled(self._victim, x, part, threat)

    def forward(self, x: Tensor) -> Tensor:
        if self.limit is not None and self.asked + len(x) > self.limit:
            # What the budget still allows is asked, so that results do not depend on how queries are batched.
            if self.asked < self.limit:
                self.forward(x[: self.limit - self.asked])
            raise QueriesSpent
        self.asked += len(x)
        x = x.to(device=self._victim.device, dtype=self._dtype or x.dtype)
        if self._access is Access.GRADIENT:
            logits = self._differentiable(x)
            if self.passed is not None:
                self.passed(x.detach(), logits.detach())
        else:
            answer = self._victim.decide(x)
            if self.seen is not None:
                self.seen(x.detach(), answer)
            if self._access is Access.DECISION:
                return self._label(answer).to(x.dtype)
            assert answer.scores is not None  # a victim whose scores may be asked for answers with them
            logits = answer.scores
        return logits.softmax(1) if self._probabilities else logits

    def repeat(self, x: Tensor) -> Iterator[Decision]:
        """Further answers to images, as many as the victim has draws and the limit allows; each counts as a query."""
        for _ in range(self._victim.draws):
            if self.limit is not None and self.asked + len(x) > self.limit:
                return
            self.asked += len(x)
            yield self._victim.decide(x)

    def _label(self, answer: Decision) -> Tensor:
        label = answer.label.clamp_min(0)
        if self.withheld is not None:
            label = torch.where(answer.accepted, label, self.withheld)
        return nn.functional.one_hot(label, self.classes)

    def _differentiable(self, x: Tensor) -> Tensor:
        victim = self._victim
        if x.requires_grad and torch.is_grad_enabled():
            # An alias of this pass alone: a hook on the library's own tensor would count each later pass again.
            x = x.view_as(x)
            x.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        logits = victim.attacked(x, self._view)
        if self.draws == 1:
            return logits
        total = logits.log_softmax(1)
        for _ in range(self.draws - 1):
            total = torch.logaddexp(total, victim.attacked(x, self._view).log_softmax(1))
        return total - math.log(self.draws)

    def _count_backward(self, gradient: Tensor) -> None:
        self._victim.passes.backward += len(gradient) * self.draws


Call = Callable[[AsModule, Batch, Threat], Tensor]
"""(module, batch of at most the victim's batch size, threat) to images like `batch.x`; `batch.target` is set for
targeted goals. The module is in evaluation mode, and global random states are seeded."""


@dataclass(frozen=True)
class Wrapped:
    """An attack of another library.

    `one_by_one` hands it single images, so that its draws depend on the image alone, and a query budget ends each
    search by itself. `queries` is the most that may be asked an image (None: no limit but the library's own); with
    both, the closest success among the queries is kept, whatever the library returns.
    """

    label: str
    call: Call
    access: Access
    probabilities: bool = False
    one_by_one: bool = False
    queries: int | None = None

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Images of the library's making, the clean ones where it had none; in the trace `queries` for black boxes,
        `any_iterate` for gradient attacks inside a ball on a deterministic victim that is attacked as it is.

        Raises CellFailure where an image leaves the perturbation set by more than rounding.
        """
        x = batch.x.clone()
        queries = torch.zeros(len(batch), dtype=torch.long)
        passed = torch.zeros(len(batch), dtype=torch.bool)
        step = 1 if self.one_by_one else max(1, victim.batch_size)
        views = victim.views if self.access is Access.GRADIENT else 1
        smallest = isinstance(threat.perturbation, MinimumNorm)
        for start in range(0, len(batch), step):
            rows = torch.arange(start, min(start + step, len(batch)))
            for view in range(views):
                # A success at some distance may be nearer through another stand-in.
                every = view == 0 or smallest
                open_rows = rows if every else rows[~_fooled(victim, x[rows], batch.take(rows), threat)]
                if len(open_rows):
                    part = batch.take(open_rows)
                    watch = Watch(part, threat)
                    made, asked = self._once(victim, part, threat, rng.child(int(part.index[0]), view), view, watch)
                    if smallest and view:
                        nearer = _nearer(victim, made, x[open_rows], part, threat)
                        made = torch.where(columns(nearer, made), made, x[open_rows])
                    x[open_rows.to(x.device)] = made
                    queries[open_rows] += asked
                    passed[open_rows] |= watch.found.cpu()
        if self.access is not Access.GRADIENT:
            return Crafted(x, Trace(queries=queries))
        ball = isinstance(threat.perturbation, Ball)
        other = victim.stochastic or victim.rejects or any(w.surrogates for w in victim.wraps)
        return Crafted(x, Trace(any_iterate=passed) if ball and not smallest and not other else None)

    def _once(
        self, victim: Victim, part: Batch, threat: Threat, rng: Stream, view: int, watch: Watch
    ) -> tuple[Tensor, Tensor]:
        """Images and queries (B,); where the library asks for a batch as one, each has its share, rounded up."""
        module = AsModule(victim, self.access, view, self.probabilities)
        module.passed = watch.see
        closest = Closest(part, threat, module.repeat if victim.stochastic else None)
        if self.queries is not None:
            module.limit, module.seen = self.queries * len(part), closest.see
        if self.one_by_one:
            # Searches by labels would otherwise take rejected images for successes.
            module.withheld = part.y
        with isolated(victim.module, rng), victim.frozen():
            module.eval()
            try:
                made = self.call(module, part, threat)
            except QueriesSpent:
                made = closest.x
        if closest.found:
            made = closest.x
        share = torch.full((len(part),), -(-module.asked // len(part)))
        return self._checked(made, part, threat), share if module.tally is None else module.tally

    def _checked(self, made: Tensor, part: Batch, threat: Threat) -> Tensor:
        if made.shape != part.x.shape:
            raise CellFailure(f"{self.label} returned {tuple(made.shape)} for images of {tuple(part.x.shape)}")
        made = made.detach().to(part.x)
        if not made.isfinite().all():
            raise CellFailure(f"{self.label} returned NaN or infinite pixels")
        allowed = threat.perturbation
        inside = allowed.check(part.x, made)
        if inside.all():
            return made
        worst = float(beyond(allowed, part.x, made)[~inside].max())
        if not isinstance(allowed, Ball) or worst > ROUNDING * threat.eps:
            outside = int((~inside).sum())
            raise CellFailure(f"{self.label} left the perturbation set on {outside} images, by up to {worst:.3g}")
        if isinstance(allowed, MinimumNorm):
            return made.clamp(0, 1)
        return torch.where(columns(inside, made), made, project(part.x, made, threat.norm, threat.eps))


def tally_square(attack: Any, module: AsModule, x: Tensor) -> None:
    """Makes `module.tally` count what a Square attack that leaves solved images out asks for each of the images `x`.

    `attack` is built as its authors' is: `attack_single_run(images, labels)` returns queries and images, and is called
    once a restart with what is left; each image is asked about once before, and once more after a restart.
    """
    run, tally = attack.attack_single_run, torch.ones(len(x), dtype=torch.long)

    def counted(left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        asked, made = run(left, labels)
        tally[_positions(left, x)] += asked.long().cpu() + 1
        return asked, made

    attack.attack_single_run, module.tally = counted, tally


def _positions(some: Tensor, x: Tensor) -> Tensor:
    """Where the images `some` are among `x`, which has them in the same order."""
    found = [-1]
    for image in some:
        found.append(next(i for i in range(found[-1] + 1, len(x)) if torch.equal(image, x[i])))
    return torch.tensor(found[1:])


@dataclass
class Watch:
    """Which images of a batch were fooled (B,) inside the perturbation set on the way, whatever comes back."""

    part: Batch
    threat: Threat
    found: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.found = torch.zeros(len(self.part), dtype=torch.bool, device=self.part.x.device)

    def see(self, x: Tensor, logits: Tensor) -> None:
        """Takes note of a pass of images (B, C, H, W) with their logits.

        A library that passes them in another order is not believed: they then lie outside each other's balls.
        """
        if len(x) != len(self.part):
            return
        accepted = logits.isfinite().all(1)
        hit = Decision(logits.argmax(1), accepted, logits).fooled(self.part.y, self.part.aim(self.threat.goal))
        if bool(hit.any()):
            self.found |= hit & self.threat.perturbation.check(self.part.x, x.to(self.part.x))


@dataclass
class Closest:
    """The closest success among the queries of one image, inside the perturbation set; the clean image before.

    `repeat` asks a randomised victim again: a success has to be one most of the time, or the closest would be the
    luckiest. Until there is such a one, `x` is what succeeds most often.
    """

    part: Batch
    threat: Threat
    repeat: Callable[[Tensor], Iterable[Decision]] | None = None
    x: Tensor = field(init=False)
    size: float = float("inf")
    share: float = 0.0

    def __post_init__(self) -> None:
        self.x = self.part.x.clone()

    @property
    def found(self) -> bool:
        return self.size < float("inf")

    def see(self, x: Tensor, answer: Decision) -> None:
        """Takes note of a query of images (B, C, H, W) with their answers."""
        if len(self.part) != 1:
            return
        hit = self._hits(answer)
        clean = self.part.x.expand(len(x), *self.part.x.shape[1:])
        hit &= self.threat.perturbation.check(clean, x.to(clean))
        if not bool(hit.any()):
            return
        sizes = torch.where(hit, self.threat.perturbation.measure(clean, x.to(clean)), torch.inf)
        best = int(sizes.argmin())
        if float(sizes[best]) >= self.size:
            return
        nearer = x[best : best + 1]
        share = self._share(nearer)
        if share > 0.5:
            self.x, self.size = nearer.to(self.part.x), float(sizes[best])
        elif not self.found and share > self.share:
            self.x, self.share = nearer.to(self.part.x), share

    def _hits(self, answer: Decision) -> Tensor:
        return answer.fooled(self.part.y, self.part.aim(self.threat.goal))

    def _share(self, x: Tensor) -> float:
        """The share of further answers that are successes."""
        if self.repeat is None:
            return 1.0
        hits = [bool(self._hits(answer)) for answer in self.repeat(x)]
        return sum(hits) / max(1, len(hits))


def _nearer(victim: Victim, made: Tensor, old: Tensor, part: Batch, threat: Threat) -> Tensor:
    """(B,): which of the images `made` fool the deployed system by a smaller change than the `old` ones, most of the
    time where it answers at random."""

    def fools(x: Tensor) -> Tensor:
        asked = victim.draws if victim.stochastic else 1
        return torch.stack([_fooled(victim, x, part, threat) for _ in range(asked)]).float().mean(0) > 0.5

    smaller = threat.perturbation.measure(part.x, made) < threat.perturbation.measure(part.x, old)
    return (fools(made) & (smaller.cpu() | ~fools(old))).to(made.device)


def _fooled(victim: Victim, x: Tensor, part: Batch, threat: Threat) -> Tensor:
    """(B,) on the CPU: what the deployed system gets wrong, or takes for the target."""
    with victim.frozen():
        return victim.decide(x).fooled(part.y, part.aim(threat.goal)).cpu()
