"""Pipelines of text: generation, summarization, translation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from ..generation.config import GenerationConfig, default_new_tokens
from ..inputs.tensors import ModelOutput, to_numpy
from .base import Array, Batch, Padding, Pipeline, TextPipeline, TokenizerOptions, Truncation

__all__ = [
    "GeneratingPipeline",
    "SummarizationPipeline",
    "Text2TextGenerationPipeline",
    "TextGenerationPipeline",
    "TranslationPipeline",
    "details_of",
]

_ROWS = (
    "seed",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "language",
    "adapter",
)
"""Arguments of generate() that may have a row for each input."""


class GeneratingPipeline(Pipeline):
    """A pipeline whose model generates."""

    task = "text-generation"

    def run_generate(self, batch: Batch, options: dict[str, Any]) -> Batch:
        """Run generate() slice by slice: {"sequences": int64 [rows, longest]}, shorter rows padded; the note `details`
        has what else it returned of each row."""
        if taken := [name for name in batch if name in options]:
            raise UsageError(f"{taken[0]} is what {type(self).__name__} makes of its inputs; leave it out.")
        parts, details, start = [], [], 0
        for rows in self._batch_slices(batch):
            count = len(next(iter(rows.values())))
            own = self._options_of(options, range(start, start + count), len(batch.inputs))
            found = self._generate_slice(rows, own)
            parts.append(found["sequences"])
            details += details_of(found)
            start += count
        width = max(part.shape[1] for part in parts)
        pad = self.tokenizer.token_id("pad") or self.tokenizer.token_id("eos") or 0
        whole = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=pad) for part in parts]
        outputs = batch.with_arrays({"sequences": np.concatenate(whole)})
        outputs.notes["details"] = details
        return outputs

    def _generate_slice(self, rows: dict[str, Array], options: dict[str, Any]) -> dict[str, Any]:
        """generate()'s outputs for one slice, `sequences` int64 [rows, new] among them."""
        said = GenerationConfig.of(options.get("generation_config") or {}, "generation_config")
        # What a file says is not what the caller asks for.
        asked = {"return_dict_in_generate": bool(said.return_dict_in_generate), **self._with_task(options)}
        found = self.model.generate(**rows, **asked)
        return dict(found) if isinstance(found, ModelOutput) else {"sequences": found}

    def _options_of(self, options: dict[str, Any], places: Sequence[int], total: int | None) -> dict[str, Any]:
        """Options of the inputs at these places: of those that have a row for each, their rows."""
        found = {name: _rows_of(name, options[name], places, total) for name in _ROWS if name in options}
        if callable(allowed := options.get("prefix_allowed_tokens_fn")):
            # It is told which input it is asked about.
            found["prefix_allowed_tokens_fn"] = lambda index, tokens: allowed(places[index], tokens)
        if isinstance(streamers := options.get("streamer"), list | tuple):
            found["streamer"] = _streamers_of(streamers, places, total, self._answers_per_input(options))
        if isinstance(nested := options.get("generate_kwargs"), dict):
            found["generate_kwargs"] = self._options_of(nested, places, total)
        return {**options, **found}

    def _answers_per_input(self, options: dict[str, Any]) -> int:
        """How many rows generate() returns for each input."""
        given = options.get("generation_config")
        config = self.model.generation_config if given is None else GenerationConfig.of(given, "generation_config")
        return int(options.get("num_return_sequences") or config.num_return_sequences or 1)

    @classmethod
    def passed_on(cls, model: Any) -> list[str]:
        """generate()'s options."""
        return [*inspect.signature(model.generate).parameters, *GenerationConfig.names()]

    def _limits_length(self, options: dict[str, Any]) -> bool:
        config = self._task_config().over(self.model.generation_config)
        own = config.max_new_tokens is not None or config.max_length is not None
        return own or bool(options.keys() & {"max_new_tokens", "max_length", "generation_config"})

    def _task_settings(self) -> dict[str, Any]:
        """The task_specific_params of config.json for this task: T5's prefixes, BART's beams of summaries."""
        tasks = self.model.config.get("task_specific_params")
        known = tasks.get(self.task) if isinstance(tasks, dict) else None
        return known if isinstance(known, dict) else {}

    def _task_config(self) -> GenerationConfig:
        """The generation settings in task_specific_params; max_length is limited to the capacity."""
        found = GenerationConfig.published(self._task_settings(), "task_specific_params of config.json")
        if found.max_length is not None:
            found.max_length = min(found.max_length, self.model.capacity)
        return found

    def _with_task(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options` over the task's settings, which go before the model's own, as in transformers 4."""
        task, given = self._task_config(), options.get("generation_config")
        if task == GenerationConfig():
            return options
        config = task if given is None else GenerationConfig.of(given, "generation_config").over(task)
        return {**options, "generation_config": config}

    def _make_batch(self, encodings: list[Any], given: list[Any], is_one: bool, **notes: Any) -> Batch:
        arrays = self.tokenizer.pad(encodings)
        return Batch({name: arrays[name] for name in ("input_ids", "attention_mask")}, given, is_one, **notes)

    def _decode_texts(
        self, outputs: Batch, *, skip_special_tokens: bool = True
    ) -> list[list[tuple[str, dict[str, Any]]]]:
        """The texts of each input, one or num_return_sequences of them, and what else generate() returned of each."""
        cut = (lambda row: row) if skip_special_tokens else self._without_filling
        texts = [self.tokenizer.decode(cut(row), skip_special_tokens=skip_special_tokens)
                 for row in outputs["sequences"]]  # fmt: skip
        rows = list(zip(texts, outputs.notes["details"], strict=True))
        count = len(rows) // len(outputs.inputs)
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    def _without_filling(self, row: Array) -> Array:
        """A row without what fills it up to the longest: padding, and ends after the first."""
        pad, end = self.tokenizer.token_id("pad"), self.tokenizer.token_id("eos")
        while len(row) and row[-1] == pad != end:
            row = row[:-1]
        while len(row) > 1 and row[-1] == row[-2] == end:
            row = row[:-1]
        return row


class TextGenerationPipeline(GeneratingPipeline):
    """Continues prompts or conversations."""

    names = ("text_inputs",)

    def preprocess(
        self,
        inputs: Any,
        *,
        tools: Any = None,
        continue_final_message: bool | None = None,
        prefix: str = "",
        truncation: Truncation = None,
        padding: Padding = False,
        add_special_tokens: bool = True,
    ) -> Batch:
        """Prompts as token ids.

        Args:
            inputs: a prompt; or a conversation, [{"role", "content"}, …], which goes through the model's chat
                template; or a list of these.
            tools: for the chat template.
            continue_final_message: whether the answer continues the last message, by default when it is the
                assistant's own.
            prefix: stands before each prompt, but not before the answer.
            truncation, padding, add_special_tokens: of prompts, as TokenizerOptions says; templates say all of a
                conversation.
        """
        given, is_one = self._as_list(inputs)
        told = TokenizerOptions(truncation=truncation, padding=padding, add_special_tokens=add_special_tokens)
        # One token is left for the answer.
        most = self.model.capacity - 1
        how = told.cut(min(self.tokenizer.max_length or most, most))
        encodings = [
            self._encoding(prefix + each if isinstance(each, str) else each, tools, continue_final_message, **how)
            for each in given
        ]
        prompts = [encoding.ids for encoding in encodings]
        return self._make_batch(
            encodings, given, is_one, continues=continue_final_message, prompts=prompts, tools=tools
        )

    def forward(self, batch: Batch, *, stop_sequence: str | Sequence[str] | None = None, **options: Any) -> Batch:
        """{"sequences": int64 [batch, new]}; `options` are generate()'s, whose stop_strings is also called
        stop_sequence. Where neither they nor the model's generation_config.json say how long, as long as fits, up to
        256 new tokens."""
        stops = {} if stop_sequence is None else {"stop_strings": stop_sequence}
        return self.run_generate(batch, {**stops, **options})

    def postprocess(self, outputs: Batch, *, return_full_text: bool = True) -> Any:
        """[{"generated_text"}] for each input; beside the text also what else generate() was asked to return of the
        row, by its names and as lists: logprobs, top_logprobs, scores, …, with zeros after a row's end.

        Args:
            outputs: of `forward`.
            return_full_text: with the prompt, or for a conversation all its messages; otherwise what is new.
        """
        # As in transformers, such a template reads special tokens too.
        reads = self.tokenizer.has_response_template
        told = self._decode_texts(outputs, skip_special_tokens=not reads)
        answers = []
        for given, prompt, rows in zip(outputs.inputs, outputs.notes["prompts"], told, strict=True):
            show = partial(self._whole, given, prompt, notes=outputs.notes) if return_full_text else str
            answers.append([{"generated_text": show(text), **details} for text, details in rows])
        return outputs.answer(answers)

    def _whole(self, given: Any, prompt: list[int], text: str, notes: Mapping[str, Any]) -> Any:
        """What was given and what is new: a text, or a conversation's messages."""
        continues = notes["continues"]
        if not self.tokenizer.has_response_template or isinstance(given, str) or _continues_last(given, continues):
            return _full_text(given, text, continues)
        return [*given, self.tokenizer.parse_response(text, prefix=prompt, tools=notes["tools"])]

    def _generate_slice(self, rows: dict[str, Array], options: dict[str, Any]) -> dict[str, Any]:
        # The room for an answer depends on the width of its slice, so padding for longer prompts elsewhere goes first.
        rows = self._begin_empty_prompts(_without_padding(rows), options)
        if not self._limits_length(options):
            room = self.model.capacity - int(rows["attention_mask"].sum(1).max())
            options = {**options, "max_new_tokens": default_new_tokens(room)}
        found = super()._generate_slice(rows, options)
        return {**found, "sequences": found["sequences"][:, rows["input_ids"].shape[1] :]}

    def _begin_empty_prompts(self, rows: dict[str, Array], options: dict[str, Any]) -> dict[str, Array]:
        """Begin prompts that have no token with bos_token_id, as generate() does without input_ids."""
        empty = np.asarray(rows["attention_mask"].sum(1) == 0)
        if not empty.any():
            return rows
        first = options.get("bos_token_id", self.model.generation_config.bos_token_id)
        if first is None:
            raise InputError("A prompt is empty, and there is no bos_token_id to begin with; pass bos_token_id=….")
        column = np.where(empty, first, 0)[:, None]
        began = {"input_ids": column, "attention_mask": empty[:, None].astype(np.int64)}
        return {name: np.concatenate([began[name], values], 1) for name, values in rows.items()}

    def _is_list(self, inputs: Any) -> bool:
        return super()._is_list(inputs) and not _is_conversation(inputs)

    def _encoding(self, given: Any, tools: Any, continues: bool | None, **how: Any) -> Any:
        if isinstance(given, str):
            return self.tokenizer.encodings(given, **how)[0]
        if not _is_conversation(given):
            raise InputError(f'An input is a text, or messages [{{"role": …, "content": …}}]; this is {given!r:.80}.')
        goes_on = _continues_last(given, continues)
        prompt = self.tokenizer.apply_chat_template(given, tools=tools, continue_final_message=goes_on)
        return self.tokenizer.encodings(prompt, add_special_tokens=False)[0]


class Text2TextGenerationPipeline(GeneratingPipeline, TextPipeline):
    """Text to text with an encoder-decoder."""

    key = "generated_text"
    task = "text2text-generation"

    def preprocess(self, inputs: Any, *, truncation: Truncation = None, prefix: str | None = None) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text or a list of texts.
            truncation: cut what is longer than the tokenizer says, or than compiled for, instead of refusing it.
            prefix: what the model wants in front of each text; by default what its config.json says for the task.
        """
        given, is_one = self._as_list(inputs)
        if wrong := [each for each in given if not isinstance(each, str)]:
            raise InputError(f"An input is a text; this is {wrong[0]!r:.80}.")
        prefix = self._own_prefix() if prefix is None else prefix
        how = TokenizerOptions(truncation=truncation).cut(self._max_length())
        return self._make_batch([self._encoding(prefix + text, None, **how) for text in given], given, is_one)

    def forward(self, batch: Batch, **options: Any) -> Batch:
        """{"sequences": int64 [batch, new]}; `options` are generate()'s. Where neither they nor the model's
        generation_config.json say how long, as long as fits, up to 256 tokens."""
        if not self._limits_length(options):
            options = {**options, "max_new_tokens": default_new_tokens(self.model.capacity - 1)}
        return self.run_generate(batch, options)

    def postprocess(self, outputs: Batch) -> Any:
        """[{"generated_text"}] for a text, and {"generated_text"} for each of a list, unless several are asked for;
        "summary_text" and "translation_text" from those pipelines. What else generate() was asked to return is beside
        the text, as from text-generation."""
        answers = [[{self.key: text, **more} for text, more in rows] for rows in self._decode_texts(outputs)]
        is_flat = not outputs.is_one and all(len(each) == 1 for each in answers)
        return [each[0] for each in answers] if is_flat else outputs.answer(answers)

    def _own_prefix(self) -> str:
        return str(self._task_settings().get("prefix") or self.model.config.get("prefix") or "")


class SummarizationPipeline(Text2TextGenerationPipeline):
    """Summaries of texts."""

    key = "summary_text"
    task = "summarization"


class TranslationPipeline(Text2TextGenerationPipeline):
    """Translations of texts."""

    key = "translation_text"
    task = "translation"


def _streamers_of(streamers: Sequence[Any], places: Sequence[int], total: int | None, per_input: int) -> list[Any]:
    """Of a list with a streamer for each row, those of the inputs at these places, which have `per_input` rows each.

    Raises InputError where they are more or fewer than rows.
    """
    if total is None:
        raise InputError("streamer lists one streamer for each row, and how many inputs will come is not known.")
    if len(streamers) != total * per_input:
        raise InputError(
            f"streamer lists {len(streamers)} streamers, and there are {total * per_input} rows; give one for each row."
        )
    return [streamers[place * per_input + row] for place in places for row in range(per_input)]


def _rows_of(name: str, value: Any, places: Sequence[int], total: int | None) -> Any:
    """The rows of the inputs at these places: of a value with one for each, or with one for all.

    Raises InputError for another number of them.
    """
    if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
        return value
    rows = list(value if isinstance(value, list | tuple) else to_numpy(value))
    if len(rows) == 1:
        return rows * len(places)
    count = max(places) + 1
    if len(rows) < count or len(rows) != (total or len(rows)):
        there = f"{count} or more" if total is None else total
        raise InputError(f"{name} has {len(rows)} rows; there are {there} inputs. Give one for each, or one for all.")
    return [rows[place] for place in places]


def details_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What generate() returned of each row besides its tokens, as lists."""
    count = len(found["sequences"])
    steps = {name: np.stack(value, 1) if isinstance(value, tuple) else value for name, value in found.items()}
    if "beam_indices" in steps:
        # Among the beams of its own prompt, with the first of which an answer begins.
        indices = steps["beam_indices"]
        steps["beam_indices"] = np.where(indices < 0, indices, indices - indices[:, :1])
    kept = {name: value for name, value in steps.items()
            if name != "sequences" and isinstance(value, np.ndarray) and len(value) == count}  # fmt: skip
    return [{name: value[row].tolist() for name, value in kept.items()} for row in range(count)]


def _without_padding(rows: dict[str, Array]) -> dict[str, Array]:
    """Drop the columns in which no row has a token."""
    used = rows["attention_mask"].any(0)
    return {name: values[:, used] for name, values in rows.items()}


def _is_conversation(given: Any) -> bool:
    return isinstance(given, list | tuple) and bool(given) and isinstance(given[0], dict) and "role" in given[0]


def _continues_last(messages: Any, asked: bool | None) -> bool:
    return messages[-1]["role"] == "assistant" if asked is None else asked


def _full_text(given: Any, text: str, continues: bool | None) -> Any:
    if isinstance(given, str):
        return given + text
    if not _continues_last(given, continues):
        return [*given, {"role": "assistant", "content": text}]
    return [*given[:-1], {**given[-1], "content": _append_text(given[-1]["content"], text)}]


def _append_text(content: Any, text: str) -> Any:
    """A message's content with `text` appended to its last text part."""
    if isinstance(content, str):
        return content + text
    last = max(index for index, part in enumerate(content) if "text" in part)
    return [{**part, "text": part["text"] + text} if index == last else part for index, part in enumerate(content)]
