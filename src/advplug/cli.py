"""The command line: options only. Every import beyond click waits until a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from advplug.commands.executors import executor_options
from advplug.commands.files import compare_runs, export_run, plot_run
from advplug.commands.groups import cache, plugin
from advplug.commands.pack import pack, predict
from advplug.commands.report import report
from advplug.commands.run import Interrupted, command_line, run, schema, show_status
from advplug.commands.training import training_option
from advplug.defaults import CRAFTED_BY, OUTPUT

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="advplug", message="advplug %(version)s")
@click.option("--debug", is_flag=True, envvar="ADVPLUG_DEBUG", help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """How robust is this vision model, and does this defense help?

    \b
    advplug eval --model resnet18 --attack ifgsm --defense prune
    advplug run matrix.yaml
    advplug transfer --model cnn --model resnet18
    advplug list attacks
    advplug info attack pgd
    """
    if debug:
        os.environ["ADVPLUG_DEBUG"] = "1"


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_RUN = (
    click.option("-e", "--eps", "budgets", multiple=True, metavar="EPS",
                 help="Budget, like 8/255 or l2:0.5. Default: the dataset's customary one."),
    click.option("--dataset", "datasets", multiple=True, default=("digits",), show_default=True, metavar="DATASET",
                 help="Dataset: a name, folder:PATH, npz:PATH."),
    click.option("-n", "limit", type=int, metavar="N", help="Number of test images. Default: the dataset's own."),
    click.option("--skip-bad", is_flag=True, help="Leave out images and captions that cannot be read, and note which."),
    click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, metavar="SEED",
                 help="Seed of training and attacks."),
    click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(OUTPUT),
                 show_default=True, metavar="DIR", help="Folder that keeps the results; runs resume from it."),
    click.option("--fresh/--resume", default=False, help="Compute everything anew, or what is missing (default)."),
    click.option("--dry-run", is_flag=True, help="Print the cells and what is done, and compute nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (see: advplug schema)."),
    click.option("--device", default="auto", show_default=True, metavar="DEVICE",
                 help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--batch-size", type=int, default=128, show_default=True,
                 help="Images per pass; halved by itself when memory runs out."),
    click.option("--offline", is_flag=True, help="Never touch the network."),
    click.option("--track", "tracks", multiple=True, metavar="TRACKER",
                 help="Hand the finished run to a tracker, like mlflow or jsonl:FILE (advplug list trackers)."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on standard error."),
    click.option("-v", "--verbose", is_flag=True, help="Log what happens, and show warnings of libraries."),
)  # fmt: skip


@cli.command("eval")
@_options(
    click.option("-m", "--model", "models", multiple=True, required=True, metavar="MODEL",
                 help="Model to attack: a name, torchvision:NAME@TAG, file:PATH#arch=NAME or py:MODULE:FACTORY."),
    click.option("-a", "--attack", "attacks", multiple=True, metavar="ATTACK",
                 help="Attack, like ifgsm or pgd:steps=40,eps=8/255. Default: the standard protocol."),
    click.option("-d", "--defense", "defenses", multiple=True, metavar="DEFENSE",
                 help="Defense, like prune:ratio=0.4; A+B stacks two. Default: none."),
    click.option("--no-baseline", is_flag=True, help="Leave out the undefended baseline."),
    click.option("--audit", type=click.Choice(["none", "quick", "full"]), default="quick", show_default=True,
                 help="Health checks: quick on 64 images, full on all, none (nothing can then be trusted)."),
    click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="Draw accuracy along the budgets, or along the number in which defenses differ (svg, png, pdf)."),
    *_RUN,
)  # fmt: skip
@executor_options
@training_option
def evaluate(no_baseline: bool, plot: Path | None, **given: Any) -> None:
    """Evaluate models under attack, with and without defenses.

    A repeated option is an axis: every model meets every defense, attack and budget. Finished cells are
    kept in the output folder, and the same command again computes only what is missing.
    """
    from advplug.console import show
    from advplug.session import plan_all

    baseline = not no_baseline
    if plot is None:
        _run(plan_all, show, keeps_spec=True, baseline=baseline, **given)
        return
    from advplug.plots.curves import axis_of, draw, plot_path
    from advplug.plots.poisons import axis_of_poisons

    plot_path(plot)
    axes = []

    def plan_along(request: Any) -> tuple[list[Any], list[Any]]:
        sweeps, poisons = plan_all(request)
        axes.append(axis_of(sweeps) if sweeps or not poisons else axis_of_poisons(poisons))
        return sweeps, poisons

    def show_and_draw(result: Any, as_json: bool, quiet: bool) -> None:
        show(result, as_json, quiet)
        if any(made.status == "ok" for made in result.done):  # otherwise what failed is what has to be said
            draw(result, axes[0], plot)

    _run(plan_along, show_and_draw, keeps_spec=True, baseline=baseline, **given)


@cli.command("transfer")
@_options(
    click.option("-m", "--model", "models", multiple=True, required=True, metavar="MODEL",
                 help="Model, or MODEL+DEFENSE; give at least two."),
    click.option("-a", "--attack", default=CRAFTED_BY, show_default=True, metavar="ATTACK",
                 help="Attack that crafts the images."),
    *_RUN,
)  # fmt: skip
@executor_options
@training_option
def transfer(attack: str, **given: Any) -> None:
    """Craft on each model, judge on each: a matrix of robust accuracies.

    The diagonal is the attack on the model itself. Images are crafted once a model.
    """
    from advplug.console import show_transfer
    from advplug.session import plan_transfer

    _run(lambda request: (plan_transfer(request, attack), []), show_transfer, audit="none", certify=False, **given)


def _run(
    plan: Callable[[Any], tuple[list[Any], list[Any]]],
    show: Callable[[Any, bool, bool], None],
    output: Path,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
    verbose: bool,
    skip_bad: bool,
    tracks: tuple[str, ...],
    keeps_spec: bool = False,
    **given: Any,
) -> None:
    from advplug.errors import CellFailure
    from advplug.session import Request, certificates, execute
    from advplug.skipping import all_skipping
    from advplug.tracking import made, trackers

    if skip_bad:
        given["datasets"] = all_skipping(given["datasets"])
    request = Request(output=output, command=command_line(), **given)
    asked = trackers(tracks)
    sweeps, poisons = plan(request)
    if dry_run:
        _print_plan(sweeps, certificates(request, sweeps), poisons, request, as_json)
        return
    from advplug.console import console_progress, hand_over, quieten, resuming
    from advplug.studies.plan import spec_of

    quieten(verbose)
    ready = made(asked)
    spec = spec_of(request) if keeps_spec else None
    with console_progress(quiet) as progress:
        try:
            result = execute(request, sweeps, progress, poisons, spec)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: finished cells are kept in {output}; to go on: {resuming(request.command)}"
            ) from None
    show(result, as_json, quiet)
    hand_over(result, ready, quiet)
    if result.failed:
        raise CellFailure(f"{len(result.failed)} of {len(result.done)} cells failed: {result.failed[0].reason}")


@cli.command("leakage")
@click.argument("train")
@click.argument("evaluation", metavar="EVAL")
@click.option("--skip-bad", is_flag=True, help="Leave out images and captions that cannot be read, and say which.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("--json", "as_json", is_flag=True, help="Print all pairs as JSON.")
def leakage(train: str, evaluation: str, skip_bad: bool, offline: bool, as_json: bool) -> None:
    """Look for images of EVAL in TRAIN; exit 1 where there are any.

    Each is a dataset (its training and its test split), a folder of images, or a file of captions. Files, pixels,
    near copies as re-saving and rescaling make them, and sources are compared; captions only for a note.
    """
    from advplug.leakage import find_among, gate, images_of, render

    ours, notes = images_of(train, "train", offline, skip_bad)
    theirs, more = images_of(evaluation, "test", offline, skip_bad)
    for note in (*notes, *more):
        click.echo(note, err=True)
    leaks = find_among(ours, theirs)
    click.echo(leaks.to_json() if as_json else render(leaks))
    gate(leaks)


@cli.command("poison")
@click.argument("dataset")
@click.argument("attack")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="New folder for the images, and for the record and the page of the poisons.",
)
@click.option("-m", "--model", metavar="MODEL", help="Model to look through, for attacks that need one.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the attack, as of eval.")
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="As of eval.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def poison(
    dataset: str, attack: str, output: Path, model: str | None, seed: int, device: str, offline: bool
) -> None:  # fmt: skip
    """Write DATASET with a training split poisoned by ATTACK to a folder.

    The folder is a dataset again, and holds a page that shows poisoned samples beside their originals.
    """
    from advplug.session import write_poisoned

    made = write_poisoned(dataset, attack, output, model, seed, device, offline, command_line())
    click.echo(f"{made.training:,} training images, {made.poisons:,} of them poisons, and {made.test:,} test images")
    click.echo(f"to look at them: {output}/poisons.html; what they were: {output}/poisons.json")


@cli.command("list")
@click.argument("kind", required=False, metavar="[KIND]")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, parameters included.")
def list_plugins(kind: str | None, as_json: bool) -> None:
    """List attacks, defenses, models, datasets, metrics or trackers."""
    from advplug.catalogue import listing, listing_json
    from advplug.registry import registry, reject_unknown_kind

    single = reject_unknown_kind(kind) if kind else None
    known = registry()
    click.echo(listing_json(known, single) if as_json else listing(known, single))
    for broken in known.broken:
        click.echo(f"plugin '{broken.source.plugin}' failed to load: {broken.reason}", err=True)


@cli.command()
@click.argument("kind")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the description as JSON.")
def info(kind: str, name: str, as_json: bool) -> None:
    """Describe one plugin: parameters with defaults and bounds, capabilities, paper."""
    from advplug.catalogue import description, description_json
    from advplug.registry import registry, reject_unknown_kind

    entry = registry().get(reject_unknown_kind(kind), name)
    click.echo(description_json(entry) if as_json else description(entry))


@cli.command()
@click.option("--quick", is_flag=True, help="Look at versions and plugins only, without importing torch.")
def doctor(quick: bool) -> None:
    """Check the installation: versions, plugins, torchvision, caches."""
    from advplug.doctor import examine, render

    report = examine(quick)
    click.echo(render(report))
    sys.exit(report.exit_code)


for command in (compare_runs, export_run, plot_run, report, pack, predict, plugin, cache, run, show_status, schema):
    cli.add_command(command)


def _print_plan(sweeps: list[Any], proofs: list[Any], poisons: list[Any], request: Any, as_json: bool) -> None:
    from advplug.store import finished
    from advplug.tables.plan import plan_json, render_plan

    keys = [*(s.cell_key(eps) for s in sweeps for eps in s.budgets), *(p.key for p in (*proofs, *poisons))]
    done = {} if request.fresh else finished(request.output, keys)
    click.echo((plan_json if as_json else render_plan)(sweeps, done, proofs, poisons))


def main() -> NoReturn:
    """The entry point: every failure is one line on standard error and an exit code."""
    from advplug.errors import AdvplugError

    try:
        code = cli(prog_name="advplug", standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        code = _fail(f"Error: {_one_line(error)}", 2, error)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", 130)
    except Interrupted as stop:
        code = _fail(str(stop), 130)
    except AdvplugError as error:
        code = _fail(f"Error: {error}", error.exit_code, error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # the last resort: still one line
        text = " ".join(str(error).split())
        code = _fail(f"Error: internal: {type(error).__name__}: {text} (--debug shows where)", 4, error)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{text} See '{context.command_path} --help'." if context else text


def _fail(line: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get("ADVPLUG_DEBUG"):
        import traceback

        traceback.print_exception(error)
    click.echo(line, err=True)
    return code


if __name__ == "__main__":
    main()
