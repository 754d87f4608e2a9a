"""What an encoder is asked before it is published, and what the eager model says to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from precast.runtime.artifact.schema import Graph

from ..questions import Question, repeat
from ..reference import Answer

__all__ = ["answer", "questions"]


def questions(graphs: list[Graph], texts: list[list[int]]) -> list[Question]:
    """Each graph is asked about texts padded on either side and about the edges of its shapes."""
    return [question for graph in graphs for question in _questions(graph, texts)]


def _questions(graph: Graph, texts: list[list[int]]) -> list[Question]:
    assert isinstance(graph.length, int), "an encoder's length is static"
    length = graph.length
    rows = [text[:length] for text in texts[: graph.batch]]
    while len(rows) < graph.batch:
        rows += rows[: graph.batch - len(rows)]
    full = repeat(texts, length)
    name = f"{graph.name}: "
    questions = [
        Question(name + "texts, padded right", "outputs", rows),
        Question(name + "texts, padded left", "outputs", rows, side="left"),
        Question(name + "one token", "outputs", [texts[0][:1]]),
        Question(name + f"all {length} tokens", "outputs", [full]),
        Question(name + "a short batch", "outputs", rows[: max(1, graph.batch - 1)]),
    ]
    if any(spec.name == "token_type_ids" for spec in graph.inputs):
        types = [[int(index >= len(row) // 2) for index in range(len(row))] for row in rows]
        questions.append(Question(name + "two segments", "outputs", rows, types=types))
    return questions


def answer(model: nn.Module, question: Question, outputs: tuple[str, ...]) -> list[Answer]:
    """The eager answers, one row at a time and without padding."""
    types: Sequence[list[int] | None] = question.types or [None] * len(question.rows)
    return [_encode(model, row, kinds, outputs) for row, kinds in zip(question.rows, types, strict=True)]


def _encode(model: nn.Module, row: list[int], types: list[int] | None, outputs: tuple[str, ...]) -> Answer:
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([types])
    result = model(**inputs, return_dict=True)
    return Answer({name: result[name][0].float().numpy() for name in outputs})
