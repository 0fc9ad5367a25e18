"""The option that says who trains networks. Like `cli`: every import beyond click waits until it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click


def training_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--train-with` to a command, which then runs as that says."""

    @click.option(
        "--train-with",
        type=click.Choice(["accelerate"]),
        help="Train networks in all processes that accelerate launch started.",
    )
    @functools.wraps(command)
    def trained(*arguments: Any, train_with: str | None, **rest: Any) -> Any:
        from advplug.errors import AdvplugError
        from advplug.training.launch import asked_for, helps

        with asked_for(train_with):
            if helps():
                if rest["dry_run"]:
                    return None
                rest |= {"tracks": (), "quiet": True}
            try:
                return command(*arguments, **rest)
            except AdvplugError as error:
                if helps():  # the main process comes to the same, and says it
                    raise SystemExit(error.exit_code) from error
                raise

    return trained
