"""What runs in the worker processes of a Ray cluster. torch is imported only once the number of threads is set."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from advplug.artifacts import Artifact, Artifacts
from advplug.errors import AdvplugError, CellFailure, UsageError
from advplug.matrix import Sweep
from advplug.stored.crafted import crafted_files
from advplug.versions import versions

if TYPE_CHECKING:
    from fractions import Fraction

    from advplug.decisions import Clean
    from advplug.plans import Bound, VictimPlan
    from advplug.work import Bench, Job, Options, Outcome

    Seen = Mapping[str, tuple[Clean, bool | None]]
    Images = Mapping[Fraction, np.ndarray[Any, Any]]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Surroundings:
    """Where the driver runs: a worker is made the same. `token` names the run.

    `variables` are environment variables for workers that do not have them, such as the cache's folder.
    """

    token: str
    folder: str
    path: tuple[str, ...]
    variables: Mapping[str, str]
    threads: int


@dataclass(frozen=True)
class Shared:
    """What all tasks of a run need, sent to each machine once. `objects` are the user's own models and data."""

    options: Options
    limits: Mapping[str, int | None]
    versions: Mapping[str, str]
    objects: Mapping[tuple[str, str], Bound]


@dataclass(frozen=True)
class Task:
    """A victim to prepare, or a job. `key` is what it is called where it was planned; `seen`, by victim, the answers
    without attack."""

    key: str
    victim: VictimPlan | None = None
    job: Job | None = None
    seen: Seen = field(default_factory=dict)


@dataclass(frozen=True)
class Lent:
    """References to what a task may need and fetches then: trained weights, images crafted by another one."""

    shared: Any
    weights: Sequence[Any] = ()
    images: Any = None


@dataclass(frozen=True)
class Reply:
    """What a task came to, and the passes that it took.

    `unfit`: this machine would compute something else than what was planned. `lost`: what was lent is gone.
    `artifacts`: the keys of the trained weights that the victim consists of.
    """

    outcome: Outcome | None = None
    passes: int = 0
    seen: Seen = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()
    unfit: str | None = None
    lost: bool = False


class _Noting(Artifacts):
    """The cache, which also says what was asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: dict[str, None] = {}

    def get_or_make(self, key: str, make: Callable[[], Artifact], label: str = "") -> Artifact:
        self.asked[key] = None
        return super().get_or_make(key, make, label)


@dataclass
class _State:
    token: str
    bench: Bench
    artifacts: _Noting


_state: _State | None = None
_set: dict[str, str] = {}
"""Variables that were set here for a run before this one."""


def work(surroundings: Surroundings, task: bytes, lent: Lent) -> tuple[Reply, Any]:
    """The reply, and what is large beside it: the files of a prepared victim's weights by key, or the images that a
    sweep crafted, by budget; None where there is nothing."""
    _settle_in(surroundings)
    import torch

    torch.set_num_threads(surroundings.threads)
    from advplug.cluster.plans import unpack

    try:
        state = _state_of(surroundings.token, lent)
        asked: Task = unpack(task)
        _demand_same(asked)
    except AdvplugError as error:
        return Reply(unfit=f"on the machine {platform.node()}: {error}"), None
    before = state.bench.passes
    if asked.victim is not None:
        reply, more = _prepared(state, asked.victim, lent)
    else:
        reply, more = _computed(state, asked, lent)
    return replace(reply, passes=state.bench.passes - before), more


def _settle_in(to: Surroundings) -> None:
    """Folder, path and variables of the driver, as far as they make sense on this machine."""
    for name in THREADS:
        os.environ[name] = str(to.threads)
    for name, value in to.variables.items():
        if name not in os.environ or os.environ[name] == _set.get(name):
            os.environ[name] = _set[name] = value
    if os.path.isdir(to.folder):
        os.chdir(to.folder)
    sys.path += [entry for entry in to.path if entry not in sys.path]


def _state_of(token: str, lent: Lent) -> _State:
    """This process's bench, made at its first task of a run and kept: it holds built victims. Raises UsageError."""
    global _state
    if _state is not None and _state.token == token:
        return _state
    import ray

    from advplug.allocator import keep_freed_memory
    from advplug.cluster.plans import bindings
    from advplug.console import quieten
    from advplug.progress import Silent
    from advplug.registry import registry
    from advplug.work import Bench

    quieten(False)
    keep_freed_memory()
    _state = None
    shared: Shared = ray.get(lent.shared)
    _demand_versions(shared.versions)
    bindings(shared.objects)
    artifacts = _Noting(shared.options.artifacts().root)
    bench = Bench(shared.options, registry(), shared.limits, Silent(), artifacts)
    _state = _State(token, bench, artifacts)
    return _state


def _demand_versions(driver: Mapping[str, str]) -> None:
    """Raises UsageError where the packages are not those of the driver, builds for other hardware aside."""
    here = versions()
    for name in sorted({*here, *driver}):
        ours, theirs = (found.get(name, "not installed").partition("+")[0] for found in (here, driver))
        if ours != theirs:
            raise UsageError(f"{name} is {ours}, where the run was started it is {theirs}; install the same everywhere")


def _demand_same(task: Task) -> None:
    """Raises UsageError where the plan means something else here: another file, other data, another plugin."""
    planned = task.victim if task.job is None else task.job.piece
    victim = task.victim if task.job is None else task.job.piece.victim
    assert planned is not None
    assert victim is not None
    if planned.key != task.key:
        raise UsageError(
            f"{victim.model.label} on {victim.dataset.label} is not what it is where the run was started; files of "
            "models and data must be the same on all machines, at the same paths"
        )


def _prepared(state: _State, plan: VictimPlan, lent: Lent) -> tuple[Reply, Any]:
    """Trains and looks at a victim. Its weights are sent along for machines that do not share the cache."""
    _install(state, lent)
    state.artifacts.asked.clear()
    try:
        state.bench.victim(plan)
    except AdvplugError as error:
        return Reply(_plain(error)), None
    keys = tuple(state.artifacts.asked)
    reply = Reply(seen=state.bench.seen(plan), artifacts=keys)
    return reply, {key: files for key in keys if (files := state.artifacts.packed(key)) is not None}


def _computed(state: _State, task: Task, lent: Lent) -> tuple[Reply, Any]:
    job = task.job
    assert job is not None
    state.bench.know(task.seen)
    _install(state, lent)
    static = None
    if lent.images is not None:
        images = _fetched(lent.images)
        if images is None:
            return Reply(lost=True), None
        static = _rows(images)
    with tempfile.TemporaryDirectory(prefix="advplug-crafted-") as scratch:
        outcome = state.bench.compute(job, Path(scratch), static)
        if isinstance(outcome, AdvplugError):
            return Reply(_plain(outcome)), None
        kept = crafted_files(Path(scratch), job.piece.key, job.piece.budgets) if isinstance(job.piece, Sweep) else {}
        return Reply(outcome), {eps: np.load(file) for eps, file in kept.items()} if job.keep else None


def _rows(images: Images) -> Any:
    import torch

    return lambda eps, start, stop: torch.from_numpy(np.array(images[eps][start:stop]))


def _install(state: _State, lent: Lent) -> None:
    """Puts lent weights into this machine's cache. Those that cannot be had are trained again."""
    for keys, files in lent.weights:
        if all(state.artifacts.has(key) for key in keys):
            continue
        for key, made in (_fetched(files) or {}).items():
            state.artifacts.add(key, made)


def _fetched(reference: Any) -> Any:
    """What a reference stands for; None where the machine that held it is gone."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.ObjectLostError:
        return None


def _plain(error: AdvplugError) -> AdvplugError:
    """The error without what it came from, which another process may not be able to read."""
    if os.environ.get("ADVPLUG_DEBUG"):
        import traceback

        traceback.print_exception(error)
    kind = type(error) if type(error).__init__ is AdvplugError.__init__ else CellFailure
    return kind(str(error))
