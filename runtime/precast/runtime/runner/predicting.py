"""Texts, images and sounds of a file, through a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, UsageError
from ..generation.config import default_new_tokens
from ..pipelines import task_of
from .batches import Prepared, input_of
from .descriptions import check_plain, describe_model
from .rows import Column, Row

__all__ = ["INPUT_COLUMNS", "PredictingWorker", "as_json", "make_input"]

INPUT_COLUMNS = ("prompt", "text", "messages", "src", "sentence", "image", "audio", "path")


class PredictingWorker:
    """Asks a pipeline. An answer is {"input", "answer"}.

    Args:
        pipe: the pipeline.
        column: which column is its input.
        options: of the pipeline. Of a `seed` each row has its own, that number and the row's index together.
        question: for question-answering, what to ask of rows that have no question of their own.
    """

    def __init__(self, pipe: Any, column: Column, options: Mapping[str, Any], *, question: str | None = None) -> None:
        self._pipe, self._column, self._options = pipe, column, dict(options)
        self._question, self._given = question, dict(options)
        self._seed = self._options.pop("seed", None)
        self._generates = hasattr(pipe.model, "generate")
        self.batch_size: int = pipe.model.batch_size

    def prepare(self, index: int, row: Row) -> Prepared:
        """The pipeline's input, and how many tokens it has."""
        value = _row_input(self._pipe.model, self._question, row, self._column.value(row))
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
        return [{**input_of(each.row), "answer": as_json(answer)} for each, answer in zip(batch, found, strict=True)]

    def as_job(self, asked: str) -> dict[str, Any]:
        """See Portable."""
        return {
            "kind": "predict", "model": describe_model(self._pipe.model, asked), "task": task_of(self._pipe),
            "columns": self._column.names, "settings": check_plain(self._given, asked), "question": self._question,
        }  # fmt: skip

    def _length_of(self, value: Any) -> int:
        """The tokens of a text or of texts together; of anything else 0, which keeps the order of the file."""
        if self._pipe.model.main_input_name != "input_ids":
            return 0
        texts = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
        if any(not isinstance(each, str) for each in texts):
            raise InputError(f"An input is a text; this is {value!r:.80}.")
        return sum(len(self._pipe.tokenizer.encode(text)) for text in texts)


def as_json(answer: Any) -> Any:
    """An answer as JSON: a mask becomes its size, its bounding box and its number of pixels."""
    if isinstance(answer, dict):
        return {name: as_json(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [as_json(each) for each in answer]
    if not hasattr(answer, "getbbox"):
        return answer
    return {"size": answer.size, "box": answer.getbbox(), "pixels": answer.histogram()[255]}


def make_input(model: Any, question: str | None, text: str) -> Any:
    """A pipeline's input of a text, with a question where the task has one. Raises UsageError."""
    task = model.artifact.contract.task
    if task == "question-answering":
        if question is None:
            raise UsageError("This model answers questions about texts; give question=TEXT.")
        return {"question": question, "context": text}
    if question is not None:
        raise UsageError(f"question is for question-answering; this model does {task}.")
    return text


def _row_input(model: Any, question: str | None, row: Row, value: Any) -> Any:
    """The pipeline's input of a row, which may have a question of its own, or the second of two texts."""
    columns = row.given if isinstance(row.given, dict) else {}
    if isinstance(columns.get("text_pair"), str) and columns.get("text") == value:
        return {"text": value, "text_pair": columns["text_pair"]}
    return make_input(model, columns.get("question", question) if isinstance(value, str) else question, value)
