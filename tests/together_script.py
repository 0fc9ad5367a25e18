"""Trains a few networks in the processes that a launcher started, and writes what came of it to the folder given."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from advplug.contracts import DatasetInfo, Objective, Schedule
from advplug.data import ArrayImages, Split
from advplug.errors import CellFailure
from advplug.rng import Stream
from advplug.train import Training
from advplug.training.crew import ALONE, Crew

INFO = DatasetInfo(("a", "b", "c"), 1, (4, 4), {})
# Batches of 8, 8 and 9: two processes get different numbers of images.
IMAGES = 25
PLAN = Schedule(epochs=4, optimizer="sgd", lr=0.05, batch_size=8, flip=True, shift=1)


class Net(nn.Module):
    """Two kinds of batch norm, and a layer that some batches need and others do not.

    No biases before batch norm: their gradients are rounding errors, which AdamW scales up to steps of full size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dense, self.last = nn.Linear(16, 6, bias=False), nn.BatchNorm1d(6, momentum=None, affine=False)
        self.head, self.rare, self.never = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.last(self.dense(x.flatten(1)))
        bright = x[:, 0] > 1.0  # in few images: often none of a process's own
        logits: Tensor = self.head(x)
        return logits.index_add(0, bright.nonzero()[:, 0], self.rare(x[bright])) if bright.any() else logits


def training(crew: Crew, plan: Schedule = PLAN, n: int = IMAGES, **more: Any) -> Training:
    draws = np.random.RandomState(0)
    labels = draws.randint(0, 3, n)
    images = (0.3 * draws.rand(n, 1, 4, 4) + labels[:, None, None, None] * 0.3).astype(np.float32)
    data = Split(ArrayImages(images), labels, np.arange(n))
    return Training(data, INFO, plan, torch.device("cpu"), Stream(0, "test"), crew=crew, **more)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype)


def double(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
    return functional.cross_entropy(model(x.double()), y)


def trained(crew: Crew, plan: Schedule) -> dict[str, Any]:
    losses: list[float] = []
    model = training(crew, plan, progress=lambda *told: losses.append(told[4])).fit(net(), Objective(double))
    return {"state": model.state_dict(), "losses": losses}


def in_float32(crew: Crew) -> dict[str, Any]:
    """By the default objective; what is seen of the precision in which the network works."""
    seen: list[torch.dtype] = []
    model = net(torch.float32)
    model.get_submodule("head").register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    losses: list[float] = []
    training(crew, replace(PLAN, epochs=12), progress=lambda *told: losses.append(told[4])).fit(model)
    return {"state": model.state_dict(), "losses": losses, "dtypes": seen}


def drawn(crew: Crew) -> Tensor:
    """What an objective of each process draws."""
    found: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        found.append(torch.cat([torch.rand(3, generator=stream.generator()), torch.rand(3)]))
        return functional.cross_entropy(model(x), y)

    training(crew, replace(PLAN, epochs=1)).fit(net(torch.float32), Objective(loss))
    return torch.cat(found)


def failures(crew: Crew) -> list[str]:
    """Of batches smaller than the crew, and of a loss that is no number in one process only."""
    found = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        return model(x).sum() * (float("nan") if crew.own(stream) != stream else 1.0)

    for plan, n, objective in ((PLAN, 1 + (crew.size < 2), None), (PLAN, IMAGES, Objective(loss))):
        try:
            training(crew, plan, n).fit(net(torch.float32), objective)
        except CellFailure as error:
            found.append(str(error))
    return found


def sizes(crew: Crew, n: int) -> list[int]:
    """Images of each step."""
    seen: list[int] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        seen.append(len(x))
        return functional.cross_entropy(model(x), y)

    training(crew, replace(PLAN, epochs=1), n).fit(net(torch.float32), Objective(loss))
    return seen


def main(folder: Path) -> None:
    from accelerate import Accelerator

    from advplug.training.together import Together

    crew = Together(Accelerator(cpu=True))
    made = {
        "sgd": trained(crew, PLAN),
        "adamw": trained(crew, replace(PLAN, optimizer="adamw", lr=0.03)),
        "float32": in_float32(crew),
        "drawn": drawn(crew),
        "failures": failures(crew),
        "sizes": [sizes(crew, 17), sizes(crew, 24)],
        "told": crew.tell(f"from {crew.rank}"),
    }
    torch.save(made, folder / f"{crew.rank}.pt")
    crew.leave()


def alone() -> dict[str, Any]:
    return {"sgd": trained(ALONE, PLAN), "adamw": trained(ALONE, replace(PLAN, optimizer="adamw", lr=0.03)),
            "float32": in_float32(ALONE), "drawn": drawn(ALONE)}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
