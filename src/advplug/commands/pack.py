"""`pack` and `predict`. Like `cli`: every import beyond click waits until a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from advplug.packs.manifest import Manifest

SHA256 = click.option("--sha256", metavar="HASH", help="What the manifest must hash to; anything else is refused.")


@click.command("pack")
@click.argument("model", required=False)
@click.argument("defense", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="New folder for the pack.")
@click.option(
    "--dataset", default="digits", show_default=True, metavar="DATASET", help="Data of the model, as of eval."
)
@click.option(
    "--from",
    "run",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Folder of a run that judged this model and defense: its figures and verdicts go into the manifest.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of training, as of eval.")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Test images that are recorded with their answers, for --check.",
)
@click.option("--no-onnx", is_flag=True, help="Leave out the ONNX file.")
@click.option("--check", type=click.Path(path_type=Path), metavar="PACK", help="Check a pack instead of making one.")
@SHA256
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="Of training, as of eval.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on standard error.")
def pack(
    model: str | None,
    defense: str | None,
    output: Path | None,
    dataset: str,
    run: Path | None,
    seed: int,
    images: int,
    no_onnx: bool,
    check: Path | None,
    sha256: str | None,
    device: str,
    offline: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Pack MODEL with DEFENSE (or none) into a folder to deploy: the exported graph and what is known of it.

    --check loads a pack in this process and compares its answers with those that were recorded; exit 1 if they differ.
    """
    if check is not None:
        if model is not None or output is not None or run is not None:
            raise click.UsageError("--check takes a pack and nothing to pack; leave MODEL, -o and --from out")
        from advplug.packs.run import check as checked

        for line in checked(check, sha256):
            click.echo(line)
        return
    if model is None or defense is None or output is None:
        raise click.UsageError("give MODEL, DEFENSE (or none) and -o DIR, or --check PACK")
    if sha256 is not None:
        raise click.UsageError("--sha256 goes with --check")
    from advplug.console import console_progress, quieten
    from advplug.packs.export import PackRequest
    from advplug.packs.export import pack as packed

    quieten(False)
    asked = PackRequest(model, defense, output, dataset, seed, run, images, not no_onnx, device, offline)
    with console_progress(quiet) as progress:
        made = packed(asked, progress)
    _tell(made, output, quiet)


def _tell(made: Manifest, output: Path, quiet: bool) -> None:
    from advplug.packs.manifest import MANIFEST, digest
    from advplug.tables.text import percent

    for name, told in made.files.items():
        click.echo(f"{output / name}  {told.bytes / 1e6:.1f} MB")
    click.echo(f"{output / MANIFEST}  sha256 {digest(output / MANIFEST)}")
    if quiet:
        return
    if made.onnx is not None:
        click.echo(f"note: no ONNX file: {made.onnx}", err=True)
    if made.robustness is None:
        click.echo("note: the manifest holds no measured robustness; --from RUN takes it from a run", err=True)
        return
    from advplug.results import threat_from_json

    named = {"model": made.model, "defense": made.defense, "dataset": made.dataset, "seed": made.seed}
    for row in (threat_from_json({**r, **named}) for r in made.robustness["threats"]):
        figure = percent(row.worst_case_accuracy, True)
        click.echo(f"robust accuracy at {row.norm} {row.eps}: {figure} %, {row.verdict or 'no verdict'}", err=True)


@click.command("predict")
@click.argument("folder", metavar="PACK", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@SHA256
@click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON.")
def predict(folder: Path, images: tuple[Path, ...], sha256: str | None, as_json: bool) -> None:
    """Ask a pack for the class of each IMAGE, and how likely it is.

    A pack is a program: use those only that you made, or whose manifest you know by --sha256.
    """
    import json
    from dataclasses import asdict

    from advplug.packs.run import predict as predicted

    made = predicted(folder, images, sha256)
    if as_json:
        click.echo(json.dumps({"schema": 1, "predictions": [asdict(p) for p in made]}, indent=2, allow_nan=False))
        return
    from advplug.tables.text import grid

    rows = [
        [p.image, p.name or "-", "-" if p.probability is None else f"{100 * p.probability:.1f}",
         "answered" if p.accepted else "rejected"] for p in made
    ]  # fmt: skip
    click.echo(grid(str(folder), ["image", "class", "score %", "defense"], rows))
