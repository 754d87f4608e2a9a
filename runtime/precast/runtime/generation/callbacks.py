"""The caller's own logits processors, stopping criteria and streamers, each given arrays of the kind that it takes.

That is torch's tensors where it is of a class of transformers, or where the call was made with tensors, else numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..inputs.tensors import as_tensor, is_tensor, to_numpy

__all__ = ["Criterion", "Processing", "Streamer", "check_rows", "functions", "kind_of"]

Array = np.ndarray[Any, Any]

_OF_BATCHES = {
    "ClassifierFreeGuidanceLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
}
"""Transformers' processors that know the rows of a batch apart, or keep something of each."""


class Processing:
    """A logits processor: one row's tokens [length] and logits [vocabulary] -> logits [vocabulary].

    The caller's function takes batches, [1, length] and [1, vocabulary], as transformers' do. Raises InputError for an
    answer that is no logits.
    """

    def __init__(self, function: Any, given: Any) -> None:
        self.kind, self.name = kind_of(function), _name(function)
        self._function, self._takes_tensors = function, _takes_tensors(function, given)

    def __call__(self, tokens: Array, logits: Array) -> Array:
        # Copies: it may work in place, and keep what it is given.
        arrays = tokens[None].copy(), logits[None].copy()
        found = self._function(*(map(as_tensor, arrays) if self._takes_tensors else arrays))
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


class Criterion:
    """A stopping criterion: one row's tokens [length] and the logits [vocabulary] of its newest -> does it end?

    The caller's function takes [1, length] and [1, vocabulary]; a class of transformers is given None for the logits,
    as transformers does where no scores are asked for.
    """

    def __init__(self, function: Any, given: Any) -> None:
        self.kind, self.name = kind_of(function), _name(function)
        self._function, self._takes_tensors = function, _takes_tensors(function, given)

    def __call__(self, tokens: Array, logits: Array) -> bool:
        arrays = tokens[None].copy(), logits[None].copy()
        rows, scores = map(as_tensor, arrays) if self._takes_tensors else arrays
        found = self._function(rows, None if _is_theirs(self._function) else scores)
        if found is None:
            raise InputError(
                f"The stopping_criteria's {self.name} has to return whether the row ends; it returned None."
            )
        return bool(np.all(to_numpy(found)))


class Streamer:
    """A streamer: told the prompt [1, length] and each step's tokens [1] by `put`, and the end by `end`."""

    def __init__(self, streamer: Any, given: Any) -> None:
        self._streamer, self._takes_tensors = streamer, _takes_tensors(streamer, given)

    def put(self, tokens: Array) -> None:
        """Hand over tokens."""
        self._streamer.put(as_tensor(tokens.copy()) if self._takes_tensors else tokens)

    def end(self) -> None:
        """No more will come."""
        self._streamer.end()


def functions(name: str, given: Any) -> list[Any]:
    """The list of functions that an argument of this name is, each once. Raises InputError for anything else."""
    found = () if given is None else given
    if not isinstance(found, list | tuple) or not all(map(callable, found)):
        raise InputError(f"{name} must be a list of functions, not {given!r:.80}.")
    # As in transformers.
    return list({id(each): each for each in found}.values())


def kind_of(function: Any) -> str | None:
    """The name of the class of transformers that a function is an object of, None for one of a class of its own."""
    kind = type(function)
    return kind.__name__ if _is_of_transformers(kind) else None


def check_rows(processors: Sequence[Any], rows: int) -> None:
    """Raise InputError for a processor that has to see all rows of a batch together, where there are several."""
    for each in processors:
        names = {kind.__name__ for kind in type(each).__mro__ if _is_of_transformers(kind)}
        if rows > 1 and names & _OF_BATCHES:
            raise InputError(
                f"{_name(each)} tells the rows of a batch apart, and here each of the {rows} is processed by "
                f"itself. Call generate() for one row at a time, with num_beams=1."
            )


def _takes_tensors(function: Any, given: Any) -> bool:
    return is_tensor(given) or _is_theirs(function)


def _is_theirs(function: Any) -> bool:
    return any(map(_is_of_transformers, type(function).__mro__))


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
