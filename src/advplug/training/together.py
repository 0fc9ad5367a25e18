"""Training by several processes with Accelerate, before anything is attacked.

Every process runs the same command and so makes the same plan. All of them train what is due, on their part of each
batch; the main one writes it to the cache. Then the others end, and the main process goes on alone with weights that it
finds there.

Gradients are summed once a step, after the backward pass, and not by DistributedDataParallel, which expects one forward
and one backward pass of its wrapper: adversarial training sends a batch through the network many times.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advplug.artifacts import Artifact, Artifacts
from advplug.errors import AdvplugError
from advplug.rng import Stream

if TYPE_CHECKING:
    from accelerate import Accelerator

    from advplug.build import Stages
    from advplug.plans import VictimPlan


class Together:
    """A crew of the processes that a launcher started; implements `crew.Crew`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        made: torch.device = self._accelerator.device
        return made

    def part(self, n: int) -> slice:
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def own(self, stream: Stream) -> Stream:
        return stream if self.main else stream.child("process", self.rank)

    def forward(self) -> AbstractContextManager[object]:
        made: AbstractContextManager[object] = self._accelerator.autocast()
        return made

    @contextmanager
    def joined(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            if self.size > 1:
                for tensor in (*model.parameters(), *model.buffers()):
                    torch.distributed.broadcast(tensor.data, 0)
                stack.enter_context(whole_batch_norm(model))
            yield

    def backward(self, loss: Tensor, share: float, parameters: Iterable[nn.Parameter]) -> float:
        (loss * share).backward()  # type: ignore[no-untyped-call]
        chosen = list(parameters)
        if self.size > 1:
            # A parameter that no image of this process needed may have a gradient elsewhere, and one that none needed
            # must not get a gradient of 0, which momentum and decay would act on.
            has = [torch.ones_like(loss) * (p.grad is not None) for p in chosen]
            held = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
            flat = torch.cat([t.detach().flatten() for t in (loss * share, *has, *held)])
            torch.distributed.all_reduce(flat)
            value, counts, rest = flat[0], flat[1 : 1 + len(chosen)].tolist(), flat[1 + len(chosen) :]
            for p, count, piece in zip(chosen, counts, torch.split(rest, [p.numel() for p in chosen]), strict=True):
                p.grad = piece.view_as(p).to(p.dtype) if count else None
            return float(value)
        return float(loss.detach())

    def tell(self, thing: Any) -> Any:
        """What the main process says, in every process."""
        held = [thing]
        if self.size > 1:
            torch.distributed.broadcast_object_list(held, 0)
        return held[0]

    def leave(self) -> None:
        """No process goes on before all have come here."""
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()


class JointArtifacts(Artifacts):
    """The cache of the main process: it alone reads and writes; all of them make what is missing."""

    def __init__(self, crew: Together, root: Path | None = None) -> None:
        super().__init__(root)
        self._crew = crew

    def get_or_make(self, key: str, make: Callable[[], Artifact], label: str = "") -> Artifact:
        if not self._crew.main:
            told = self._crew.tell(None)
            if isinstance(told, AdvplugError):
                raise told
            return make() if told is None else told
        asked: list[bool] = []

        def jointly() -> Artifact:
            asked.append(True)
            self._crew.tell(None)
            return make()

        try:
            artifact = super().get_or_make(key, jointly, label)
        except AdvplugError as error:
            if not asked:
                self._crew.tell(error)
            raise
        if not asked:
            self._crew.tell(artifact)
        return artifact


def train(
    plans: Sequence[VictimPlan], device: str, cache: Path | None, offline: bool, progress: Stages
) -> Mapping[str, AdvplugError]:
    """Trains the victims that the main process wants, and ends the other processes.

    What could not be trained is told by the key of its plan.
    """
    from accelerate import Accelerator

    from advplug.build import Builder
    from advplug.progress import Silent

    # Without a GPU Accelerate joins processes of a launcher only if it is told to use the CPU.
    crew = Together(Accelerator(cpu=device == "cpu" or not torch.accelerator.is_available()))
    if not crew.main:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    builder = Builder(JointArtifacts(crew, cache), str(crew.device), offline, progress if crew.main else Silent(), crew)
    known = {plan.key: plan for plan in plans}
    failed: dict[str, AdvplugError] = {}
    for key in crew.tell([plan.key for plan in plans]):
        try:
            with crew._accelerator.main_process_first():  # so that data are fetched once
                builder.dataset(known[key].dataset)
            builder.build(known[key], None)
        except AdvplugError as error:  # of what was asked for, so that every process meets it
            failed[key] = error
    crew.leave()
    if not crew.main:
        _end()
    return failed


def _end() -> NoReturn:
    """Ends a process that has nothing more to do, without tearing the interpreter down: threads of a process group have
    been seen to abort it there, and a launcher takes that for a failure of all."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# --- batch norm ------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over processes; so is the gradient, since each process holds a part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


@contextmanager
def whole_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm takes mean and variance over the parts of all processes (torch's own does on GPUs only)."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for layer in layers:
            layer.forward = functools.partial(_normalised, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _normalised(layer: _BatchNorm, x: Tensor) -> Tensor:
    if not layer.training:
        made: Tensor = type(layer).forward(layer, x)
        return made
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    count = torch.full((1,), x.numel() / x.shape[1], dtype=wide.dtype, device=x.device)
    first = _summed(torch.cat([wide.sum(dims), count]))
    n = first[-1].detach()
    mean = first[:-1] / n
    centred = wide - mean.view(shape)
    variance = _summed(centred.square().sum(dims)) / n
    _follow(layer, mean.detach(), variance.detach() * n / (n - 1))
    out = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.weight is not None:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    return out.to(x.dtype)


def _summed(x: Tensor) -> Tensor:
    made: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return made


@torch.no_grad()
def _follow(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics, as batch norm does."""
    if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
        return
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), rate)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), rate)
