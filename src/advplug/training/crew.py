"""Who trains: this process alone, or several, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from advplug.rng import Stream


class Crew(Protocol):
    """What the training loop asks for at each step."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def part(self, n: int) -> slice:
        """The rows of a batch of `n` images that are this process's; there are at least `size`."""

    def own(self, stream: Stream) -> Stream:
        """Randomness for these rows, that of others being another."""

    def joined(self, model: nn.Module) -> AbstractContextManager[object]:
        """Inside, all processes hold the same weights, and batch norm takes its statistics over the whole batch."""

    def forward(self) -> AbstractContextManager[object]:
        """The precision of the forward pass."""

    def backward(self, loss: Tensor, share: float, parameters: Iterable[nn.Parameter]) -> float:
        """Leaves the gradients of the whole batch at the parameters, and returns its loss.

        `loss` is the mean over the rows of this process, `share` is their share of the batch.
        """


class Alone:
    """This process, as if there were no others."""

    size = 1

    def part(self, n: int) -> slice:
        return slice(None)

    def own(self, stream: Stream) -> Stream:
        return stream

    def joined(self, model: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()

    def forward(self) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor, share: float, parameters: Iterable[nn.Parameter]) -> float:
        value = loss.item()
        loss.backward()  # type: ignore[no-untyped-call]
        return value


ALONE = Alone()
