"""`precast swap-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .export import describe_plan, show_result
from .exporting import check_installed, load_exporter
from .options import hub_options, json_option, quiet_option
from .output import echo, note, print_json, step_reporter

__all__ = ["command"]


@click.command("swap-weights", epilog="precast swap-weights out --from user/fine-tune -o tuned")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--from", "checkpoint", required=True, metavar="MODEL", help="The checkpoint whose weights to take.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="The directory to make.")
@click.option("--sha256", metavar="DIGEST", help="Run native code of the artifact with this digest.")
@click.option("--trust-native-code", is_flag=True, help="Run native code that was built elsewhere.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the checkpoint.")
@click.option("--weights", metavar="PATH", help="File or folder of the weights, if not with MODEL's configuration.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@hub_options
@json_option
@quiet_option
def command(
    directory: Path,
    checkpoint: str,
    target: Path | None,
    sha256: str | None,
    trust_native_code: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Put the weights of another checkpoint into a copy of the artifact DIRECTORY, without compiling."""
    if target is None and not dry_run:
        raise click.UsageError("Missing option '-o': the directory to make.")
    check_installed()
    # Nothing of this imports torch, so a mistake is answered at once.
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.early import check_swap

    settings = ExportOptions(**options)
    check_swap(directory, checkpoint, target, settings)
    if not quiet:
        note(f"{'Planning' if dry_run else 'Taking'} the weights of {checkpoint} for {directory} …")
    exporter = load_exporter()
    if dry_run:
        plan = exporter.preview_swap(directory, checkpoint, target, settings)
        print_json(plan.as_json()) if as_json else echo(describe_plan(plan))
        return
    proof = {"sha256": sha256, "trust_native_code": trust_native_code}
    on_plan = (lambda plan: None) if quiet else (lambda plan: note(describe_plan(plan)))
    made = exporter.swap_weights(
        directory, checkpoint, target, settings, **proof, on_step=step_reporter(quiet), on_plan=on_plan
    )
    show_result(made, None, None, as_json)
