"""What the documents say is so: commands parse, the support table is what the tests cover, goldens are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from precast.cli import SETTINGS, cli
from precast.exporter.support import table
from precast.runtime.artifact.backends import BACKENDS
from precast.runtime.artifact.tasks import TASKS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def commands() -> list[str]:
    """Every `precast …` command line in the documents that is meant to be typed."""
    found = []
    for name in ("README.md", "CONTRIBUTING.md", "docs/NEURON.md"):
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


def test_the_support_table_is_counted(golden_text):
    rows = []
    for task in TASKS:
        lines = [line for line in table() if line.task == task]
        passed = [line.model_type for line in lines if line.passes]
        known = ", ".join(name for name in WELL_KNOWN if name in passed)
        rows.append(f"| {task} | {len(passed)} of {len(lines)} | {known} |")
    golden_text(
        README,
        "\n".join(["| task | model types | among them |", "|---|---|---|", *rows]),
        between=("<!-- support: pytest tests/test_docs.py --update-goldens -->", "<!-- /support -->"),
    )


WELL_KNOWN = (
    "llama", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma3_text", "gpt_oss", "phi3", "deepseek_v3",
    "gpt2", "bloom", "falcon", "mpt", "mamba2", "bert", "roberta", "deberta-v2", "modernbert", "distilbert",
    "vit", "dinov2", "swin", "convnext", "segformer", "yolos", "clip", "siglip", "wav2vec2", "hubert", "wavlm",
    "audio-spectrogram-transformer", "t5", "bart", "marian", "pegasus", "whisper",
)  # fmt: skip


def test_the_help_names_every_backend():
    text = CliRunner().invoke(cli, ["export", "--help"], terminal_width=200).output
    (line,) = (line for line in text.splitlines() if "What compiles and runs the model" in line)
    assert ", ".join(BACKENDS) in line


def test_help_is_what_it_was(golden_text):
    """A renamed or vanished option shows up in review."""
    pages = []
    for words in ([], *([name] for name in cli.list_commands(None))):
        pages.append(CliRunner().invoke(cli, [*words, "--help"], prog_name="precast", terminal_width=100).output)
    golden_text(ROOT / "tests" / "goldens" / "help.txt", "\n".join(pages))
