"""Texts, images and sounds of a file, through a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..generation.config import default_new_tokens
from .batches import Prepared, input_of
from .rows import Column, Row

__all__ = ["INPUT_COLUMNS", "PredictingWorker"]

INPUT_COLUMNS = ("prompt", "text", "messages", "src", "sentence", "image", "audio", "path")


class PredictingWorker:
    """Asks a pipeline. An answer is {"input", "answer"}.

    Args:
        pipe: the pipeline.
        column: which column is its input.
        options: of the pipeline. Of a `seed` each row has its own, that number and the row's index together.
        as_input: makes the pipeline's input of a row and what its column holds.
        as_json: makes JSON of an answer.
    """

    def __init__(
        self, pipe: Any, column: Column, options: Mapping[str, Any], *,
        as_input: Callable[[Row, Any], Any] = lambda row, value: value,
        as_json: Callable[[Any], Any] = lambda answer: answer,
    ) -> None:  # fmt: skip
        self._pipe, self._column, self._options = pipe, column, dict(options)
        self._as_input, self._as_json = as_input, as_json
        self._seed = self._options.pop("seed", None)
        self._generates = hasattr(pipe.model, "generate")
        self.batch_size: int = pipe.model.batch_size

    def prepare(self, index: int, row: Row) -> Prepared:
        """The pipeline's input, and how many tokens it has."""
        value = self._as_input(row, self._column.value(row))
        length = self._length_of(value)
        # Answers as long as fits are equally long only for prompts that leave equally much.
        room = self._pipe.model.capacity - length if self._generates and length else 0
        return Prepared(index, row, value, length, default_new_tokens(room))

    def answer(self, batch: Sequence[Prepared]) -> list[dict[str, Any]]:
        """See Worker."""
        seeds = {} if self._seed is None else {"seed": [self._seed + each.index for each in batch]}
        if self._generates:
            self._pipe.model.reset()
        found = self._pipe([each.value for each in batch], **self._options, **seeds)
        return [
            {**input_of(each.row), "answer": self._as_json(answer)} for each, answer in zip(batch, found, strict=True)
        ]

    def _length_of(self, value: Any) -> int:
        """The tokens of a text or of texts together; of anything else 0, which keeps the order of the file."""
        if self._pipe.model.main_input_name != "input_ids":
            return 0
        texts = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
        if any(not isinstance(each, str) for each in texts):
            raise InputError(f"An input is a text; this is {value!r:.80}.")
        return sum(len(self._pipe.tokenizer.encode(text)) for text in texts)
