"""What all pipelines have in common: three steps, options, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, get_type_hints

import msgspec
import numpy as np
import tokenizers

from ..arguments import refuse_unknown
from ..errors import InputError, UsageError
from ..tensors import ModelOutput, plain
from ..tokenizer import Tokenizer

__all__ = ["Batch", "Pipeline", "TextPipeline", "text_and_pair"]

Array = np.ndarray[Any, Any]

_STAGES = ("preprocess", "forward", "postprocess")


class Batch(dict[str, Array]):
    """Arrays by name, one row of the model's input or output each along the first dimension.

    Attributes:
        inputs: what the caller gave, one for each answer.
        is_one: the caller gave one input and not a list, so gets one answer.
        notes: what else an answer is made of, such as where tokens stand in their text.
    """

    def __init__(self, arrays: dict[str, Array], inputs: Sequence[Any], is_one: bool, **notes: Any) -> None:
        super().__init__(arrays)
        self.inputs, self.is_one, self.notes = inputs, is_one, notes

    def holding(self, arrays: dict[str, Array]) -> Batch:
        """Other arrays for the same inputs."""
        return Batch(arrays, self.inputs, self.is_one, **self.notes)

    def answer(self, answers: Sequence[Any]) -> Any:
        """One answer, or a list, as the caller asked."""
        return answers[0] if self.is_one else list(answers)


class Pipeline:
    """A compiled model with what comes before and after it.

    Calling it is calling its three steps in turn, each of which can be called by itself:

        answer = pipe.postprocess(pipe.forward(pipe.preprocess(inputs)))

    `inputs` is one input or a list; a list gives a list of answers, however long, whatever the compiled batch size.
    Options go to the step whose signature names them; those given to `pipeline()` hold for every call of it, or of one
    of its steps, that does not say otherwise.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options
        for stage, own in zip(_STAGES, self._split(options), strict=True):
            if own:
                setattr(self, stage, partial(getattr(self, stage), **own))

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({self.model!r}{options})"

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer."""
        found: Tokenizer = self.model.tokenizer
        return found

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The answer to one input, or the list of answers to a list. Raises UsageError for an unknown option, and
        InputError for inputs that do not fit the model."""
        stages = self._split(options)
        if not self._is_list(inputs):
            return self._run(inputs, *stages)
        if not inputs:
            raise InputError("The list of inputs is empty.")
        size = self.model.batch_size
        parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        return [answer for part in parts for answer in self._run(part, *stages)]

    def preprocess(self, inputs: Any) -> Batch:
        """What the caller gives, as arrays that the model takes."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Batch:
        """The model's outputs, all rows'."""
        outputs = [self.model(**rows) for rows in self._slices(batch)]
        return batch.holding(_joined(outputs))

    def postprocess(self, outputs: Batch) -> Any:
        """The answer, or a list of answers where a list was given."""
        raise NotImplementedError

    @classmethod
    def of(cls, model: Any) -> type[Pipeline]:
        """The class for this model, where a task is done in several ways."""
        return cls

    @classmethod
    def option_names(cls) -> list[str]:
        """The options that this pipeline's steps take."""
        return sorted({name for stage in _STAGES for name in _options(cls, stage)})

    @classmethod
    def passed_on(cls, model: Any) -> list[str]:
        """Further options, which `forward` passes on to the model."""
        return []

    @classmethod
    def takes_any_option(cls) -> bool:
        """Whether what no step names is given to `forward`, as generate()'s options are."""
        return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(cls.forward).parameters.values())

    def _run(self, inputs: Any, *stages: dict[str, Any]) -> Any:
        before, within, after = stages
        return self.postprocess(self.forward(self.preprocess(inputs, **before), **within), **after)

    def _is_list(self, inputs: Any) -> bool:
        return isinstance(inputs, list | tuple)

    def _listed(self, inputs: Any) -> tuple[list[Any], bool]:
        """The inputs as a list, and whether it was one that was no list."""
        return (list(inputs), False) if self._is_list(inputs) else ([inputs], True)

    def _slices(self, batch: dict[str, Array]) -> Iterator[dict[str, Array]]:
        size = self.model.batch_size
        for start in range(0, len(next(iter(batch.values()))), size):
            yield {name: rows[start : start + size] for name, rows in batch.items()}

    def _split(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The options of each step. Raises UsageError for one that none takes."""
        stages = [{name: options[name] for name in _options(type(self), stage) if name in options} for stage in _STAGES]
        rest = {name: value for name, value in options.items() if not any(name in stage for stage in stages)}
        for stage, given in zip(_STAGES, stages, strict=True):
            for name, value in given.items():
                _check_option(type(self), stage, name, value)
        refuse_unknown(type(self).__name__, options, [*self.option_names(), *self.passed_on(self.model)])
        stages[1].update(rest)
        return stages


class TextPipeline(Pipeline):
    """A pipeline that begins with the artifact's tokenizer."""

    def preprocess(self, inputs: Any, *, truncation: bool = False) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text; or a pair of texts, {"text": …, "text_pair": …}; or a list of these.
            truncation: cut what is longer than compiled for, instead of refusing it.
        """
        given, is_one = self._listed(inputs)
        encodings = [self._encoding(*text_and_pair(each), truncation) for each in given]
        return Batch(self._arrays(encodings), given, is_one, encodings=encodings)

    def _arrays(self, encodings: Sequence[tokenizers.Encoding]) -> dict[str, Array]:
        """A batch of encodings, of which the model takes its inputs; some tokenizers give more."""
        return {name: rows for name, rows in self.tokenizer.pad(encodings).items() if name in self.model.inputs}

    def _encoding(self, text: str, pair: str | None, truncation: bool) -> tokenizers.Encoding:
        length = self._longest() if truncation else None
        return self.tokenizer.encodings(text, pair, length=length)[0]

    def _longest(self) -> int:
        """The tokens that the longest compiled row holds, or fewer where the checkpoint's tokenizer says so."""
        longest = int(max(self.model.artifact.contract.shapes.sequence_length))
        return min(longest, self.tokenizer.max_length or longest)

    def _own(self, outputs: Batch, name: str) -> list[Array]:
        """One output's values for each row's own tokens, without what was padded."""
        rows = zip(outputs[name], outputs.notes["encodings"], strict=True)
        if self.tokenizer.padding_side == "left":
            return [row[len(row) - len(encoding.ids) :] for row, encoding in rows]
        return [row[: len(encoding.ids)] for row, encoding in rows]


def text_and_pair(given: Any) -> tuple[str, str | None]:
    """The texts of one input. Raises InputError for what is none."""
    if isinstance(given, str):
        return given, None
    if isinstance(given, dict) and "text" in given and given.keys() <= {"text", "text_pair"}:
        return given["text"], given.get("text_pair")
    raise InputError(f'An input is a text, or {{"text": …, "text_pair": …}}; this is {given!r:.80}.')


def _check_option(cls: type[Pipeline], stage: str, name: str, value: Any) -> None:
    """Raise UsageError for an option of another type than its step says, or for a count below 0."""
    given = plain(value)
    try:
        msgspec.convert(given, _kinds(getattr(cls, stage))[name])
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise UsageError(f"{name}={given!r:.80} is of the wrong type: {error}.") from None
    if isinstance(given, int) and given < 0:
        raise UsageError(f"{name}={given} must not be below 0.")


@cache
def _kinds(step: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(step)


def _options(cls: type[Pipeline], stage: str) -> list[str]:
    found = inspect.signature(getattr(cls, stage)).parameters.values()
    return [each.name for each in found if each.kind is each.KEYWORD_ONLY]


def _joined(outputs: list[ModelOutput]) -> dict[str, Array]:
    return {name: _stacked([each[name] for each in outputs]) for name in outputs[0]}


def _stacked(parts: list[Array]) -> Array:
    """Parts below one another, with zeros behind what ends early: a part has the frames of its own longest sound."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = np.zeros((sum(map(len, parts)), *shape), parts[0].dtype)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole
