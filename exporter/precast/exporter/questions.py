"""What a compiled model is asked before it is published: real text, and the edges of its shapes.

Questions are plain data. The reference answers them one row at a time without any padding; the artifact must give the
same answers in batches, padded on either side.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from precast.runtime.artifact.schema import Dim, Graph

__all__ = ["Question", "make_questions", "make_scored"]

GREEDY_PROMPTS = 8
GREEDY_TOKENS = 24
POSITIONS = 16
HELD_OUT_LENGTH = 128


@dataclass(frozen=True)
class Question:
    """`kind`: "outputs" of an encoder, "logits" at `positions` of a decoder, `count` "greedy" tokens of one, or
    "score": logits after every token of a held-out text."""

    name: str
    kind: str
    rows: list[list[int]]
    side: str = "right"
    types: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    count: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_questions(graphs: list[Graph], tokenizer: Any | None, vocabulary: int) -> list[Question]:
    """The questions for an artifact with these graphs; `tokenizer` None makes them of random ids (always the same)."""
    texts = _texts("texts.txt", tokenizer, vocabulary)
    if graphs[0].role == "encode":
        return [question for graph in graphs for question in _encoder_questions(graph, texts)]
    return [*_logit_questions(graphs, texts), *_greedy_questions(graphs[0], texts)]


def make_scored(graphs: list[Graph], tokenizer: Any | None, vocabulary: int) -> list[Question]:
    """Text that no calibration has seen, in rows that fit the graphs, to be scored token by token."""
    length = min(HELD_OUT_LENGTH, graphs[0].capacity)
    rows = [text[:length] for text in _texts("heldout.txt", tokenizer, vocabulary)]
    return [
        Question(f"held-out text {index + 1}", "score", [row], positions=[list(range(len(row)))])
        for index, row in enumerate(rows)
    ]


def _texts(name: str, tokenizer: Any | None, vocabulary: int) -> list[list[int]]:
    if tokenizer is None:
        numbers = random.Random(0)  # noqa: S311  (to repeat, not to be secret)
        return [[numbers.randrange(vocabulary) for _ in range(numbers.randint(5, 40))] for _ in range(20)]
    lines = resources.files(__package__).joinpath(name).read_text("utf-8").splitlines()
    return [tokenizer(line)["input_ids"] for line in lines]


def _encoder_questions(graph: Graph, texts: list[list[int]]) -> list[Question]:
    assert isinstance(graph.length, int), "an encoder's length is static"
    length = graph.length
    rows = [text[:length] for text in texts[: graph.batch]]
    while len(rows) < graph.batch:
        rows += rows[: graph.batch - len(rows)]
    full = _repeat(texts, length)
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


def _logit_questions(graphs: list[Graph], texts: list[list[int]]) -> list[Question]:
    graph, is_free = graphs[0], isinstance(graphs[0].length, Dim)
    batch, capacity = graph.batch, graph.capacity
    rows = [text[: min(64, capacity)] for text in (texts * (batch // len(texts) + 1))[:batch]]
    cases = {
        "texts": rows,
        "one token": [texts[0][:1]],
        f"all {capacity} tokens": [_repeat(texts, capacity)],
        "a short batch": rows[: max(1, batch - 1)],
    }
    return [
        Question(name, "logits", rows, positions=[_positions(len(row), POSITIONS if is_free else 2) for row in rows])
        for name, rows in cases.items()
    ]


def _greedy_questions(graph: Graph, texts: list[list[int]]) -> list[Question]:
    """Prompts of different lengths: alone in a batch, and several together, padded on either side."""
    count = min(GREEDY_TOKENS, max(1, graph.capacity // 2))
    prompts = [text[: max(1, min(4 + 3 * index, graph.capacity - count))] for index, text in enumerate(texts)]
    prompts = prompts[:GREEDY_PROMPTS]
    if graph.batch == 1:
        return [Question(f"greedy {index}", "greedy", [row], count=count) for index, row in enumerate(prompts)]
    groups = [prompts[start : start + graph.batch] for start in range(0, len(prompts), graph.batch)]
    return [
        Question(f"greedy {index}", "greedy", rows, side=("left", "right")[index % 2], count=count)
        for index, rows in enumerate(groups)
    ]


def _repeat(texts: list[list[int]], length: int) -> list[int]:
    joined: list[int] = []
    while len(joined) < length:
        joined += [token for text in texts for token in text]
    return joined[:length]


def _positions(length: int, count: int) -> list[int]:
    """Up to `count` positions spread over a row, its last among them."""
    step = max(1, -(-length // count))
    return list(range((length - 1) % step, length, step))
