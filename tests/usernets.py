"""Models as users write them, good and bad, for `py:usernets:NAME`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits in float64 from pixels: exact, whatever the batch size."""

    def __init__(self, classes: int = 4, channels: int = 1, size: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        pixels = channels * size[0] * size[1]
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).double() - 0.5) @ self.weight.T


class Raising(Linear):
    """Goes wrong on any image that is not of one colour: a first look at it finds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if x.std() > 0:
            raise ZeroDivisionError("the user's code\nis wrong")
        return super().forward(x)


class RaisingInTraining(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ZeroDivisionError("not meant to be trained")
        return super().forward(x)


class Nan(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


class NanOffTheGrid(Linear):
    """Right on 8-bit images, NaN on everything else: an attack on it meets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        off = ((x * 255) - (x * 255).round()).abs().flatten(1).amax(1) > 1e-3
        return torch.where(off[:, None], torch.nan, super().forward(x))


class Narrow(Linear):
    """One logit too few."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


class Several(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Greedy(Linear):
    """Runs out of memory with more than $GREEDY images, and leaves the sizes it saw in a file."""

    def forward(self, x: Tensor) -> Tensor:
        with Path("sizes").open("a") as file:
            file.write(f"{len(x)}\n")
        if len(x) > int(os.environ.get("GREEDY", "5")) and x.std() > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


class Slow(Linear):
    """Stops to sleep in training or in gradient passes, as $SLOW says, once it has made a file of that name."""

    def forward(self, x: Tensor) -> Tensor:
        doing = "training" if self.training else "attack" if x.requires_grad else ""
        if doing and doing == os.environ.get("SLOW"):
            Path(doing).touch()
            time.sleep(60)
        return super().forward(x)


class Halting(Linear):
    """Stops to sleep in its first gradient pass, once it has left the number of its process in the file `halted`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and not Path("halted").exists():
            Path("halting").write_text(str(os.getpid()))
            Path("halting").rename("halted")
            time.sleep(100)
        return super().forward(x)


class Told(Linear):
    """Leaves the number of the process that trains it in the file $TOLD, and takes its time."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with Path(os.environ["TOLD"]).open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.2)
        return super().forward(x)


def raises() -> nn.Module:
    raise RuntimeError("no weights\nto be had")


def nothing() -> None: ...
