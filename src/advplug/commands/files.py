"""Commands on folders of runs. Like `cli`: every import beyond click waits until one needs it."""

from __future__ import annotations

from pathlib import Path

import click

KINDS = ("curve", "sweep", "pareto", "heatmap", "static-adaptive", "success", "rounds")


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--fail-under",
    "floors",
    multiple=True,
    metavar="NAME=SHARE",
    help="Exit 1 where a figure of B is below SHARE (0 to 1): robust_accuracy, clean_accuracy, ...",
)
@click.option(
    "--fail-on-regression",
    is_flag=True,
    help="Exit 1 where B is shown to be worse than A: the whole 95 % interval says so.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="With --fail-on-regression: worse by more than so many points.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare_runs(
    a: Path, b: Path, floors: tuple[str, ...], fail_on_regression: bool, tolerance: float | None, as_json: bool
) -> None:  # fmt: skip
    """Compare two runs, A and B, by the folders that keep them.

    Differences are paired, image by image; where the 95 % interval holds 0, no difference is shown. Threats that
    both runs hold are compared. If one threat is then left on each side, such as that of two different defenses, these
    two are compared as well. What is not trustworthy or has failed in B does not pass a gate.
    """
    from advplug.comparisons.gates import gate, gate_of
    from advplug.comparisons.runs import compare, render

    rules = gate_of(floors, fail_on_regression, tolerance)
    compared = compare(a, b, named=not as_json)
    click.echo(compared.to_json() if as_json else render(compared))
    gate(compared, rules)


@click.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--format",
    "form",
    required=True,
    type=click.Choice(["csv", "jsonl", "json", "md", "latex", "parquet"]),
    help="json: the whole result; csv, jsonl, parquet: flat rows; md, latex: tables as papers print them.",
)
@click.option(
    "--what",
    "part",
    type=click.Choice(["cells", "threats", "certificates", "poisonings", "images"]),
    help="What a row or table is of; images: every image of every cell. Default: what there is.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="File to write. Default: standard output.")  # fmt: skip
def export_run(folder: Path, form: str, part: str | None, output: Path | None) -> None:
    """Print a stored run for other programs, or as a table for a paper."""
    from advplug.errors import UsageError
    from advplug.export import export, write

    if form == "parquet" and output is None:
        raise UsageError("a Parquet file is no text for standard output; name a file with -o")
    made = export(folder, form, part)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    if output is None:
        click.echo(made.data.decode(), nl=False)
    else:
        write(made.data, output)


@click.command("plot")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-k",
    "--kind",
    type=click.Choice(KINDS),
    required=True,
    help="curve: accuracy by budget; sweep: by a number of a defense; pareto: clean against robust; heatmap: "
    "victims by attacks; static-adaptive: by where attacks were crafted; success, rounds: of poisons.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
              help="File to write: .svg, .png or .pdf.")  # fmt: skip
def plot_run(folder: Path, kind: str, output: Path) -> None:
    """Draw one figure of a stored run."""
    from advplug.plots.curves import plot_path, save
    from advplug.plots.kinds import figure_of
    from advplug.stored.runs import read
    from advplug.studies.shown_names import renamed

    plot_path(output)
    result = read(folder)
    # Along a number the references themselves are compared.
    save(figure_of(result if kind in ("sweep", "success") else renamed(result), kind), output)
