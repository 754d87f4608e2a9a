"""Validation samples: real inputs, and the edges of the compiled shapes.

Samples are plain data. The reference answers them one row at a time without any padding; the artifact must give the
same answers in batches, padded on either side.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from precast.runtime.artifact.schema import Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError

from ..checkpoint.describe import describe_error
from . import kind_of

__all__ = [
    "CALIBRATION_SEED",
    "HELD_OUT_SEED",
    "Answer",
    "ValidationSample",
    "label_axis",
    "make_calibration_inputs",
    "make_samples",
    "make_held_out_samples",
    "repeat_tokens",
    "token_ids",
    "write_samples",
]

Array = np.ndarray[Any, Any]
HELD_OUT_SEED, CALIBRATION_SEED = 1000, 2000
"""The first seeds of what stands for pictures and sound among these samples, apart from those of the others."""


@dataclass(frozen=True)
class ValidationSample:
    """One input on which the artifact is compared with the reference.

    Attributes:
        name: how errors and progress call it.
        kind: "outputs" of an encoder; "logits" at `positions`, `count` tokens of "greedy" search, or the score of
            "beams" of models that generate; "score" for outputs on held-out inputs, or logits after every token of a
            held-out text.
        rows: token ids of a decoder, or of a given answer.
        side: where rows are padded, "right" or "left".
        adapters: of a decoder with slots, for each row the directory of its adapter, or "" for none.
        tensors: an encoder's rows, by the inputs' names, without the batch dimension.
    """

    name: str
    kind: str
    rows: list[list[int]] = field(default_factory=list)
    side: str = "right"
    positions: list[list[int]] = field(default_factory=list)
    count: int = 0
    adapters: list[str] = field(default_factory=list)
    tensors: list[dict[str, Array]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.rows or self.tensors)

    def ending_in(self, token: int) -> ValidationSample:
        """An encoder's sample whose rows of tokens all end in this one."""
        ended = [{**row, "input_ids": np.append(row["input_ids"][:-1], token)} for row in self.tensors]
        return replace(self, tensors=ended)


@dataclass(frozen=True)
class Answer:
    """One row's outputs by name. `margins` says by how much each greedy token led the second likeliest one."""

    outputs: dict[str, Array]
    margins: Array | None = None


def write_samples(samples: Sequence[ValidationSample], path: Path) -> None:
    """Write samples for `precast.runtime.validation_worker`: `path` as JSON, and beside it, ending in .npz, their
    tensors, each named `<sample>/<row>/<input>`."""
    plain = [{name: value for name, value in asdict(each).items() if name != "tensors"} for each in samples]
    path.write_text(json.dumps(plain))
    tensors: dict[str, Any] = {
        f"{index}/{row}/{name}": tensor
        for index, sample in enumerate(samples)
        for row, named in enumerate(sample.tensors)
        for name, tensor in named.items()
    }
    np.savez(path.with_suffix(".npz"), **tensors)


def make_samples(task: Task, graphs: list[Graph], tokenizer: Any | None, vocabulary: int) -> list[ValidationSample]:
    """The samples for an artifact with these graphs. Without a `tokenizer`, or with one that cannot read plain text,
    texts are random ids, always the same."""
    found: list[ValidationSample] = kind_of(task).validation_samples(graphs, _texts("texts.txt", tokenizer, vocabulary))
    return found


def make_held_out_samples(
    task: Task, graphs: list[Graph], tokenizer: Any | None, vocabulary: int
) -> list[ValidationSample]:
    """Held-out inputs, which no calibration uses, cut to fit the graphs: texts to be scored token by token, sentences
    for encoders, or what stands for pictures and sound."""
    texts = _texts("heldout.txt", tokenizer, vocabulary, by_sentence=task.kind == "encoder")
    found: list[ValidationSample] = kind_of(task).held_out_samples(graphs, texts)
    return found


def make_calibration_inputs(task: Task, graphs: list[Graph], texts: list[list[int]]) -> list[dict[str, Array]]:
    """Inputs of a model, by its arguments' names, with a batch dimension of 1 each: from texts of token ids, or, where
    it reads none, what stands for pictures and sound."""
    found: list[dict[str, Array]] = kind_of(task).calibration_inputs(graphs, texts)
    return found


def label_axis(row: Array) -> int:
    """The axis of the labels in one row of logits: the first of [labels, height, width], else the last."""
    return 0 if row.ndim == 3 else -1


def repeat_tokens(texts: list[list[int]], length: int) -> list[int]:
    """Tokens of all texts, from the first again when they run out: [length]."""
    joined: list[int] = []
    while len(joined) < length:
        joined += [token for text in texts for token in text]
    return joined[:length]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a plain text. Raises CheckpointError where the tokenizer cannot read one: tokenizers of documents
    take words and boxes, and that of a CTC head may know letters only."""
    try:
        found: list[int] = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:
        # Each tokenizer has code of its own, which may raise anything.
        raise CheckpointError(f"{type(tokenizer).__name__} cannot read plain text: {describe_error(error)}") from error
    return found


def _texts(name: str, tokenizer: Any | None, vocabulary: int, *, by_sentence: bool = False) -> list[list[int]]:
    lines = resources.files(__package__).joinpath(name).read_text("utf-8").splitlines()
    if by_sentence:
        lines = [sentence for line in lines for sentence in re.split(r"(?<=[.!?]) ", line)]
    if tokenizer is not None:
        with suppress(CheckpointError):
            return [token_ids(tokenizer, line) for line in lines]
    numbers = random.Random(0)  # noqa: S311  (repeatable, no secret)
    return [[numbers.randrange(vocabulary) for _ in range(numbers.randint(5, 40))] for _ in range(20)]
