"""The caller's own logits processors, stopping criteria and streamers, each given the kind of arrays that it takes.

That is torch's tensors where it is of a class of transformers, or where the call was made with tensors, else numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..inputs.tensors import as_tensor, is_tensor, to_numpy, to_python

__all__ = [
    "CallerAllowedTokens",
    "CallerCriterion",
    "CallerProcessor",
    "Streamers",
    "check_rows",
    "distinct_functions",
    "transformers_class_of",
]

Array = np.ndarray[Any, Any]

_WHOLE_BATCH = {
    "ClassifierFreeGuidanceLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
}
"""Transformers' processors that treat each row of a batch in its own way, or keep state for each."""


class _CallerFunction:
    """A function of the caller that takes batches of one row, tokens [1, length] and logits [1, vocabulary].

    Attributes:
        kind: the name of its class, where that is one of transformers.
        name: what error messages call it.
    """

    def __init__(self, function: Any, given: Any) -> None:
        self.kind, self.name = transformers_class_of(function), _function_name(function)
        self._function, self._takes_tensors = function, _takes_tensors(function, given)

    def _as_batch(self, tokens: Array, logits: Array) -> tuple[Any, Any]:
        """One row as the function takes it. Copies: it may work in place, and keep what it is given."""
        rows, scores = tokens[None].copy(), logits[None].copy()
        return (as_tensor(rows), as_tensor(scores)) if self._takes_tensors else (rows, scores)


class CallerProcessor(_CallerFunction):
    """A logits processor: one row's tokens [length] and logits [vocabulary] -> logits [vocabulary].

    Raises InputError for an answer that is no logits.
    """

    def __call__(self, tokens: Array, logits: Array) -> Array:
        found = self._function(*self._as_batch(tokens, logits))
        answer, wanted = np.asarray(to_numpy(found)), [1, len(logits)]
        if list(answer.shape) != wanted or answer.dtype.kind not in "fiu":
            raise InputError(
                f"The logits_processor {self.name} has to return logits, float32 {wanted}; it returned {answer.dtype} "
                f"{list(answer.shape)}."
            )
        if np.isnan(answer).any():
            raise InputError(f"The logits_processor {self.name} returned NaN among its logits.")
        row: Array = answer[0].astype(np.float32)
        return row


class CallerCriterion(_CallerFunction):
    """A stopping criterion: one row's tokens [length] and the logits [vocabulary] of its newest -> does it end?

    A class of transformers is given None for the logits, as transformers does where no scores are asked for.
    """

    def __call__(self, tokens: Array, logits: Array) -> bool:
        rows, scores = self._as_batch(tokens, logits)
        found = self._function(rows, None if _subclasses_transformers(self._function) else scores)
        if found is None:
            raise InputError(
                f"The stopping_criteria's {self.name} has to return whether the row ends; it returned None."
            )
        return bool(np.all(to_numpy(found)))


class CallerAllowedTokens:
    """A `prefix_allowed_tokens_fn`: a prompt's index and one row's tokens [length] -> the ids that may come next.

    Raises InputError for an answer that is no ids, or none.
    """

    def __init__(self, function: Any, given: Any) -> None:
        if not callable(function):
            raise InputError(f"prefix_allowed_tokens_fn must be a function, not {function!r:.80}.")
        self._function, self._takes_tensors = function, is_tensor(given)

    def __call__(self, index: int, tokens: Array, vocabulary: int) -> Array:
        found = self._function(index, as_tensor(tokens) if self._takes_tensors else tokens)
        try:
            ids = np.asarray(to_python(found))
        except ValueError:
            ids = np.zeros(0)
        if ids.dtype.kind not in "iu" or ids.ndim != 1 or np.any((ids < 0) | (ids >= vocabulary)):
            raise InputError(
                f"prefix_allowed_tokens_fn has to return a list of token ids, 0..{vocabulary - 1}, and at least one; "
                f"after {len(tokens)} tokens of prompt {index} it returned {found!r:.80}."
            )
        return ids


class Streamers:
    """The streamers of a call: one of a call with a single row, or a list with one for each row. Each is told its row's
    prompt [1, length] and then its tokens [1] by `put`, and the end of the row by `end`."""

    def __init__(self, given: Any, main_input: Any) -> None:
        self.are_listed = isinstance(given, list | tuple)
        self._streamers = list(given) if self.are_listed else [given]
        self._take_tensors = [_takes_tensors(each, main_input) for each in self._streamers]
        self._counts = [0] * len(self._streamers)
        self._open = set(range(len(self._streamers)))

    def begin(self, prompts: Sequence[Array]) -> None:
        """Hand over the prompts, each to the streamers of its rows."""
        for row in range(len(self._streamers)):
            self._put(row, prompts[row * len(prompts) // len(self._streamers)][None])

    def tell(self, row: int, tokens: Sequence[int], *, is_last: bool) -> None:
        """Hand over the tokens of a row that are new among all that it has; after the last no more will come."""
        for token in tokens[self._counts[row] :]:
            self._put(row, np.array([token]))
        self._counts[row] = len(tokens)
        if is_last:
            self._end(row)

    def end(self) -> None:
        """No more will come of any row."""
        for row in sorted(self._open):
            self._end(row)

    def _put(self, row: int, tokens: Array) -> None:
        self._streamers[row].put(as_tensor(tokens.copy()) if self._take_tensors[row] else tokens)

    def _end(self, row: int) -> None:
        if row in self._open:
            self._open.remove(row)
            self._streamers[row].end()


def distinct_functions(name: str, given: Any) -> list[Any]:
    """Check an argument that is a list of functions; returns them, each once. Raises InputError for anything else."""
    found = () if given is None else given
    if not isinstance(found, list | tuple) or not all(map(callable, found)):
        raise InputError(f"{name} must be a list of functions, not {given!r:.80}.")
    # As in transformers.
    return list({id(each): each for each in found}.values())


def transformers_class_of(function: Any) -> str | None:
    """The name of a function's class where that is one of transformers, else None."""
    kind = type(function)
    return kind.__name__ if _is_transformers_class(kind) else None


def check_rows(processors: Sequence[Any], rows: int) -> None:
    """Raise InputError for a processor that has to see all rows of a batch together, where there are several."""
    for each in processors:
        names = {kind.__name__ for kind in type(each).__mro__ if _is_transformers_class(kind)}
        if rows > 1 and names & _WHOLE_BATCH:
            raise InputError(
                f"{_function_name(each)} tells the rows of a batch apart, and here each of the {rows} is processed by "
                f"itself. Call generate() for one row at a time, with num_beams=1."
            )


def _takes_tensors(function: Any, given: Any) -> bool:
    return is_tensor(given) or _subclasses_transformers(function)


def _subclasses_transformers(function: Any) -> bool:
    return any(map(_is_transformers_class, type(function).__mro__))


def _is_transformers_class(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


def _function_name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
