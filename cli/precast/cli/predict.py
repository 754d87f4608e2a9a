"""`precast predict`."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import click

from .inputs import read_lines
from .options import json_option, model_options, quiet_option
from .output import json_text, print_json

__all__ = ["command"]


@click.command("predict", epilog='precast predict out --text "A film to remember."')
@click.argument("model")
@click.option(
    "--text", "texts", multiple=True, help="What to answer: a text, or a file for images and sounds; repeatable."
)
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Texts, one a line; '-' is standard input, which is read where nothing else is given.",
)
@click.option("--task", help="What to ask of the model, if not what it was compiled for: zero-shot-classification.")
@click.option("--question", help="For question-answering: what to ask of each text.")
@click.option("--labels", metavar="A,B", help="For zero-shot classification: the labels to choose from.")
@click.option("--top", type=click.IntRange(min=1), help="How many answers to show.")
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of the task's pipeline, as aggregation_strategy=simple; repeatable.",
)
@model_options
@json_option
@quiet_option
def command(
    model: str,
    texts: tuple[str, ...],
    file: Path | None,
    task: str | None,
    question: str | None,
    labels: str | None,
    top: int | None,
    settings: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the compiled MODEL — a directory or a Hub repository — on texts, images or sounds.

    Each answer is a line of JSON, {"input": …, "answer": …}; with --json they are one document.
    """
    from precast.runtime import CompiledModel, pipeline
    from precast.runtime.progress import quiet as no_bars

    if "" in texts:
        raise click.UsageError("--text is empty; give at least one character.")
    # Standard input is read where nothing else is given.
    lines = read_lines(file, "--file") if file is not None or not texts else iter(())
    if quiet:
        no_bars()
    opened = CompiledModel.from_pretrained(model, **options)
    pipe = pipeline(task, opened)
    asked = {**dict(map(_parse_setting, settings)), **_check_options(type(pipe), top_k=top, candidate_labels=labels)}
    asked = {**_default_options(opened, asked), **asked}
    if "candidate_labels" in type(pipe).option_names() and not asked.get("candidate_labels"):
        raise click.UsageError("This task chooses among labels of yours; give them: --labels politics,sports.")
    answers = []
    for text in chain(texts, lines):
        answer = {"input": text, "answer": _to_json(pipe(_make_input(opened, question, text), **asked))}
        if as_json:
            answers.append(answer)
        else:
            click.echo(json_text(answer))
    if as_json:
        print_json(answers)


def _to_json(answer: Any) -> Any:
    """Make an answer JSON: a mask becomes its size, its bounding box and its number of pixels."""
    if isinstance(answer, dict):
        return {name: _to_json(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [_to_json(each) for each in answer]
    if not hasattr(answer, "getbbox"):
        return answer
    return {"size": answer.size, "box": answer.getbbox(), "pixels": answer.histogram()[255]}


def _make_input(model: Any, question: str | None, text: str) -> Any:
    task = model.artifact.contract.task
    if task == "question-answering":
        if question is None:
            raise click.UsageError("This model answers questions about texts; give --question.")
        return {"question": question, "context": text}
    if question is not None:
        raise click.UsageError(f"--question is for question-answering; this model does {task}.")
    return text


def _check_options(pipeline: Any, **values: Any) -> dict[str, Any]:
    """The options that are not None. Raises click.UsageError for one that the pipeline lacks."""
    words = {"top_k": "--top", "candidate_labels": "--labels"}
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in pipeline.option_names():
            raise click.UsageError(f"{words[name]} is not for this task; {pipeline.__name__} has no {name}.")
    return given


def _default_options(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Options other than the pipeline's defaults: one vector per text, rather than one per token, fits on a screen."""
    is_bare = model.artifact.contract.task == "feature-extraction" and model.main_input_name == "input_ids"
    has_own = any(spec.name == "sentence_embedding" for spec in model.variant.graphs[0].outputs)
    return {"pooling": "mean"} if is_bare and not has_own and "pooling" not in asked else {}


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--option {text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
