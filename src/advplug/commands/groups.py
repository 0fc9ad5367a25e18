"""The commands that have commands of their own. Like `cli`: every import beyond click waits until one needs it."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def plugin() -> None:
    """Write and check plugins."""


@plugin.command("new")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["attack", "defense"]),
    default="attack",
    show_default=True,
    help="What the example is; the guide to plugins has the other kinds.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("."), metavar="DIR",
              help="Folder to create the package in.")  # fmt: skip
def plugin_new(name: str, kind: str, output: Path) -> None:
    """Write an installable plugin package with a working example and its test."""
    import shlex

    from advplug.scaffold import new_plugin

    files = new_plugin(name, output, kind)
    for path in files:
        click.echo(path)
    root = files[0].parent
    package = shlex.quote(f"./{root}[dev]" if not root.is_absolute() else f"{root}[dev]")
    checked = root.name.removeprefix("advplug-")
    click.echo(f"next: pip install -e {package}, then: advplug plugin check {checked}", err=True)


@plugin.command("check")
@click.argument("name")
def plugin_check(name: str) -> None:
    """Run the conformance suite on everything that an installed plugin registers; exit 1 where a check fails."""
    from advplug.errors import GateError
    from advplug.testing import check_plugin

    results = check_plugin(name)
    states = {True: "ok  ", False: "FAIL", None: "--  "}
    for subject, ok, detail in results:
        click.echo(f"{states[ok]} {subject}{': ' + detail if detail else ''}")
    bad = sum(ok is False for _, ok, _ in results)
    if bad:
        raise GateError(f"{bad} of {len(results)} checks failed")


@click.group()
def cache() -> None:
    """Look at or empty the cache of trained weights."""


@cache.command("ls")
def cache_ls() -> None:
    """List what is cached: what made it, size, age."""
    from advplug.catalogue import cache_listing

    click.echo(cache_listing())


@cache.command("clear")
@click.confirmation_option(prompt="Delete all cached weights?")
def cache_clear() -> None:
    """Delete all cached weights; they are trained again when needed."""
    from advplug.artifacts import Artifacts

    click.echo(f"{Artifacts().clear()} entries deleted")
