"""Makes `docs/cli.md` of the help texts: every command with every option, as `--help` prints it.

python tools/cli_page.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from precast.cli import cli

PAGE = Path(__file__).parents[1] / "docs/cli.md"
HEAD = """# The command line

What `precast --help` and the `--help` of every command print; `python tools/cli_page.py` makes this page of it.
[usage.md](usage.md) shows the commands at work, and says what exit statuses and environment variables mean. Underscores
may stand for dashes in the names of options.
"""


def page() -> str:
    """All of `docs/cli.md`."""
    parts = [HEAD]
    for words in _commands((), cli):
        parts.append(f"## {' '.join(['precast', *words])}\n\n```text\n{_help(words).rstrip()}\n```\n")
    return "\n".join(parts)


def _commands(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[str, ...]]:
    """The words that call the command, and those of the commands below it."""
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _commands((*words, name), below)


def _help(words: tuple[str, ...]) -> str:
    return CliRunner().invoke(cli, [*words, "--help"], prog_name="precast", terminal_width=100).output


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
