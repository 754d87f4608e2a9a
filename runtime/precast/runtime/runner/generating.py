"""Prompts of a file, continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from ..generation.config import GenerationConfig, default_new_tokens
from .batches import Prepared, input_of
from .descriptions import check_plain, describe_model
from .rows import Column, Row, as_conversation

__all__ = ["PROMPT_COLUMNS", "GeneratingWorker"]

PROMPT_COLUMNS = ("prompt", "text", "messages", "src")


class GeneratingWorker:
    """Continues rows: texts, or the messages of conversations.

    An answer is {"input", "output", "prompt_tokens", "new_tokens", "finish_reason"}, the last "stop" or "length"; of a
    row with `src`, as PaddleNLP's predictor writes it, {"src", "tgt", "output"}. It is the answer that the row gets
    alone.

    Args:
        model: the decoder.
        column: which column is the prompt.
        settings: of generate(). Where `max_new_tokens` is not among them, what fits, up to 256. With a `seed` each row
            has its own, that number and the row's index together.
        chat: put texts through the model's chat template, too.
        system: with `chat`, what the model is told first.
        max_input_tokens: cut longer prompts on the left.

    Attributes:
        truncated: how many rows were cut.
    """

    def __init__(
        self, model: Any, column: Column, settings: Mapping[str, Any], *, chat: bool = False,
        system: str | None = None, max_input_tokens: int | None = None,
    ) -> None:  # fmt: skip
        if max_input_tokens is not None and not 1 <= max_input_tokens < model.capacity:
            raise UsageError(
                f"max_input_tokens={max_input_tokens} must be from 1 to {model.capacity - 1}: the model was compiled "
                f"for {model.capacity} tokens, prompt and answer together."
            )
        self._model, self._column, self._settings = model, column, dict(settings)
        self._given = dict(settings)
        # What is wrong with them is wrong with every row.
        known = {name: value for name, value in self._settings.items() if name not in ("assistant_model", "adapter")}
        GenerationConfig.of(known, "generate()").over(model.generation_config).check()
        self._seed = self._settings.pop("seed", None)
        self._count = self._settings.pop("max_new_tokens", None)
        self._chat, self._system, self._most = chat, system, max_input_tokens
        self.batch_size: int = model.batch_size
        self.truncated = 0

    def prepare(self, index: int, row: Row) -> Prepared:
        """The prompt's tokens; rows of a group have equally long answers."""
        value = self._column.value(row)
        messages = as_conversation(row.given, value)
        if messages is None and self._chat:
            system = [] if self._system is None else [{"role": "system", "content": self._system}]
            messages = [*system, {"role": "user", "content": value}]
        tokenizer = self._model.tokenizer
        text = value if messages is None else tokenizer.apply_chat_template(messages)
        ids = tokenizer.encode(text, add_special_tokens=messages is None)
        if not ids:
            raise InputError("The prompt is empty, and this model's texts begin with no token of their own.")
        if self._most is not None and len(ids) > self._most:
            self.truncated += 1
            ids = ids[-self._most :]
        return Prepared(index, row, ids, len(ids), self._new_tokens(len(ids)))

    def answer(self, batch: Sequence[Prepared]) -> list[dict[str, Any]]:
        """See Worker. The caches begin empty, so that an answer does not depend on what was asked before."""
        width = max(each.length for each in batch)
        ids = np.zeros((len(batch), width), np.int64)
        mask = np.zeros_like(ids)
        for place, each in enumerate(batch):
            ids[place, width - each.length :], mask[place, width - each.length :] = each.value, 1
        seeds = {} if self._seed is None else {"seed": [self._seed + each.index for each in batch]}
        count = batch[0].group
        self._model.reset()
        found = self._model.generate(
            ids, mask, max_new_tokens=count, return_dict_in_generate=False, **self._settings, **seeds
        )
        return [self._describe(each, row[width:], count) for each, row in zip(batch, found, strict=True)]

    def as_job(self, asked: str) -> dict[str, Any]:
        """See Portable."""
        settings = dict(self._given)
        assistant = settings.pop("assistant_model", None)
        return {
            "kind": "generate", "model": describe_model(self._model, asked),
            "assistant": None if assistant is None else describe_model(assistant, asked),
            "columns": self._column.names, "settings": check_plain(settings, asked),
            "prompts": {"chat": self._chat, "system": self._system, "max_input_tokens": self._most},
        }  # fmt: skip

    def _new_tokens(self, length: int) -> int:
        """How many tokens an answer has at most. Raises InputError for a prompt that leaves no room for them."""
        room = self._model.capacity - length
        if room < 1 or (self._count is not None and self._count > room):
            asked = "" if self._count is None else f" and {self._count} new ones"
            raise InputError(
                f"The prompt's {length} tokens{asked} do not fit into the compiled capacity of {self._model.capacity}. "
                f"Pass max_input_tokens={max(1, self._model.capacity - (self._count or 1))} to cut it, or export the "
                f"model with a larger sequence_length."
            )
        return default_new_tokens(room) if self._count is None else int(self._count)

    def _describe(self, prepared: Prepared, row: Any, count: int) -> dict[str, Any]:
        tokens, is_ended = self._own_tokens(row, count)
        text = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
        answer = {**input_of(prepared.row), "output": text}
        if "src" in answer:
            return answer
        reason = "stop" if is_ended else "length"
        return {
            **answer, "prompt_tokens": prepared.length, "new_tokens": len(tokens), "finish_reason": reason,
        }  # fmt: skip

    def _own_tokens(self, row: Any, count: int) -> tuple[list[int], bool]:
        """A row's tokens up to its end, without what fills it, and whether it ended by itself."""
        config = self._model.generation_config
        ends = self._settings.get("eos_token_id", config.eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        tokens: list[int] = row.tolist()
        if ended := next((place for place, token in enumerate(tokens, 1) if token in ends), None):
            return tokens[:ended], True
        # Stop strings end a row without such a token; what follows is padding.
        pad = self._settings.get("pad_token_id", config.pad_token_id)
        while self._settings.get("stop_strings") and tokens and tokens[-1] == pad:
            tokens.pop()
        return tokens, len(tokens) < count
