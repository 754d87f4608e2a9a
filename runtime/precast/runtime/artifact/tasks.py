"""The tasks: one row each. A row's strings are imported when the task is used."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import UsageError

__all__ = ["TASKS", "Task", "get_task"]


@dataclass(frozen=True)
class Task:
    """`kind` says how the model is traced and run; `axes` are the static shapes that an export must be given; `outputs`
    are the fields of the model's answer that are kept, by transformers' names."""

    name: str
    kind: str
    axes: tuple[str, ...]
    outputs: tuple[str, ...]
    model_class: str


_ENCODER_AXES = ("batch_size", "sequence_length")

_ENCODER = "precast.runtime.encoder:CompiledModelFor"

_ROWS = (
    Task("feature-extraction", "encoder", _ENCODER_AXES, ("last_hidden_state",), _ENCODER + "FeatureExtraction"),
    Task("fill-mask", "encoder", _ENCODER_AXES, ("logits",), _ENCODER + "MaskedLM"),
    Task("text-classification", "encoder", _ENCODER_AXES, ("logits",), _ENCODER + "SequenceClassification"),
    Task("token-classification", "encoder", _ENCODER_AXES, ("logits",), _ENCODER + "TokenClassification"),
    Task(
        "question-answering", "encoder", _ENCODER_AXES, ("start_logits", "end_logits"), _ENCODER + "QuestionAnswering"
    ),
    Task("text-generation", "decoder", (), ("logits",), "precast.runtime.decoder:CompiledModelForCausalLM"),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}


def get_task(name: str) -> Task:
    """The row of task `name`. Raises UsageError, which lists the valid names."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"There is no task {name!r}.{hint} The tasks are: {', '.join(TASKS)}.")
    return TASKS[name]
