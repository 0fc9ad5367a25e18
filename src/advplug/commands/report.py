"""The command that writes a page. Like `cli`: every import beyond click waits until it is needed."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write. Default: report.html in DIR.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Show where the models look, on clean and adversarial images; builds the models again.",
)
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="Of --explain: as of eval.")
@click.option("--offline", is_flag=True, help="Of --explain: never touch the network.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def report(folder: Path, output: Path | None, explain: bool, device: str, offline: bool, show: bool) -> None:
    """Write the runs in DIR as one page of HTML.

    It needs nothing else: figures and images are in the file. The same runs give the same bytes.
    """
    from functools import partial

    from advplug.report.page import write

    explaining = None
    if explain:
        from advplug.report.explain import explanations

        explaining = partial(explanations, device=device, offline=offline)
    written = write(folder, output, explaining)
    click.echo(f"{written}  ({written.stat().st_size / 1e6:.1f} MB)")
    if show:
        click.launch(written.absolute().as_uri())
