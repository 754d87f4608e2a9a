"""What a compiled model is asked before it is published: real text, and the edges of its shapes.

Questions are plain data. The reference answers them one row at a time without any padding; the artifact must give the
same answers in batches, padded on either side.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from precast.runtime.artifact.schema import Graph
from precast.runtime.artifact.tasks import Task

from .kinds import kind_of

__all__ = ["Question", "make_questions", "make_scored", "repeat"]


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


def make_questions(task: Task, graphs: list[Graph], tokenizer: Any | None, vocabulary: int) -> list[Question]:
    """The questions for an artifact with these graphs; `tokenizer` None makes them of random ids (always the same)."""
    found: list[Question] = kind_of(task).questions(graphs, _texts("texts.txt", tokenizer, vocabulary))
    return found


def make_scored(task: Task, graphs: list[Graph], tokenizer: Any | None, vocabulary: int) -> list[Question]:
    """Text that no calibration has seen, in rows that fit the graphs, to be scored token by token."""
    found: list[Question] = kind_of(task).scored(graphs, _texts("heldout.txt", tokenizer, vocabulary))
    return found


def repeat(texts: list[list[int]], length: int) -> list[int]:
    """Tokens of all texts, from the first again when they run out: [length]."""
    joined: list[int] = []
    while len(joined) < length:
        joined += [token for text in texts for token in text]
    return joined[:length]


def _texts(name: str, tokenizer: Any | None, vocabulary: int) -> list[list[int]]:
    if tokenizer is None:
        numbers = random.Random(0)  # noqa: S311  (to repeat, not to be secret)
        return [[numbers.randrange(vocabulary) for _ in range(numbers.randint(5, 40))] for _ in range(20)]
    lines = resources.files(__package__).joinpath(name).read_text("utf-8").splitlines()
    return [tokenizer(line)["input_ids"] for line in lines]
