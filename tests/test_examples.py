"""The programs of `examples/`, as their README calls them, with tiny models in place of those on the Hub."""

from __future__ import annotations

import io
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from snippets import blocks

ROOT = Path(__file__).parents[1]
(CONSOLE,) = blocks(ROOT / "examples/README.md")
CALLS = {Path(shlex.split(call.rpartition("|")[2])[1]).stem: call for call, _ in CONSOLE.commands()}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """`call("chat", checkpoint)`: what the program prints."""

    def run(name: str, model: Path) -> list[str]:
        said, _, command = CALLS[name].rpartition("|")
        _, program, *words = shlex.split(command)
        monkeypatch.chdir(tmp_path)
        Path("texts.txt").write_text("\n".join(tiny.TEXTS), "utf-8")
        monkeypatch.setattr(sys, "argv", [program, *words, "--model", str(model)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(shlex.split(said)[1:]) + "\n"))
        runpy.run_path(str(ROOT / program), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_every_program_is_called():
    programs = {path.stem: path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert set(CALLS) == set(programs)
    assert all(len(text.splitlines()) < 40 for text in programs.values())


def test_sentiment_is_said_of_every_text(call, checkpoint):
    lines = call("sentiment", checkpoint("bert", "AutoModelForSequenceClassification", max_position_embeddings=128))
    assert [line.split("  ")[-1] for line in lines] == ["A film to remember.", "Two hours that I want back."]
    assert all(line.startswith("LABEL_") for line in lines)


def test_a_runner_says_nothing_twice(call, checkpoint):
    source = checkpoint("llama", max_position_embeddings=2048)
    lines = call("model_runner", source)
    assert len("".join(lines[:-1])) > 0
    count, said = lines[-1].split(maxsplit=1)
    assert said == "tokens read"
    # Of both prompts, and all new ones but the last of each.
    assert int(count) > 2 * 15


@pytest.mark.slow
def test_a_chat_answers(call, checkpoint):
    lines = call("chat", checkpoint("llama", max_position_embeddings=1024))
    assert "".join(lines)


@pytest.mark.slow
def test_the_closest_lines_are_found(call, checkpoint):
    lines = call("search", checkpoint("bert", "AutoModel", max_position_embeddings=128))
    found = [float(line.split()[0]) for line in lines]
    assert len(found) == 3
    assert found == sorted(found, reverse=True)
    assert all(line.partition("  ")[2] in tiny.TEXTS for line in lines)
