"""The gradient engine: start x gradient estimate x step rule x projection over a loss, on an active set.

An image leaves the batch as soon as it is fooled and a waiting one takes its place, so cost follows the
number of unsolved images. Success is read off the forward pass that gives the gradient.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from advplug.attacks import precision, transforms
from advplug.attacks.aims import SIMILARITY, ByText, aim, clearly
from advplug.attacks.pooling import Draws
from advplug.attacks.slots import Asked, Queue, Reading, Results, Slots, join, reading
from advplug.attacks.steps import Adaptive, Momentum, Point, Steepest, StepRule, checkpoints, without_best
from advplug.attacks.unchanged import best_wrong_classes, need_no_change
from advplug.ball import columns, project, random_start
from advplug.contracts import Batch, Crafted, Threat
from advplug.rng import Stream
from advplug.victim import Victim, decide_padded, full_float32, input_gradient, parts_of, rounds_convolutions

LAST_SHARE = 0.1
"""The share of steps, at least 2, that survivors of reduced precision take in float32; of a rule that compares losses,
those from the middle of its first period on, since reduced precision blurs what it compares."""


@dataclass(frozen=True)
class GradientAttack:
    """One member of the family; implements `contracts.EvasionAttack`.

    `fraction` is the step length as a share of eps; `alpha`, in pixel units, overrides it. `start` is
    where restart 0 begins unless the batch brings a start; later restarts begin at uniform points.
    `draws` are the samples of the transforms and of a stochastic victim that make one gradient (`pooling.Draws`).
    `keep_going` takes all steps and returns the iterate of highest loss, a misclassified one first.
    `n_targets` > 0 makes one run for each of the image's best-scoring wrong classes. At most
    `victim.batch_size` images make a pass. The loss `similarity` is for victims whose columns are texts: the mean
    cosine of an image and its own texts falls, or that of it and the target's rises. Without a target all steps are
    taken and the lowest cosine counts, whatever the answers are.
    """

    rule: Literal["steepest", "momentum", "adaptive"] = "steepest"
    steps: int = 20
    fraction: float = 0.125
    alpha: Fraction | None = None
    start: Literal["clean", "uniform"] = "uniform"
    restarts: int = 1
    loss: str = "ce"
    decay: float = 1.0
    draws: int = 1
    transforms: tuple[transforms.Transform, ...] = ()
    n_targets: int = 0
    keep_going: bool = False
    precision: Literal["auto", "float32"] = "float32"

    def transferable(self) -> GradientAttack:
        """The same, going on after success: what just fools one model rarely fools another."""
        return replace(self, keep_going=True)

    def __call__(self, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> Crafted:
        """Attacks the batch; returns images of its shape, each with its trace.

        Raises UsageError where a targeted threat comes without targets, CellFailure where the loss needs
        more classes.
        """
        with victim.frozen(), torch.enable_grad():
            previous = victim.run_attack_pass
            try:
                return _Run(self, victim, batch, threat, rng).craft()
            finally:
                victim.run_attack_pass = previous


class _Run:
    """One call of an attack on one batch."""

    def __init__(self, attack: GradientAttack, victim: Victim, batch: Batch, threat: Threat, rng: Stream) -> None:
        self.attack, self.victim, self.batch, self.rng = attack, victim, batch, rng
        self.norm, self.eps = threat.norm, threat.eps
        self.wanted = batch.aim(threat.goal)
        self.targeted = self.wanted is not None
        self.steps = attack.steps if self.eps > 0 else 0
        self.aim = aim(attack.loss, victim)
        self.by_score = attack.loss == SIMILARITY and not self.targeted
        self.noisy = victim.stochastic or bool(attack.transforms)
        self.draws = max(attack.draws, victim.draws) if self.noisy else 1
        # Transforms are the attacker's, and are averaged over. Toward a class, the draw that is furthest from it is the
        # one that can be reached least: there the mean succeeds more often.
        aimed = self.targeted or attack.n_targets > 0 or self.by_score
        self.standing = victim.stochastic and not attack.transforms and not aimed
        # Early leaving needs answers that depend on the image alone.
        self.stay = attack.keep_going or self.noisy or victim.batch_dependent or self.by_score
        # Where the attacked view is not the deployed system, a success has to be confirmed by the latter.
        self.stand_ins = any(w.surrogates for w in victim.wraps)
        self.proxy = (victim.rejects or self.stand_ins) and not self.noisy and not self.by_score
        # Where convolutions round their inputs, as they do on some GPUs, a success by a hair may be none.
        self.rounded = rounds_convolutions(victim.device) and not self.noisy
        self.rule = self._rule()
        self.results = Results.blank(batch, self.steps)
        self.size = max(1, min(victim.batch_size, len(batch)))
        self.early: list[Tensor] = []
        self.view = 0
        self.run = 0
        self.goals = self.wanted
        self.mode = precision.PLAIN
        self.runner: precision.Runner | None = None
        self.exact: precision.Runner | None = None

    def _rule(self) -> StepRule:
        attack = self.attack
        length = float(attack.alpha) if attack.alpha is not None else attack.fraction * self.eps
        if attack.rule == "adaptive":
            return Adaptive(self.norm, self.eps, self.steps)
        if attack.rule == "momentum":
            return Momentum(self.norm, self.eps, length, attack.decay)
        return Steepest(self.norm, self.eps, length)

    # --- the order of things ---

    def craft(self) -> Crafted:
        if not len(self.batch):
            return Crafted(self.batch.x.clone(), self.results.trace())
        table = self._target_table()
        runs = self.attack.restarts * (1 if table is None else table.shape[1])
        if self.steps == 0:
            runs = 1
        auto = self.attack.precision == "auto" and self.steps >= 4
        if auto:
            work = len(self.batch) * self.steps * runs * self.draws
            probe = self.batch.x[: self.size]
            self.mode, self.runner = precision.choose(self.victim.module, probe, work)
        began = time.perf_counter()
        for run, view in itertools.product(range(runs), range(self.victim.views)):
            self.run, self.view = run, view
            rows = (self.results.solved.logical_not() | self.stay).nonzero().flatten()
            if not len(rows):
                break
            if table is not None:
                self.goals = table[:, self.run % table.shape[1]]
            self.results.path[rows] = float("nan")
            self._one_run(rows)
        if self.early:
            # Images fooled at a random start may be misclassified as they are.
            rows = need_no_change(self.victim, self.batch, torch.cat(self.early), self.wanted)
            there = rows.to(self.batch.x.device)
            self.results.x[there] = self.batch.x[there]
        if auto:
            precision.spent(self.victim.module, self.batch.x, time.perf_counter() - began)
        return Crafted(self.results.x, self.results.trace())

    def _one_run(self, rows: Tensor) -> None:
        """All of `rows` from a start to the last step: first in the fast mode, the end in float32."""
        if not self.mode.bfloat16:
            self._pool(rows, [], self.steps, self.runner, self.proxy or self.rounded)
            return
        switch = self.steps - max(2, math.ceil(LAST_SHARE * self.steps))
        if self.attack.rule == "adaptive":
            switch = min(switch, max(1, checkpoints(self.steps)[0] // 2))
        self.exact = precision.runner(self.victim.module, replace(self.mode, bfloat16=False))
        # Answers that are drawn are no reason to stop, so that nobody need be asked about them.
        parked = self._pool(rows, [], switch, self.runner, not self.noisy)
        if self.attack.rule == "adaptive":
            for slots in parked:
                slots.memory = without_best(slots.memory)
        self._pool(rows[:0], parked, self.steps, self.exact, self.proxy or self.rounded)

    def _pool(
        self,
        waiting: Tensor,
        parked: list[Slots],
        until: int,
        runner: precision.Runner | None,
        confirm: bool,
    ) -> list[Slots]:
        """Keeps a batch full of waiting images until all are solved or have taken `until` steps.

        Those that took all of the attack's steps are judged here; those that stop earlier are returned.
        """
        self.victim.run_attack_pass = runner
        last = until == self.steps
        size = self.size
        queue = Queue(waiting, parked, self._begin)
        done: list[Slots] = []
        slots = queue.fill(None, size)
        while slots is not None:
            over = slots.taken >= until
            if bool(over.any()):
                done.append(slots.pick(over.nonzero().flatten()))
                slots = queue.fill(slots.pick((~over).nonzero().flatten()), size)
                if last and sum(map(len, done)) >= size:
                    done = self._judge(done, size, confirm)
                continue
            seen = self._read(slots, gradient=True)
            fooled = self._record(slots, seen, confirm)
            if not self.stay and bool(fooled.any()):
                slots, seen = self._leave(slots, seen, fooled)
            if len(slots):
                self._advance(slots, seen)
            if len(slots) < size and len(queue):
                slots = queue.fill(slots, size)
            elif not len(slots):
                slots = None
        return self._judge(done, size, confirm, flush=True) if last else done

    # --- one step ---

    def _begin(self, rows: Tensor) -> Slots:
        """Fresh slots for these rows of the batch, at their starts."""
        device = self.batch.x.device
        there = rows.to(device)
        clean = self.batch.x[there]
        first = self.run == 0
        if first and self.batch.start is not None:
            x = project(clean, self.batch.start[there], self.norm, self.eps)
        elif self.eps > 0 and (self.attack.start == "uniform" or not first) and not self._same_start():
            index = self.batch.index.to("cpu")[rows]
            x = random_start(clean, index, self.norm, self.eps, self.rng, "start", self.run)
        else:
            x = clean.clone()
        target = None if self.goals is None else self.goals.to(device)[there]
        slots = Slots(rows, torch.zeros_like(rows), clean, x, self.batch.y[there], target, {})
        slots.memory = self.rule.memory(x)
        if self.stay:
            low = torch.full((len(rows),), -float("inf"), dtype=x.dtype, device=device)
            slots.memory |= {"top_x": x.clone(), "top_loss": low, "top_fooled": torch.zeros_like(low)}
        return slots

    def _same_start(self) -> bool:
        """A clean start that every run shares: runs toward several targets differ by their targets."""
        return self.attack.start == "clean" and self.attack.n_targets > 0 and self.attack.restarts == 1

    def _read(self, slots: Slots, gradient: bool) -> Reading:
        """Loss, success and, if asked for, gradient at the iterates, over all draws together."""
        draws, parts = Draws(self.standing), self._parts(slots)
        for draw in range(self.draws):
            read = [self._read_part(slots, asked, n, draw, gradient) for asked, n in parts]
            loss, hit, g = (torch.cat(t) if len(read) > 1 else t[0] for t in zip(*read, strict=True))
            draws.add(loss, hit, g)
        loss, votes, g = draws.together()
        return reading(loss, g if gradient else None, votes)

    def _read_part(
        self, slots: Slots, asked: Asked, n: int, draw: int, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, success and gradient of the first `n` images of a pass, the others only fill it up."""
        point = asked.x.detach().requires_grad_(gradient)
        y, target = asked.y[:n], None if asked.target is None else asked.target[:n]
        with torch.set_grad_enabled(gradient):
            # Runs toward several classes aim at each in turn; whatever is wrong there is a success all the same.
            wanted = target if self.targeted else None
            loss, hit, logits = self.aim.read(self._transformed(point, slots, draw), self.view, y, target, wanted)
            g = point.detach()[:n]
            if gradient:
                g = input_gradient(loss, point)[:n]
                self.victim.passes.backward += len(point)
        votes = hit.to(loss.dtype)
        if self.draws == 1 and (self.mode.bfloat16 or self.rounded):
            votes *= 1 + clearly(logits.detach(), y, wanted)
        return loss.detach(), votes, g

    def _parts(self, slots: Slots) -> list[tuple[Asked, int]]:
        """What is asked in each pass, and how many of its images count."""
        if self.stay:
            return [(slots.asked(None), len(slots))]
        parts = list(parts_of(self.victim, len(slots)))
        if len(parts) == 1 and len(parts[0][0]) == len(slots):
            return [(slots.asked(None), len(slots))]
        return [(slots.asked(rows), n) for rows, n in parts]

    def _transformed(self, x: Tensor, slots: Slots, draw: int) -> Tensor:
        if not self.attack.transforms:
            return x
        # Without early leaving a batch moves in step, so one number of steps serves all of its images.
        at, index = int(slots.taken[0]), self.batch.index.to("cpu")[slots.row]

        def per_image(sample: Callable[[torch.Generator], Tensor], position: int) -> Tensor:
            return self.rng.per_image(sample, index, "transform", position, self.run, at, draw)

        values = transforms.sample(self.attack.transforms, x.shape[1:], per_image)
        return transforms.apply(self.attack.transforms, x, values)

    def _confirmed(self, slots: Slots, fooled: Tensor, clear: Tensor) -> Tensor:
        """The successes that the deployed system agrees with, in float32; it need not be asked about clear ones."""
        rows = (fooled & ~clear).nonzero().flatten()
        if not len(rows):
            return fooled
        some = slots.pick(rows)
        agreed = fooled & clear
        if self.proxy or self.noisy:
            wanted = some.target if self.targeted else None
            agreed[rows] = decide_padded(self.victim, some.x).fooled(some.y, wanted).cpu()
        else:
            # The attacked view is the deployed system, but for the precision.
            reduced, self.victim.run_attack_pass = self.victim.run_attack_pass, self.exact
            with full_float32(self.victim.device):
                agreed[rows] = self._read(some, gradient=False).fooled
            self.victim.run_attack_pass = reduced
        return agreed

    def _record(self, slots: Slots, seen: Reading, confirm: bool) -> Tensor:
        """Enters a reading into the books; returns which images are fooled (CPU)."""
        # A lead says nothing where the attacked view is a stand-in, or answers are drawn.
        clear = torch.zeros_like(seen.clear) if self.proxy or self.noisy else seen.clear
        fooled = self._confirmed(slots, seen.fooled, clear) if confirm else seen.fooled
        r, row = self.results, slots.row
        r.path[row, slots.taken] = seen.losses
        r.any_iterate[row] |= fooled
        r.zero[row] += seen.zero
        r.nonfinite[row] += seen.nonfinite
        if self.stay:
            self._keep_top(slots, seen.loss, fooled)
        return fooled

    def _keep_top(self, slots: Slots, loss: Tensor, fooled: Tensor) -> None:
        """Remembers the iterate of highest loss; misclassified ones go first unless answers are random."""
        m = slots.memory
        hit = fooled.to(device=loss.device, dtype=m["top_fooled"].dtype)
        if self.noisy or self.by_score:
            hit = torch.zeros_like(hit)
        loss = loss.to(m["top_loss"].dtype)
        better = (hit > m["top_fooled"]) | ((hit == m["top_fooled"]) & (loss > m["top_loss"]))
        m["top_x"] = torch.where(columns(better, slots.x), slots.x, m["top_x"])
        m["top_loss"] = torch.where(better, loss, m["top_loss"])
        m["top_fooled"] = torch.where(better, hit, m["top_fooled"])

    def _leave(self, slots: Slots, seen: Reading, fooled: Tensor) -> tuple[Slots, Reading]:
        """Hands in the fooled images and returns the others with their readings."""
        gone = slots.pick(fooled.nonzero().flatten())
        self._solve(gone, seen.losses[fooled])
        rest = (~fooled).nonzero().flatten()
        there = rest.to(slots.x.device)
        assert seen.gradient is not None
        kept = replace(seen, loss=seen.loss[there], gradient=seen.gradient[there])
        return slots.pick(rest), kept

    def _solve(self, gone: Slots, losses: Tensor) -> None:
        """Enters fooled images as solved."""
        r = self.results
        r.final_iterate[gone.row] = True
        r.offer(gone.row, gone.x, torch.ones(len(gone), dtype=torch.bool), losses.double())
        if self.attack.start == "uniform" and self.batch.start is None and self.run == 0:
            self.early.append(gone.row[gone.taken == 0])

    def _advance(self, slots: Slots, seen: Reading) -> None:
        """Moves the iterates one step, in place of the slots' own."""
        assert seen.gradient is not None
        point = Point(slots.clean, slots.x, seen.gradient, seen.loss, slots.taken)
        slots.x, memory = self.rule.step(point, slots.memory)
        slots.memory = {**slots.memory, **memory}
        slots.taken = slots.taken + 1
        self.results.steps[slots.row] += 1

    def _judge(self, done: list[Slots], size: int, confirm: bool, flush: bool = False) -> list[Slots]:
        """The last forward pass, in full batches, of images that have taken all steps; returns the rest."""
        while done and (flush or sum(map(len, done)) >= size):
            everyone = join(done)
            cut = torch.arange(len(everyone))
            slots, done = everyone.pick(cut[:size]), [everyone.pick(cut[size:])] if len(cut) > size else []
            # Of a stand-in's survivors, the deployed system may still be fooled.
            seen = self._read(slots, gradient=False)
            if self.proxy:
                seen = replace(seen, fooled=torch.ones_like(seen.fooled))
            fooled = self._record(slots, seen, confirm)
            self._finish(slots, seen, fooled)
        return done

    def _finish(self, slots: Slots, seen: Reading, fooled: Tensor) -> None:
        """Hands in images at the end of a run."""
        r = self.results
        r.final_iterate[slots.row] |= fooled
        if self.stay:
            top_x, top_loss = slots.memory["top_x"], slots.memory["top_loss"]
            if self.by_score and self.stand_ins and isinstance(self.aim, ByText):
                # Stand-ins flatter what was made for them; between them the deployed system decides.
                top_loss = self.aim.deployed(top_x, slots.y)
            r.offer(slots.row, top_x, slots.memory["top_fooled"].cpu() > 0, top_loss.cpu().double())
            return
        x, losses = slots.x, seen.losses.double()
        if self.attack.rule == "adaptive" and self.steps:
            better = (slots.memory["best_loss"] > seen.loss.to(x.dtype)) & ~fooled.to(x.device)
            x = torch.where(columns(better, x), slots.memory["best_x"], x)
            losses = torch.where(better.cpu(), slots.memory["best_loss"].cpu().double(), losses)
        r.offer(slots.row, x, fooled, losses)

    # --- targets ---

    def _target_table(self) -> Tensor | None:
        """For runs toward several classes: the best-scoring wrong classes of the clean images, (B, runs)."""
        several = self.attack.n_targets and not self.targeted
        table = best_wrong_classes(self.victim, self.batch, self.attack.n_targets) if several else None
        self._fit_targeted_loss()
        return table

    def _fit_targeted_loss(self) -> None:
        if self.attack.n_targets and self.attack.loss == "dlr" and self.victim.classes < 4:
            self.aim.replace_loss("margin")
