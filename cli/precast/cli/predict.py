"""`precast predict`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import click

from .batch import Files, answer, file_options, read_input
from .inputs import read_lines
from .options import json_option, model_options, parse_settings, quiet_option, setting_option
from .output import json_text, print_json
from .subtitles import Hearing, subtitle_option

__all__ = ["command"]


@click.command("predict", epilog='precast predict out --text "A film to remember."')
@click.argument("model")
@click.option(
    "--text", "texts", multiple=True, help="What to answer: a text, or a file for images and sounds; repeatable."
)
@file_options("--file")
@click.option("--task", help="What to ask of the model, if not what it was compiled for: zero-shot-classification.")
@click.option("--question", help="For question-answering: what to ask of each text.")
@click.option("--labels", metavar="A,B", help="For zero-shot classification: the labels to choose from.")
@click.option("--top", type=click.IntRange(min=1), help="How many answers to show.")
@setting_option("Of the task's pipeline, as aggregation_strategy=simple; repeatable.")
@subtitle_option
@model_options
@json_option
@quiet_option
def command(
    model: str,
    texts: tuple[str, ...],
    task: str | None,
    question: str | None,
    labels: str | None,
    top: int | None,
    settings: tuple[str, ...],
    subtitles: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run the compiled MODEL — a directory or a Hub repository — on texts, images or sounds.

    Each answer is a line of JSON, {"input": …, "answer": …}; with --json they are one document. Lines of standard
    input, which is read where nothing else is given, are answered as they come.
    """
    from precast.runtime import CompiledModel, pipeline
    from precast.runtime.progress import quiet as no_bars
    from precast.runtime.runner.predicting import as_json as as_answer
    from precast.runtime.runner.predicting import make_input

    if "" in texts:
        raise click.UsageError("--text is empty; give at least one character.")
    files = Files.pop(options, may_force=subtitles is not None)
    hearing = Hearing(subtitles, files.force, texts if files.input_file is None else (), quiet)
    # A file is read at once, so that what is wrong with it is known before a model is opened.
    rows = [] if files.is_streamed else read_input(files, texts)
    reads_input = files.is_streamed and (files.input_file is not None or not texts)
    lines = read_lines() if reads_input else iter(())
    if quiet:
        no_bars()
    opened = CompiledModel.from_pretrained(model, **options)
    pipe = pipeline(task, opened)
    asked = {**parse_settings(settings), **_check_options(type(pipe), top_k=top, candidate_labels=labels)}
    asked = {**_default_options(opened, asked), **asked}
    if "candidate_labels" in type(pipe).option_names() and not asked.get("candidate_labels"):
        raise click.UsageError("This task chooses among labels of yours; give them: --labels politics,sports.")
    if rows:
        _answer_rows(pipe, rows, files, asked, question, as_json, quiet)
        return
    answers = []
    for text in chain(texts, lines):
        found = {"input": text, "answer": as_answer(hearing.ask(pipe, make_input(opened, question, text), asked))}
        if as_json:
            answers.append(found)
        else:
            click.echo(json_text(found))
    if as_json:
        print_json(answers)


def _answer_rows(
    pipe: Any, rows: list[Any], files: Files, asked: dict[str, Any], question: str | None, as_json: bool, quiet: bool
) -> None:
    """Ask a pipeline of many rows."""
    from precast.runtime.runner.files import fingerprint
    from precast.runtime.runner.predicting import INPUT_COLUMNS, PredictingWorker
    from precast.runtime.runner.rows import Column

    opened, seed = pipe.model, asked.get("seed")
    reads = opened.artifact.contract.task == "question-answering"
    column = Column(rows, files.column, ("context", *INPUT_COLUMNS) if reads else INPUT_COLUMNS)
    work = {
        "model": [opened.artifact.contract.digest, opened.variant.name],
        "options": fingerprint([type(pipe).__name__, asked, files.column, question]),
        "seed": seed,
    }

    def make_worker(seed: int | None) -> PredictingWorker:
        made = {**asked, **({} if seed is None else {"seed": seed})}
        return PredictingWorker(pipe, column, made, question=question)

    answer(rows, files, work, make_worker, as_json=as_json, quiet=quiet)


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
