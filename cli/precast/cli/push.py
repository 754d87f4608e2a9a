"""`precast push`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option
from .output import echo, print_json

__all__ = ["command"]


@click.command("push", epilog="precast push out user/repo")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to.")
@click.option("--token", metavar="TOKEN", help="Hub token, if not logged in (HF_TOKEN).")
@json_option
def command(directory: Path, repo: str, private: bool, revision: str | None, token: str | None, as_json: bool) -> None:
    """Upload the artifact DIRECTORY to the Hub repository REPO, as one commit."""
    from precast.runtime.artifact import read_artifact
    from precast.runtime.models.base import verify_artifact
    from precast.runtime.storage.hub import push

    artifact = read_artifact(directory)
    for variant in artifact.contract.variants:
        verify_artifact(artifact, variant)
    url = push(artifact, repo, private=private or None, token=token, revision=revision)
    if as_json:
        print_json({"url": url, "digest": artifact.contract.digest})
    else:
        echo(url)
