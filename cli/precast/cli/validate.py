"""`precast validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .exporting import check_installed, load_exporter
from .options import adapter_options, hub_options, json_option, quiet_option
from .output import echo, note, print_json, step_reporter

__all__ = ["command"]


@click.command("validate", epilog="precast validate out --reference user/model")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="MODEL", help="The checkpoint it was compiled from.")
@click.option("--atol", type=float, default=1e-4, show_default=True, help="Allowed difference from the eager model.")
@click.option("--variant", metavar="NAME", help="Which compiled form; by default the first that runs here.")
@click.option("--record", is_flag=True, help="Write the verdict into config.json.")
@click.option("--sha256", metavar="DIGEST", help="Run native code of the artifact with this digest.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the checkpoint.")
@adapter_options
@hub_options
@json_option
@quiet_option
def command(
    directory: Path,
    reference: str,
    atol: float,
    variant: str | None,
    record: bool,
    sha256: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Compare the artifact DIRECTORY with its checkpoint again. Exit status 1 if the answers differ."""
    check_installed()
    # Nothing of this imports torch, so a mistake is answered at once.
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.early import check_comparison

    options = ExportOptions(atol=atol, **given)
    check_comparison(directory, reference, options)
    if not quiet:
        note(f"Comparing {directory} with {reference} …")
    exporter = load_exporter()
    from precast.exporter.progress import progress_to

    with step_reporter(quiet)("validate") as listener, progress_to(listener):
        accuracy = exporter.validate_again(directory, reference, options, keep=record, sha256=sha256, variant=variant)
    if as_json:
        print_json({"status": accuracy.status, "reason": accuracy.reason, "figures": accuracy.figures})
        return
    echo(f"{accuracy.status}: {accuracy.reason}")
    for name, value in accuracy.figures.items():
        echo(f"  {name:<24}{value}")
