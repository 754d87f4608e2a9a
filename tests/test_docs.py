"""What the documents say is so: commands parse, the support table is what the tests cover, goldens are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import tiny

from precast.cli import SETTINGS, cli
from precast.runtime.artifact.tasks import TASKS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def commands() -> list[str]:
    """Every `precast …` command line in the documents that is meant to be typed."""
    found = []
    for name in ("README.md", "CONTRIBUTING.md"):
        for line in (ROOT / name).read_text("utf-8").splitlines():
            if match := re.match(r"\$ (precast .*?)(?:\s{2,}#.*)?$", line):
                found.append(match[1])
    return found


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line):
    """Names and options exist; nothing is run."""
    _, name, *words = shlex.split(line)
    command = cli.get_command(None, name)
    assert command is not None, name
    command.make_context(name, words, parent=click.Context(cli, **SETTINGS))


def test_the_support_table_is_what_is_tested(golden_text):
    decoders, encoders = (", ".join(sorted(each)) for each in (tiny.DECODERS, tiny.ENCODERS))
    tasks = {
        kind: ", ".join(sorted(task.name for task in TASKS.values() if task.kind == kind))
        for kind in ("decoder", "encoder")
    }
    table = (
        "| | model types | tasks |\n|---|---|---|\n"
        f"| decoders | {decoders} | {tasks['decoder']} |\n| encoders | {encoders} | {tasks['encoder']} |"
    )
    golden_text(
        README, table, between=("<!-- support: pytest tests/test_docs.py --update-goldens -->", "<!-- /support -->")
    )


def test_help_is_what_it_was(golden_text):
    """A renamed or vanished option shows up in review."""
    from click.testing import CliRunner

    pages = []
    for words in ([], *([name] for name in cli.list_commands(None))):
        pages.append(CliRunner().invoke(cli, [*words, "--help"], prog_name="precast", terminal_width=100).output)
    golden_text(ROOT / "tests" / "goldens" / "help.txt", "\n".join(pages))
