"""The programs of `examples/`, as their README calls them, with tiny models in place of those on the Hub."""

from __future__ import annotations

import ast
import io
import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from snippets import blocks

from precast.runtime import pipeline

ROOT = Path(__file__).parents[1]
(CONSOLE,) = blocks(ROOT / "examples/README.md")
CALLS = {Path(shlex.split(call.rpartition("|")[2])[1]).stem: call for call, _ in CONSOLE.commands()}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """`call("chat", checkpoint)`: what the program prints."""

    def run(name: str, model: Path, *others: object) -> list[str]:
        said, _, command = CALLS[name].rpartition("|")
        _, program, *words = shlex.split(command)
        monkeypatch.chdir(tmp_path)
        Path("texts.txt").write_text("\n".join(tiny.TEXTS), "utf-8")
        Path("rounds.jsonl").write_text(
            '{"src": "Water boils", "tgt": "at 100"}\n{"src": ["Hi", "你好"], "tgt": ["Hey"]}\n'
        )
        monkeypatch.setattr(sys, "argv", [program, *words, "--model", str(model), *map(str, others)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(shlex.split(said)[1:]) + "\n"))
        runpy.run_path(str(ROOT / program), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_every_program_is_called():
    programs = {path.stem: path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert set(CALLS) == set(programs)
    assert all(len(text.splitlines()) < 45 for text in programs.values())


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


@pytest.mark.filterwarnings("ignore:.*they will wait for each other")
def test_two_ranks_run_both_programs_with_several_cards(call, checkpoint, tmp_path):
    """Both ask for the same export, which is made once; two ranks write what one does."""
    source = checkpoint("llama", max_position_embeddings=2048)
    eager = call("model_runner", source)
    lines = call("text_generation", source, "--ranks", 2)
    assert lines[-1].startswith("text_generation_result.txt: 5 rows, ")
    assert call("model_runner", source, "--world-size", 2)[:-1] == eager[:-1]


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


@pytest.mark.slow
def test_prompts_are_continued_in_three_ways(call, checkpoint, tmp_path):
    source = checkpoint("llama", max_position_embeddings=512)
    lines = call("text_generation", source)
    assert lines[0].startswith("'I love Beijing, because': 'I love Beijing, because")
    assert lines[-1].startswith("text_generation_result.txt: 5 rows, ")
    found = ast.literal_eval((tmp_path / "text_generation_result.txt").read_text("utf-8"))
    assert [[*row] for row in found] == [["text_generation_text"]] * 5


@pytest.mark.slow
def test_both_modes_of_the_predictor_agree(call, checkpoint, tmp_path):
    lines = call("predictor", checkpoint("llama", max_position_embeddings=512))
    assert lines[-1] == "2 of 2 answers are the same"
    rows = [json.loads(line) for line in (tmp_path / "compiled.json").read_text("utf-8").splitlines()]
    assert [[*row] for row in rows] == [["src", "tgt", "output"]] * 2


@pytest.mark.slow
def test_the_guide_of_optimum_neuron_is_followed(call, checkpoint, tmp_path):
    classifier = checkpoint("bert", "AutoModelForSequenceClassification", max_position_embeddings=128)
    lines = call("neuron_guide", classifier, "--decoder", checkpoint("llama", max_position_embeddings=512))
    assert lines[0].startswith("LABEL_")
    assert "".join(lines[1:]).startswith("I really wish")
    assert (tmp_path / "sentiment_neuron" / "config.json").exists()


@pytest.mark.slow
def test_sentiment_in_two_languages_and_three_steps(call, checkpoint):
    source = checkpoint("bert", "AutoModelForSequenceClassification", max_position_embeddings=128)
    lines = call("sentiment_steps", source, "--chinese", source)
    again = pipeline("sentiment-analysis", str(source), export=True, batch_size=2, sequence_length=64)
    assert lines[-1] == f"{again.model.get_memory_footprint():,} bytes"
    assert any(line.startswith("今天心情很好  LABEL_") for line in lines)
