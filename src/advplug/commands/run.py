"""`run`, `status` and `schema`. Like `cli`: every import beyond click waits until a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advplug.commands.executors import executor_options
from advplug.commands.training import training_option
from advplug.defaults import OUTPUT, SPEC

if TYPE_CHECKING:
    from advplug.costs.allowance import Allowance
    from advplug.executors import Placement
    from advplug.results import RunResult
    from advplug.session import Request
    from advplug.studies.plan import Flags, Planned


def command_line() -> str:
    """As it could be typed again."""
    import shlex

    return shlex.join(["advplug", *sys.argv[1:]])


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C, with the line that says how to go on."""


@click.command("run")
@click.argument("matrix", type=click.Path(path_type=Path))
@click.option("--scale", metavar="NAME", help="One of the file's scales, such as smoke, small or paper.")
@click.option("-m", "--model", "models", multiple=True, metavar="MODEL", help="In place of the file's models.")
@click.option("-a", "--attack", "attacks", multiple=True, metavar="ATTACK", help="In place of its attacks.")
@click.option("-d", "--defense", "defenses", multiple=True, metavar="DEFENSE", help="In place of its defenses.")
@click.option("-e", "--eps", multiple=True, metavar="EPS", help="In place of its budgets.")
@click.option("--dataset", "datasets", multiple=True, metavar="DATASET", help="In place of its datasets.")
@click.option("--seed", "seeds", type=int, multiple=True, metavar="SEED", help="In place of its seeds.")
@click.option("-n", "n", type=int, metavar="N", help="Number of test images, in place of the file's.")
@click.option("--baseline/--no-baseline", default=None, help="Whether to evaluate the undefended model, too.")
@click.option("--audit", type=click.Choice(["none", "quick", "full"]), help="Health checks, in place of the file's.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help=f"Folder that keeps the results. Default: {OUTPUT}/NAME, of the file and its scale.",
)
@click.option("--fresh/--resume", default=False, help="Compute everything anew, or what is missing (default).")
@click.option("--budget", metavar="TIME", help="Stop after this time, like 30m or 1h30m; the most telling cells first.")
@click.option("--max-passes", metavar="N", help="Stop after so many passes of an image, like 1e6; likewise.")
@click.option("--dry-run", is_flag=True, help="Print the cells, what is done and what the rest costs, and stop.")
@click.option("--calibrate", is_flag=True, help="With --dry-run: time a few passes, and forecast seconds, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (see: advplug schema).")
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="As of eval.")
@click.option("--batch-size", type=int, default=128, show_default=True, help="As of eval.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("--track", "tracks", multiple=True, metavar="TRACKER", help="Hand the run to a tracker, as of eval.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on standard error.")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens, and show warnings of libraries.")
@executor_options
@training_option
def run(
    matrix: Path,
    scale: str | None,
    output: Path | None,
    budget: str | None,
    max_passes: str | None,
    dry_run: bool,
    calibrate: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    fresh: bool,
    device: str,
    batch_size: int,
    offline: bool,
    tracks: tuple[str, ...],
    placement: Placement,
    **given: Any,
) -> None:  # fmt: skip
    """Run a matrix file: every dataset, model, defense, attack, budget and seed of it.

    Options replace the file's keys. Finished cells are kept, and the same command again computes what is missing.
    """
    from advplug.costs.allowance import Allowance, parse_duration, parse_passes
    from advplug.session import Request
    from advplug.studies.plan import plan_file
    from advplug.tracking import trackers

    asked = trackers(tracks)
    allowance = Allowance(
        parse_duration(budget) if budget is not None else None,
        parse_passes(max_passes) if max_passes is not None else None,
    )
    base = Request(
        models=(), output=output or _folder(matrix, scale), fresh=fresh, device=device, batch_size=batch_size,
        offline=offline, command=command_line(), placement=placement,
    )  # fmt: skip
    planned = plan_file(matrix, base, scale, _flags(**given))
    if calibrate and not dry_run:
        raise click.UsageError("--calibrate goes with --dry-run")
    if not quiet:
        for note in planned.notes:
            click.echo(f"note: {note}", err=True)
    if dry_run:
        _forecast(planned, calibrate, as_json, verbose)
    else:
        _demand_kept(matrix, base.output)
        _execute(planned, allowance, asked, as_json, quiet, verbose)


def _folder(matrix: Path, scale: str | None) -> Path:
    """Where results go unless told: a folder's own spec goes on there."""
    if matrix.name == SPEC and (matrix.parent / "results.sqlite").is_file():
        return matrix.parent
    return Path(OUTPUT) / (matrix.stem + (f"-{scale}" if scale else ""))


def _demand_kept(matrix: Path, output: Path | None) -> None:
    """Raises UsageError where the run would put its own spec in the place of the file that it reads."""
    from advplug.errors import UsageError

    spec = (output or Path()) / SPEC
    if spec.exists() and spec.samefile(matrix) and not spec.with_name("results.sqlite").is_file():
        raise UsageError(f"the run would overwrite {matrix} with its own; rename your file, or choose another -o")


def _flags(n: int | None, baseline: bool | None, audit: str | None, **axes: tuple[Any, ...]) -> Flags:
    from advplug.studies.plan import Flags

    return Flags(axes, n, baseline, audit)


def _forecast(planned: Planned, calibrate: bool, as_json: bool, verbose: bool) -> None:
    """The plan, and what is left of it costs."""
    import json

    from advplug.console import quieten
    from advplug.costs.forecast import forecast
    from advplug.session import certificates
    from advplug.store import finished
    from advplug.tables.plan import forecast_json, forecast_text, plan_json, render_plan

    request: Request = planned.request
    proofs = certificates(request, planned.sweeps)
    keys = _keys(planned)
    done = {} if request.fresh or request.output is None else finished(request.output, keys)
    cost, seconds = forecast(planned.sweeps, proofs, done, request.audit), None
    if calibrate:
        from advplug.costs.calibrate import timed

        quieten(verbose)
        seconds = timed(cost, request)
    if as_json:
        rows = json.loads(plan_json(planned.sweeps, done, proofs, planned.poisons))
        click.echo(json.dumps({**rows, "forecast": forecast_json(cost, seconds)}, indent=2))
        return
    title = [planned.matrix.title] if planned.matrix.title else []
    plan = render_plan(planned.sweeps, done, proofs, planned.poisons, request.names)
    click.echo("\n\n".join([*title, plan, forecast_text(cost, seconds, request.names)]))


def _keys(planned: Planned) -> list[str]:
    from advplug.session import certificates

    cells = [s.cell_key(eps) for s in planned.sweeps for eps in s.budgets]
    proofs = [p.key for p in certificates(planned.request, planned.sweeps)]
    return [*cells, *proofs, *(p.key for p in planned.poisons)]


def _execute(
    planned: Planned, allowance: Allowance, asked: list[Any], as_json: bool, quiet: bool, verbose: bool
) -> None:
    from advplug.console import console_progress, hand_over, quieten, resuming, same_command, show
    from advplug.errors import CellFailure
    from advplug.session import execute
    from advplug.studies.plan import spec_text
    from advplug.tracking import made

    ready = made(asked)
    request, keys = planned.request, _keys(planned)
    quieten(verbose)
    with console_progress(quiet) as progress:
        try:
            spec = spec_text(planned.matrix, request.command)
            result = execute(request, planned.sweeps, progress, planned.poisons, spec, allowance)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: finished cells are kept in {request.output}; to go on: {resuming(request.command)}"
            ) from None
    show(result, as_json, quiet)
    if not quiet:
        click.echo(f"this run took {result.run.seconds:.0f} s and {result.run.passes:,} passes of an image", err=True)
    left = _left(planned, allowance, keys, result)
    if left:
        # Beside a table it is part of what is told; beside JSON nothing may be.
        click.echo(f"{left} pending; run {same_command(request.command)} to go on", err=as_json)
    hand_over(result, ready, quiet)
    if result.failed:
        raise CellFailure(f"{len(result.failed)} of {len(result.done)} cells failed: {result.failed[0].reason}")


def _left(planned: Planned, allowance: Allowance, keys: list[str], result: RunResult) -> str:
    """What a limit left to be done, in words; an empty text where that is nothing."""
    from advplug.perturbations import LP
    from advplug.stored.status import pending

    cells = pending(keys, result)
    if cells:
        return f"{cells} of {len(set(keys))} cells"
    # Audits come last of a victim.
    stopped = allowance.used_up(result.run.seconds, result.run.passes) and planned.request.audit != "none"
    threats = [t for t in result.threats if t.audit is None and t.norm in LP and t.attacks] if stopped else []
    return f"the health checks of {len(threats)} of {len(result.threats)} threats are" if threats else ""


@click.command("status")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the cells and their states as JSON.")
def show_status(folder: Path, as_json: bool) -> None:
    """Tell what of a run is done, failed, refused and pending, by the folder that keeps it."""
    from advplug.stored.status import render, status

    found = status(folder)
    click.echo(found.to_json() if as_json else render(found))


@click.command("schema")
@click.argument("what", type=click.Choice(["result", "matrix"]), default="result")
def schema(what: str) -> None:
    """Print the JSON Schema of `advplug eval --json`, or of the files that `advplug run` reads."""
    import json

    if what == "matrix":
        from advplug.studies.schema import json_schema
    else:
        from advplug.results import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
