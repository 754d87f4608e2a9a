"""The `precast` command. One file per sub-command, imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .options import in_flags
from .output import run_cli

__all__ = ["main"]

COMMANDS = {
    "bench": "Measure an artifact's speed and memory, or compare several.",
    "buckets": "Propose the sequence lengths to compile for.",
    "cache": "Show or clear what precast keeps on this machine.",
    "compare": "Compare a model compiled, eager and by torch.compile.",
    "completion": "Print the shell's completion script.",
    "env": "Show versions and machine facts, for bug reports.",
    "export": "Compile a checkpoint into an artifact.",
    "generate": "Continue a prompt with a compiled decoder.",
    "inspect": "Show what an artifact is, without running it.",
    "join": "Put the weights of all ranks into one file.",
    "predict": "Run a compiled model on texts, images or sounds.",
    "push": "Upload an artifact to the Hub.",
    "run": "Export and run a model as a file says.",
    "split": "Divide an artifact's weights into a file for each rank.",
    "swap-weights": "Put a fine-tune's weights into an artifact, without compiling.",
    "tasks": "Show what a model can be exported for, and which shapes that needs.",
    "validate": "Compare an artifact with its checkpoint again.",
}
SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class _Lazy(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors that name keywords of the library name the command's options instead."""
        from precast.runtime.errors import PrecastError

        try:
            return super().invoke(ctx)
        except PrecastError as error:
            # What a compiled model cannot do, another export may.
            own, others = (self.get_command(ctx, name) for name in (ctx.invoked_subcommand or "", "export"))
            error.args = (in_flags(str(error), *(each.get_params(ctx) for each in (own, others) if each)),)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings=SETTINGS)
@click.version_option(package_name="precast")
def cli() -> None:
    """Compile Hugging Face checkpoints ahead of time, and run what was compiled.

    \b
    precast export MODEL --batch-size 1 --sequence-length 512 -o out
    precast generate out --prompt "Once upon a time"
    """


def main() -> None:
    """Entry point of the `precast` script."""
    run_cli(cli)
