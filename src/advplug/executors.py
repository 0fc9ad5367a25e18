"""Where cells are computed: in this process, or as tasks on a Ray cluster. No torch until something is computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from advplug.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from advplug.progress import Progress
    from advplug.registry import Registry
    from advplug.runner import Runner
    from advplug.work import Options

IN_PROCESS, RAY = "in-process", "ray"
NAMES = (IN_PROCESS, RAY)


@dataclass(frozen=True)
class Placement:
    """Where a run's cells are computed, which changes no result.

    `address` is that of a running Ray cluster, `auto` for the one of this machine; without it Ray is started here for
    the run. `gpus_per_cell` (0 to 1) is the share of a GPU that a cell takes, `cpus_per_cell` how many CPUs, and so
    threads.
    """

    executor: str = IN_PROCESS
    address: str | None = None
    gpus_per_cell: float | None = None
    cpus_per_cell: int | None = None

    def check(self, device: str) -> None:
        """Raises UsageError for what cannot be asked for, whatever the cluster."""
        if self.executor not in NAMES:
            hint = did_you_mean(self.executor, NAMES) or f"; there are {' and '.join(NAMES)}"
            raise UsageError(f"no executor is called '{self.executor}'{hint}")
        given = {
            "--address": self.address,
            "--gpus-per-cell": self.gpus_per_cell,
            "--cpus-per-cell": self.cpus_per_cell,
        }
        if self.executor != RAY:
            for option, value in given.items():
                if value is not None:
                    raise UsageError(f"{option} goes with --executor ray")
            return
        if self.gpus_per_cell is not None and not 0 <= self.gpus_per_cell <= 1:
            raise UsageError(f"--gpus-per-cell takes a share of one GPU, 0 to 1, got {self.gpus_per_cell:g}")
        if self.cpus_per_cell is not None and self.cpus_per_cell < 1:
            raise UsageError(f"--cpus-per-cell must be at least 1, got {self.cpus_per_cell}")
        if device.startswith("cuda:"):
            raise UsageError(f"Ray chooses the GPU of each cell; use --device cuda in place of {device}")
        if device == "cpu" and self.gpus_per_cell:
            raise UsageError("--device cpu uses no GPU; leave --gpus-per-cell out")
        if device == "cuda" and self.gpus_per_cell == 0:
            raise UsageError(
                "--device cuda needs a GPU for each cell; leave --gpus-per-cell out, or use a share like 0.5"
            )
        if self.address is not None and self.address.startswith("ray://"):
            raise UsageError(
                f"{self.address} is a Ray Client address; run advplug on a machine of the cluster, with --address auto"
            )


class Executor(Protocol):
    """Computes what a runner says is due, and hands it what came of it."""

    @property
    def device(self) -> str:
        """Where models run: cpu, cuda, mps."""

    def run(self, runner: Runner) -> None: ...


@contextmanager
def started(
    placement: Placement,
    options: Options,
    registry: Registry,
    limits: Mapping[str, int | None],
    progress: Progress,
) -> Iterator[Executor]:
    """The executor, ready; what it started is gone afterwards. `limits` are numbers of test images by dataset.

    Raises UsageError where Ray is not installed, where there is no cluster, or where none of its machines could ever
    compute a cell.
    """
    if placement.executor == IN_PROCESS:
        yield InProcess(options, registry, limits, progress)
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed; pip install 'advplug[ray]', or leave --executor out")
    from advplug.cluster.executor import connected

    with connected(placement, options, limits, progress) as executor:
        yield executor


class InProcess:
    """One piece after the other, here."""

    def __init__(
        self, options: Options, registry: Registry, limits: Mapping[str, int | None], progress: Progress
    ) -> None:
        from advplug.work import Bench

        self._bench = Bench(options, registry, limits, progress)

    @property
    def device(self) -> str:
        return self._bench.device

    def run(self, runner: Runner) -> None:
        """Nothing is begun once the allowance is used up."""
        for piece in runner.pieces():
            if runner.out:
                return
            job = runner.due(piece)
            if job is None:
                continue
            before = self._bench.passes
            try:
                outcome = self._bench.compute(job, runner.store.crafted, runner.images(job))
            finally:
                runner.passes += self._bench.passes - before
            runner.settle(job, outcome)
