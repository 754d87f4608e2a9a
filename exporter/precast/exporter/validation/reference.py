"""The eager model's answers: the truth that a compiled model is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from precast.runtime.artifact.tasks import Task

from ..kinds import kind_of
from ..kinds.samples import Question

__all__ = ["Answer", "answer"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Answer:
    """One row's outputs by name. For greedy tokens `margins` says by how much each led the second likeliest."""

    outputs: dict[str, Array]
    margins: Array | None = None


def answer(model: nn.Module, question: Question, task: Task) -> list[Answer]:
    """What the eager `model` says, one row at a time and without padding."""
    with torch.inference_mode():
        answers: list[Answer] = kind_of(task).answer(model, question, task.outputs)
        return answers
