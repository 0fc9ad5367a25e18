"""Ray: pieces of a matrix as tasks on the worker processes of a cluster.

The driver, which is this process, knows the order, decides what is due and is the only one that stores; workers are
sent plans and send back what came of them. A task whose worker dies is run again.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import ray

from advplug.cluster.session import demand_slots, gpus_per_cell, session
from advplug.cluster.worker import Lent, Reply, Shared, Surroundings, Task, work
from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.executors import Placement
from advplug.plans import VictimPlan
from advplug.progress import Progress
from advplug.runner import Runner
from advplug.stored.crafted import CraftedWriter, crafted_files
from advplug.versions import versions
from advplug.work import Job, Options, Piece, victims_of

RETRIES = 3
"""How often a piece is begun again whose worker died."""
LOOK_AGAIN = 10.0
"""Seconds between looks at whether the machines are still there."""


@contextmanager
def connected(
    placement: Placement, options: Options, limits: Mapping[str, int | None], progress: Progress
) -> Iterator[RayExecutor]:
    """An executor on the cluster that `placement` names. Raises UsageError where there is none, or where none of its
    machines could ever compute a cell."""
    with session(placement.address):
        yield RayExecutor(placement, options, limits, progress)


@dataclass(frozen=True)
class _Running:
    """A task under way: what it is of, and the reference to what is large in its answer."""

    item: Job | VictimPlan
    more: Any

    @property
    def key(self) -> str:
        return self.item.key if isinstance(self.item, VictimPlan) else self.item.piece.key

    @property
    def title(self) -> str:
        if isinstance(self.item, VictimPlan):
            return f"preparing {self.item.model.label}"
        piece = self.item.piece
        attack = getattr(piece, "attack", None)
        return f"{attack.label if attack else 'checks'} on {piece.victim.model.label}"


@dataclass
class _Board:
    """What waits, by key, in order; what is due of it; what is prepared, by victim; what runs, by reference."""

    waiting: dict[str, Piece]
    jobs: dict[str, Job] = field(default_factory=dict)
    prepared: dict[str, Reply] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    running: dict[Any, _Running] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    users: Counter[str] = field(default_factory=Counter)
    """How many pieces are left for which a victim's weights may be wanted."""

    def __post_init__(self) -> None:
        for piece in self.waiting.values():
            self.users.update(_used(piece))

    def runs(self, key: str) -> bool:
        return any(running.key == key for running in self.running.values())


class RayExecutor:
    """Hands out what is due as long as workers are free, and stores what comes back, in whatever order."""

    def __init__(
        self, placement: Placement, options: Options, limits: Mapping[str, int | None], progress: Progress
    ) -> None:
        nodes = ray.nodes()
        self._cpus = placement.cpus_per_cell or 1
        self._gpus = gpus_per_cell(placement, options.device, nodes)
        self._slots = demand_slots(nodes, self._cpus, self._gpus)
        self._options = replace(options, device="cuda" if self._gpus else _without_gpu(options.device))
        self._limits, self._progress = limits, progress
        self._artifacts = options.artifacts()
        variables = {name: value for name, value in os.environ.items() if name.startswith("ADVPLUG_")}
        self._surroundings = Surroundings(
            uuid.uuid4().hex, os.getcwd(), tuple(filter(None, sys.path)), variables, self._cpus
        )
        # Without a limit on calls a worker that has a GPU is kept, too, with the victims that it has built.
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, num_returns=2, max_retries=0, max_calls=0)
        self._work = task(work)

    @property
    def device(self) -> str:
        return self._options.device

    def run(self, runner: Runner) -> None:
        """Nothing is begun once the allowance is used up; what runs then is finished."""
        pieces = runner.pieces()
        self._shared = self._share(pieces)
        board = _Board({piece.key: piece for piece in pieces})
        try:
            while True:
                if not runner.out:
                    self._hand_out(board, runner)
                if not board.running:
                    break
                self._progress.stage(f"{len(board.running)} at work on Ray, {len(board.waiting)} waiting", 0)
                ready, _ = ray.wait(list(board.running), num_returns=1, timeout=LOOK_AGAIN)
                for reference in ready:
                    self._take(board, runner, reference, board.running.pop(reference))
                if not ready:
                    self._slots = demand_slots(ray.nodes(), self._cpus, self._gpus)
            assert runner.out or not board.waiting
        finally:
            for reference in board.running:
                ray.cancel(reference, force=True)

    def _share(self, pieces: Sequence[Piece]) -> Any:
        """What every worker needs, put where all can fetch it. Raises UsageError for objects that cannot be sent."""
        from advplug.cluster.plans import objects_of

        objects = objects_of(pieces)
        for kind, label in objects:
            try:
                ray.cloudpickle.dumps(objects[kind, label])
            except Exception as error:  # the user's objects may hold anything
                raise UsageError(
                    f"the {kind} '{label}' cannot be sent to Ray's workers ({' '.join(str(error).split())}); give it "
                    "by name, like py:MODULE:FACTORY, or leave the executor out"
                ) from error
        return ray.put(Shared(self._options, dict(self._limits), versions(), objects))

    # --- out ---

    def _hand_out(self, board: _Board, runner: Runner) -> None:
        """Begins what can be begun, first what comes first, until all workers are busy."""
        # With an allowance every task counts; without, a second one waits for each worker.
        most = self._slots if runner.allowance.limited else 2 * self._slots
        for key, piece in list(board.waiting.items()):
            if len(board.running) >= most:
                return
            if any(before in board.waiting or board.runs(before) for before in runner.after(piece)):
                continue
            if key not in board.jobs:
                job = runner.due(piece)
                if job is None:
                    self._done_with(board, runner, piece)
                    continue
                board.jobs[key] = job
            self._begin(board, runner, board.jobs[key])

    def _begin(self, board: _Board, runner: Runner, job: Job) -> None:
        """The job, if its victims are prepared; otherwise the first of them that is not under way."""
        victims = victims_of(job.piece)
        missing = [plan for plan in victims if plan.key not in board.prepared]
        for plan in missing:
            if not board.runs(plan.key) and not any(board.runs(base.key) for base in built_on(plan)):
                self._submit(board, plan, Task(plan.key, victim=plan), [*built_on(plan)])
        if missing:
            return
        failed = [board.prepared[plan.key].outcome for plan in victims]
        error = next((f for f in failed if isinstance(f, AdvplugError)), None)
        if error is not None:
            runner.settle(job, error)
            self._done_with(board, runner, job.piece)
            return
        seen = {key: found for plan in victims for key, found in board.prepared[plan.key].seen.items()}
        images = None
        if job.base is not None:
            images = board.images[job.base] = board.images.get(job.base) or _stored_images(runner, job.base)
        self._submit(board, job, Task(job.piece.key, job=job, seen=seen), victims, images)
        del board.waiting[job.piece.key]

    def _submit(
        self, board: _Board, item: Job | VictimPlan, task: Task, victims: Sequence[VictimPlan], images: Any = None
    ) -> None:
        from advplug.cluster.plans import pack

        weights = [
            (board.prepared[plan.key].artifacts, board.weights[plan.key])
            for plan in victims
            if plan.key in board.weights
        ]
        lent = Lent(self._shared, weights, images)
        reply, more = self._work.options(name=_Running(item, None).title).remote(self._surroundings, pack(task), lent)
        board.running[reply] = _Running(item, more)

    # --- in ---

    def _take(self, board: _Board, runner: Runner, reference: Any, task: _Running) -> None:
        """What came of a task, stored; begun again where its worker died. Raises UsageError for an unfit machine."""
        try:
            reply: Reply = ray.get(reference)
            more = None if reply.unfit or reply.lost else self._more(task, reply)
        except ray.exceptions.RayTaskError as error:
            raise explained(error.as_instanceof_cause()) from error
        except ray.exceptions.RayError as error:
            self._again(board, runner, task, f"its worker died, {type(error).__name__}")
            return
        runner.passes += reply.passes
        if reply.unfit:
            raise UsageError(reply.unfit)
        if isinstance(task.item, VictimPlan):
            board.prepared[task.key] = reply
            if reply.artifacts:
                board.weights[task.key] = task.more
            return
        job = task.item
        if reply.lost or reply.outcome is None:
            board.images.pop(job.base or "", None)
            self._again(board, runner, task, "a machine with images that it needs is gone")
            return
        if more is not None:
            board.images[task.key] = task.more
            _keep(runner, task.key, more)
        runner.settle(job, reply.outcome)
        self._done_with(board, runner, job.piece)

    def _more(self, task: _Running, reply: Reply) -> Any:
        """What is large in an answer, as far as it is wanted here; trained weights go to this machine's cache."""
        if isinstance(task.item, Job):
            return ray.get(task.more) if task.item.keep else None
        if not all(self._artifacts.has(key) for key in reply.artifacts):
            for key, files in ray.get(task.more).items():
                self._artifacts.add(key, files)
        return None

    def _again(self, board: _Board, runner: Runner, task: _Running, why: str) -> None:
        """Workers and machines may be taken away at any time; what dies again and again is killed by what it does."""
        board.deaths[task.key] += 1
        if board.deaths[task.key] <= RETRIES:
            self._progress.note(f"{task.title} is begun again: {why}")
            if isinstance(task.item, Job):
                board.waiting = {task.key: task.item.piece} | board.waiting
            return
        died = CellFailure(
            f"begun {board.deaths[task.key]} times, and each time {why}; where memory is short, raise --cpus-per-cell, "
            "so that fewer run at a time, or lower --batch-size"
        )
        if isinstance(task.item, VictimPlan):
            board.prepared[task.key] = Reply(died)
        else:
            runner.settle(task.item, died)
            self._done_with(board, runner, task.item.piece)

    def _done_with(self, board: _Board, runner: Runner, piece: Piece) -> None:
        """Forgets a piece, and images and weights that nobody waits for any more."""
        board.waiting.pop(piece.key, None)
        board.jobs.pop(piece.key, None)
        for base in (piece.key, *runner.after(piece)):
            later = [
                *board.waiting.values(),
                *(t.item.piece for t in board.running.values() if isinstance(t.item, Job)),
            ]
            if not any(base in runner.after(other) for other in later):
                board.images.pop(base, None)
        for key in _used(piece):
            board.users[key] -= 1
            if not board.users[key]:
                board.prepared.pop(key, None)
                board.weights.pop(key, None)


def _used(piece: Piece) -> set[str]:
    victims = victims_of(piece)
    return {plan.key for victim in victims for plan in (victim, *built_on(victim))}


def explained(cause: Exception) -> Exception:
    """What went wrong in a worker beside the work, as an error to raise here."""
    text = " ".join(str(cause).split())
    if isinstance(cause, ImportError) or "failed to import on the worker" in text:
        lacking = re.findall(r"No module named '[\w.]+'", text)
        why = f" ({lacking[-1]})" if lacking else ""
        return UsageError(
            f"a machine of the Ray cluster lacks packages{why}; install advplug and its plugins as here, on all of them"
        )
    return cause


def built_on(plan: VictimPlan) -> list[VictimPlan]:
    """Victims whose trained weights this one starts from, as far as plans tell: it waits for those under way."""
    shorter = [replace(plan, defense=plan.defense[:n]) for n in range(len(plan.defense))]
    if any("objective" in bound.caps.stages for bound in plan.defense):
        shorter = []  # trained anew, with another aim
    return [need for _, need in plan.needs] + shorter[::-1]


def _without_gpu(device: str) -> str:
    return "cpu" if device == "auto" else device


def _stored_images(runner: Runner, base: str) -> Any:
    """The images of a sweep, from the run's folder to where workers can fetch them."""
    budgets = next(s.budgets for s in runner.sweeps if s.key == base)
    files = crafted_files(runner.store.crafted, base, budgets)
    return ray.put({eps: np.load(file, mmap_mode="r") for eps, file in files.items()})


def _keep(runner: Runner, sweep: str, images: Mapping[Fraction, np.ndarray[Any, Any]]) -> None:
    """Writes crafted images to the run's folder, so that a run that goes on later has them."""
    import torch

    count = len(next(iter(images.values())))
    writer = CraftedWriter(runner.store.crafted, sweep, tuple(images), count)
    for eps, x in images.items():
        writer.put(eps, 0, torch.from_numpy(x.copy()))  # what Ray shares cannot be written to
    writer.finish()
