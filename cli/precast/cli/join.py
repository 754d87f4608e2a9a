"""`precast join`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .export import show_result
from .options import json_option

__all__ = ["command"]


@click.command("join", epilog="precast join out -o whole")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="The directory to make.")
@click.option("--sha256", metavar="DIGEST", help="Take native code of the artifact with this digest.")
@click.option("--trust-native-code", is_flag=True, help="Take native code that was built elsewhere.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@json_option
def command(directory: Path, target: Path, as_json: bool, **proof: Any) -> None:
    """Put the weights of DIRECTORY, an artifact for several ranks, into one file, where each finds its parts."""
    from precast.runtime.distributed.convert import join

    show_result(join(directory, target, **proof), None, None, as_json)
