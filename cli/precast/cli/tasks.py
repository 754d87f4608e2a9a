"""`precast tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import hub_options, json_option
from .output import echo, note, print_json

__all__ = ["command"]


@click.command("tasks", epilog="precast tasks user/model")
@click.argument("model", required=False)
@click.option("--task", metavar="TASK", help="Only this task; without MODEL, all model types that do it.")
@hub_options
@json_option
def command(model: str | None, task: str | None, revision: str | None, token: str | None, as_json: bool) -> None:
    """What MODEL — a Hub id, a checkpoint directory, or a model type such as bert — can be exported for, and which
    shapes each task needs. Only its config.json is read. Without MODEL: all tasks."""
    from precast.runtime.artifact.tasks import TASKS, get_task

    tasks = [get_task(task).name] if task else list(TASKS)
    lines = _lines_of(model, tasks, revision, token) if model is not None else [_line_of(name) for name in tasks]
    if as_json:
        print_json({"model": model, "tasks": lines} if model else lines)
    elif model is not None:
        _print_model(lines)
    else:
        _print_all(lines, is_one=task is not None)


def _lines_of(model: str, tasks: list[str], revision: str | None, token: str | None) -> list[dict[str, Any]]:
    from precast.exporter.checkpoint.early import read_config
    from precast.exporter.support import infer_task, supported_tasks
    from precast.runtime.errors import CheckpointError

    known = supported_tasks(model)
    # A bare name of a model type is not looked for on the Hub.
    config = None if known and not Path(model).exists() else read_config(model, revision=revision, token=token)
    if config is not None:
        model_type = str(config.get("model_type"))
        known = supported_tasks(model_type)
        if not known:
            note(f"Models of type {model_type!r} were never tried; an export compares each with its original anyway.")
    elif not known:
        raise CheckpointError(f"{model} has no config.json that can be read, and is no model type of the table.")
    inferred = infer_task(config or {})
    return [
        {
            "task": line.task,
            "axes": list(line.axes),
            "supported": line.passes,
            "difference": line.difference if line.passes else None,
            "reason": line.reason or None,
            "inferred": line.task == inferred,
        }
        for line in known.values()
        if line.task in tasks
    ]


def _line_of(name: str) -> dict[str, Any]:
    from precast.exporter.support import supported_types
    from precast.runtime.artifact.tasks import get_task

    return {"task": name, "axes": list(get_task(name).axes), "model_types": supported_types(name)}


def _needed_flags(line: dict[str, Any]) -> str:
    return " ".join(f"--{axis.replace('_', '-')}" for axis in line["axes"])


def _print_model(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        mark = "*" if line["inferred"] else " "
        state = f"differs by {line['difference']:.1g}" if line["supported"] else f"refused: {line['reason']}"
        echo(f"{mark} {line['task']:<32}{state}")
        if line["supported"] and line["axes"]:
            echo(f"  {'':<32}needs {_needed_flags(line)}")
    if any(line["inferred"] for line in lines):
        note("* what its config.json names")


def _print_all(lines: list[dict[str, Any]], *, is_one: bool) -> None:
    for line in lines:
        echo(f"{line['task']:<32}{len(line['model_types']):>4} model types  {_needed_flags(line)}")
        if is_one:
            echo(", ".join(line["model_types"]))
