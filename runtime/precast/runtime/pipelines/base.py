"""The base of all pipelines: three steps, options, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import msgspec
import numpy as np
import tokenizers

from ..arguments import refuse_unknown
from ..errors import InputError, UsageError
from ..inputs.companions import Readable
from ..inputs.tensors import ModelOutput, to_python
from ..inputs.tokenizer import Tokenizer
from .parts import PARTS, files_of, is_own, tokenizer_of

__all__ = [
    "Batch",
    "Count",
    "Padding",
    "Pipeline",
    "PlainTextPipeline",
    "TextPipeline",
    "TokenizerOptions",
    "Truncation",
    "text_and_pair",
]

Array = np.ndarray[Any, Any]

_STAGES = ("preprocess", "forward", "postprocess")


class Batch(dict[str, Array]):
    """Arrays by name, one row of the model's input or output each along the first dimension.

    Attributes:
        inputs: the caller's inputs, one for each answer.
        is_one: the caller gave one input and not a list, so gets one answer.
        notes: further data for postprocess, such as the encodings of texts.
    """

    def __init__(self, arrays: dict[str, Array], inputs: Sequence[Any], is_one: bool, **notes: Any) -> None:
        super().__init__(arrays)
        self.inputs, self.is_one, self.notes = inputs, is_one, notes

    def with_arrays(self, arrays: dict[str, Array]) -> Batch:
        """The same inputs and notes with other arrays."""
        return Batch(arrays, self.inputs, self.is_one, **self.notes)

    def answer(self, answers: Sequence[Any]) -> Any:
        """One answer, or a list, as the caller asked."""
        return answers[0] if self.is_one else list(answers)


class Pipeline:
    """A compiled model with its preprocessing and postprocessing.

    Calling it is calling its three steps in turn, each of which can be called by itself:

        answer = pipe.postprocess(pipe.forward(pipe.preprocess(inputs)))

    `inputs` is one input or a list; a list gives a list of answers, however long, whatever the compiled batch size. A
    generator or a dataset gives an iterator, which takes inputs as its answers are asked for.
    Options go to the step whose signature names them; those given to `pipeline()` hold for every call of it, or of one
    of its steps, that does not say otherwise.

    Args:
        model: the compiled model.
        batch_size: how many inputs are prepared at a time; by default as many as the model runs at once.
        tokenizer, feature_extractor, image_processor: what inputs are prepared by instead of what the artifact
            carries: a directory, or an object of transformers.
        options: of the steps.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """How the inputs are called besides `inputs`, as in transformers."""
    parts: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """Which of PARTS it prepares inputs by, or reads answers by."""
    takes_pairs: ClassVar[bool] = False
    """Whether a tuple is one input, a pair of texts; otherwise it is a list."""

    def __init__(self, model: Any, *, batch_size: int | None = None, **options: Any) -> None:
        parts = {name: options.pop(name) for name in PARTS if name in options}
        self._parts = {
            name: given for name, given in parts.items() if given is not None and not is_own(model.artifact, given)
        }
        self._check_parts()
        self._size = _check_size(batch_size)
        self.model, self.options = model, options
        for stage, own in zip(_STAGES, self._split_options(options), strict=True):
            if own:
                setattr(self, stage, partial(getattr(self, stage), **own))

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({self.model!r}{options})"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, or the one that was given."""
        given = self._parts.get("tokenizer")
        found: Tokenizer = self.model.tokenizer if given is None else tokenizer_of(self.model.artifact, given)
        return found

    @property
    def is_changed(self) -> bool:
        """Whether it was given options or parts, beside its model."""
        return bool(self.options or self._parts or self._size)

    def __call__(self, inputs: Any = None, *, batch_size: int | None = None, **options: Any) -> Any:
        """The answer to one input, the list of answers to a list, or an iterator over those to a generator or dataset.

        Raises UsageError for an unknown option, and InputError for inputs that do not fit the model.
        """
        for name in self.names:
            inputs = options.pop(name, None) if inputs is None else inputs
        size = _check_size(batch_size) or self._size or self.model.batch_size
        stages = self._split_options(options)
        if _is_stream(inputs):
            return self._stream_answers(inputs, size, stages)
        if not self._is_list(inputs):
            return self._run_steps(inputs, *stages)
        if not inputs:
            raise InputError("The list of inputs is empty.")
        return list(self._stream_answers(inputs, size, stages))

    def save_pretrained(self, save_directory: str | Path, *, force: bool = False) -> None:
        """Copy the artifact to a directory, as `CompiledModel.save_pretrained`. Raises UsageError where the pipeline
        prepares its inputs by something else than the artifact carries."""
        if self._parts:
            raise UsageError(
                f"An artifact keeps what it was exported with, and this pipeline has another "
                f"{' and '.join(self._parts)}. Put the files into the checkpoint and export it again, or save "
                f"pipe.model."
            )
        self.model.save_pretrained(save_directory, force=force)

    def preprocess(self, inputs: Any) -> Batch:
        """The caller's inputs as arrays that the model takes."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Batch:
        """The model's outputs for all rows."""
        outputs = [self.model(**rows) for rows in self._batch_slices(batch)]
        return batch.with_arrays(_join_outputs(outputs))

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
        return sorted({name for stage in _STAGES for name in _step_options(cls, stage)})

    @classmethod
    def passed_on(cls, model: Any) -> list[str]:
        """Further options, which `forward` passes on to the model."""
        return []

    @classmethod
    def takes_any_option(cls) -> bool:
        """Whether what no step names is given to `forward`, as generate()'s options are."""
        return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(cls.forward).parameters.values())

    def _stream_answers(self, inputs: Any, size: int, stages: list[dict[str, Any]]) -> Iterator[Any]:
        before, within, after = stages
        items = iter(inputs) if isinstance(inputs, Iterable) else (inputs[index] for index in range(len(inputs)))
        total, start = len(inputs) if hasattr(inputs, "__len__") else None, 0
        while part := list(islice(items, size)):
            places = range(start, start + len(part))
            yield from self._run_steps(part, before, self._options_of(within, places, total), after)
            start += len(part)

    def _options_of(self, options: dict[str, Any], places: Sequence[int], total: int | None) -> dict[str, Any]:
        """The options of `forward` for the inputs at these places among all, whose number may not be known."""
        return options

    def _check_parts(self) -> None:
        """Raise UsageError for a part that has no place in this pipeline."""
        if useless := [name for name in self._parts if name not in self.parts]:
            raise UsageError(
                f"{type(self).__name__} has no use for {' and '.join(useless)}: what it can be given is "
                f"{' and '.join(self.parts)}. Leave {'it' if len(useless) == 1 else 'them'} out."
            )

    def _part_files(self, part: str) -> tuple[Path, Readable]:
        """The path and files that a part of PARTS is read from."""
        return files_of(self.model.artifact, part, self._parts.get(part))

    def _run_steps(self, inputs: Any, *stages: dict[str, Any]) -> Any:
        before, within, after = stages
        return self.postprocess(self.forward(self.preprocess(inputs, **before), **within), **after)

    def _is_list(self, inputs: Any) -> bool:
        return isinstance(inputs, list) or (isinstance(inputs, tuple) and not self.takes_pairs)

    def _as_list(self, inputs: Any) -> tuple[list[Any], bool]:
        """The inputs as a list, and whether the caller gave a single one."""
        return (list(inputs), False) if self._is_list(inputs) else ([inputs], True)

    def _batch_slices(self, batch: dict[str, Array]) -> Iterator[dict[str, Array]]:
        size = self.model.batch_size
        for start in range(0, len(next(iter(batch.values()))), size):
            yield {name: rows[start : start + size] for name, rows in batch.items()}

    def _split_options(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The options of each step. Raises UsageError for one that none takes."""
        stages = [
            {name: options[name] for name in _step_options(type(self), stage) if name in options} for stage in _STAGES
        ]
        rest = {name: value for name, value in options.items() if not any(name in stage for stage in stages)}
        for stage, given in zip(_STAGES, stages, strict=True):
            for name, value in given.items():
                _check_option(type(self), stage, name, value)
        known = [*self.option_names(), *self.passed_on(self.model), "batch_size"]
        refuse_unknown(type(self).__name__, options, known)
        stages[1].update(rest)
        return stages


Truncation = bool | Literal["longest_first", "only_first", "only_second", "do_not_truncate"] | None
Count = Annotated[int, msgspec.Meta(ge=1)]
Padding = bool | Literal["longest", "max_length", "do_not_pad"]


class TokenizerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options that transformers' pipelines pass on to their tokenizers.

    Attributes:
        truncation: cut what is longer than `max_length`, or, where that is not given, than the tokenizer says or was
            compiled for, instead of refusing it; of a pair the longer text's end, or that of the one that is named.
        max_length: the most tokens; cuts by itself where neither truncation nor padding says otherwise.
        padding: changes no answer, as rows are padded to the compiled size and do not see it.
        add_special_tokens: whether texts get those that the tokenizer puts around them.
    """

    truncation: Truncation = None
    max_length: Count | None = None
    padding: Padding = False
    add_special_tokens: bool = True

    @classmethod
    def of(cls, *given: TokenizerOptions | dict[str, Any] | None) -> TokenizerOptions:
        """Merge options and dicts of them; later ones go first. Raises UsageError for a wrong name or type."""
        told = {name: value for each in given for name, value in (msgspec.to_builtins(each) or {}).items()}
        try:
            return msgspec.convert(told, cls)
        except msgspec.ValidationError as error:
            raise UsageError(f"The tokenizer's options are {told!r:.200}: {error}.") from None

    def cut(self, longest: int) -> dict[str, Any]:
        """The arguments of `Tokenizer.encodings`; `longest` is the limit where `max_length` is not given."""
        by_itself = self.truncation is None and self.max_length is not None and self.padding is False
        cuts = by_itself or self.truncation not in (None, False, "do_not_truncate")
        strategy = self.truncation if isinstance(self.truncation, str) else "longest_first"
        told = {"length": self.max_length or longest, "strategy": strategy} if cuts else {}
        return {"add_special_tokens": self.add_special_tokens, **told}


class TextPipeline(Pipeline):
    """A pipeline that begins with the artifact's tokenizer."""

    def _as_arrays(self, encodings: Sequence[tokenizers.Encoding]) -> dict[str, Array]:
        """A batch of encodings, of which the model takes its inputs; some tokenizers give more."""
        return {name: rows for name, rows in self.tokenizer.pad(encodings).items() if name in self.model.inputs}

    def _encoding(self, text: str, pair: str | None, **how: Any) -> tokenizers.Encoding:
        return self.tokenizer.encodings(text, pair, **how)[0]

    def _max_length(self) -> int:
        """The tokens that the longest compiled row holds, or fewer where the checkpoint's tokenizer says so."""
        longest = int(max(self.model.artifact.contract.shapes.sequence_length))
        return min(longest, self.tokenizer.max_length or longest)

    def _own_values(self, outputs: Batch, name: str) -> list[Array]:
        """One output's values for each row's own tokens, without what was padded."""
        rows = zip(outputs[name], outputs.notes["encodings"], strict=True)
        if self.tokenizer.padding_side == "left":
            return [row[len(row) - len(encoding.ids) :] for row, encoding in rows]
        return [row[: len(encoding.ids)] for row, encoding in rows]


class PlainTextPipeline(TextPipeline):
    """A pipeline of texts, or pairs of texts, without further preprocessing."""

    def preprocess(
        self,
        inputs: Any,
        *,
        truncation: Truncation = None,
        max_length: Count | None = None,
        padding: Padding = False,
        add_special_tokens: bool = True,
        tokenizer_kwargs: TokenizerOptions | None = None,
    ) -> Batch:
        """Texts as token ids.

        Args:
            inputs: a text; or a pair of texts, (…, …) or {"text": …, "text_pair": …}; or a list of these.
            truncation, max_length, padding, add_special_tokens: as TokenizerOptions says.
            tokenizer_kwargs: a dict of these, which goes before them.
        """
        given, is_one = self._as_list(inputs)
        told = {"truncation": truncation, "max_length": max_length, "padding": padding,
                "add_special_tokens": add_special_tokens}  # fmt: skip
        how = TokenizerOptions.of(told, tokenizer_kwargs).cut(self._max_length())
        encodings = [self._encoding(*text_and_pair(each), **how) for each in given]
        return Batch(self._as_arrays(encodings), given, is_one, encodings=encodings)


def text_and_pair(given: Any) -> tuple[str, str | None]:
    """The text of one input, and the second one of a pair. Raises InputError for anything else."""
    if isinstance(given, str):
        return given, None
    if isinstance(given, tuple) and len(given) == 2:
        return given
    if isinstance(given, dict) and "text" in given and given.keys() <= {"text", "text_pair"}:
        return given["text"], given.get("text_pair")
    raise InputError(
        f'An input is a text, or a pair of texts, (…, …) or {{"text": …, "text_pair": …}}; several are a '
        f"list. This is {given!r:.80}."
    )


def _is_stream(given: Any) -> bool:
    """Whether inputs come one by one: from an iterable, or a dataset, which has a length and items."""
    if isinstance(given, str | bytes | Mapping | list | tuple) or hasattr(given, "shape"):
        return False
    return isinstance(given, Iterable) or (hasattr(given, "__len__") and hasattr(given, "__getitem__"))


def _check_size(batch_size: Any) -> int | None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"batch_size must be a whole number from 1, not {batch_size!r:.80}.")
    return batch_size


def _check_option(cls: type[Pipeline], stage: str, name: str, value: Any) -> None:
    """Raise UsageError for an option of another type than its step's signature says, or for a count below 0."""
    given, kind = to_python(value), _option_types(getattr(cls, stage))[name]
    try:
        msgspec.convert(given, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        choices = [repr(each) for part in get_args(kind) for each in get_args(part) if isinstance(each, str)]
        hint = f" Choose one of: True, False, {', '.join(choices)}." if choices else ""
        raise UsageError(f"{name}={given!r:.80} is of the wrong type: {error}.{hint}") from None
    if isinstance(given, int) and given < 0:
        raise UsageError(f"{name}={given} must not be below 0.")


@cache
def _option_types(step: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(step, include_extras=True)


def _step_options(cls: type[Pipeline], stage: str) -> list[str]:
    found = inspect.signature(getattr(cls, stage)).parameters.values()
    return [each.name for each in found if each.kind is each.KEYWORD_ONLY]


def _join_outputs(outputs: list[ModelOutput]) -> dict[str, Array]:
    return {name: _stack_parts([each[name] for each in outputs]) for name in outputs[0]}


def _stack_parts(parts: list[Array]) -> Array:
    """Concatenate parts, zero-padded to a common shape: each has as many frames as its own longest sound."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = np.zeros((sum(map(len, parts)), *shape), parts[0].dtype)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole
