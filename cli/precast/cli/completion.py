"""`precast completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]


@click.command("completion", epilog='eval "$(precast completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL."""
    found = get_completion_class(shell)
    assert found is not None, "click knows bash, zsh and fish"
    click.echo(found(ctx.find_root().command, {}, "precast", "_PRECAST_COMPLETE").source())
