"""The options that say where cells are computed. Like `cli`: every import beyond click waits until one is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click


def executor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which gets them as one `placement`."""

    @click.option(
        "--executor",
        default="in-process",
        show_default=True,
        metavar="NAME",
        help="in-process, or ray: cells on the processes of a Ray cluster.",
    )
    @click.option(
        "--address",
        metavar="HOST:PORT",
        help="With ray: a running cluster, auto for this machine's. Default: started for the run.",
    )
    @click.option(
        "--gpus-per-cell",
        type=float,
        metavar="SHARE",
        help="With ray: GPU a cell takes, like 0.5. Default: one where there are any.",
    )
    @click.option("--cpus-per-cell", type=int, metavar="N", help="With ray: CPUs, and threads, of a cell. Default: 1.")
    @functools.wraps(command)
    def placed(
        *arguments: Any,
        executor: str,
        address: str | None,
        gpus_per_cell: float | None,
        cpus_per_cell: int | None,
        **rest: Any,
    ) -> Any:
        from advplug.executors import Placement

        placement = Placement(executor, address, gpus_per_cell, cpus_per_cell)
        placement.check(rest["device"])
        return command(*arguments, placement=placement, **rest)

    return placed  # fmt: skip
