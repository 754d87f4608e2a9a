"""`precast predict`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .options import json_option, model_options, quiet_option
from .output import print_json

__all__ = ["command"]


@click.command("predict", epilog='precast predict out --text "A film to remember."')
@click.argument("model")
@click.option("--text", "texts", multiple=True, help="A text; repeatable. Without any, lines of standard input.")
@click.option("--question", help="For question-answering: what to ask of each text.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many answers to show.")
@model_options
@json_option
@quiet_option
def command(
    model: str, texts: tuple[str, ...], question: str | None, top: int, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Run the compiled encoder MODEL — a directory or a Hub repository — on texts."""
    from precast.runtime import CompiledModel
    from precast.runtime.progress import quiet as no_bars

    if quiet:
        no_bars()
    opened = CompiledModel.from_pretrained(model, **options)
    ask = _asker(opened, question, top)
    texts = texts or tuple(line.rstrip("\n") for line in sys.stdin)
    answers = [{"text": text, **ask(text)} for text in texts]
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        click.echo(json.dumps(answer, ensure_ascii=False))


def _asker(opened: Any, question: str | None, top: int) -> Any:
    from precast.runtime.errors import UsageError

    task = opened.artifact.contract.task
    if task == "question-answering":
        if question is None:
            raise UsageError("This model answers questions about texts; give --question.")
        return lambda text: opened.answer(question, text)
    if question is not None:
        raise UsageError(f"--question is for question-answering; this model does {task}.")
    if not hasattr(opened, "predict"):
        raise UsageError(f"This model does {task}; use: precast generate {opened.artifact.path} --prompt …")
    return lambda text: opened.predict(text, top=top)
