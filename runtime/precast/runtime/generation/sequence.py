"""One sequence while it is generated: its tokens so far, the choice of the next, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .callbacks import CallerCriterion
from .config import GenerationConfig
from .outputs import Record
from .prompt import Prompt
from .sampling import Sampler, check_logits
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from ..structured.grammar import RowGrammar

__all__ = ["Guesser", "Request", "StoppingCriteria"]

Array = np.ndarray[Any, Any]


class Guesser(Protocol):
    """Guesses what follows a row, so that one step checks several tokens."""

    def append(self, token: int) -> None:
        """Add a token to the row."""

    def guess(self, room: int) -> list[int]:
        """Guess up to `room` next tokens."""

    def adapt_count(self, guessed: int, right: int) -> None:
        """Learn from a step: of the last `guessed` tokens the first `right` were right."""


class Request:
    """A prompt and the tokens generated after it. It is done when it ends or has `count` new tokens.

    Attributes:
        record: what is returned besides the tokens.
    """

    def __init__(
        self,
        prompt: Array,
        count: int,
        sampler: Sampler,
        ends: StoppingCriteria,
        guesser: Guesser | None,
        config: GenerationConfig,
    ) -> None:
        self.prompt, self.generated, self.is_done = prompt, [], False  # type: tuple[Array, list[int], bool]
        self.record = Record(config)
        self._tokens = np.concatenate([prompt, np.zeros(count, prompt.dtype)])
        self._length = len(prompt)
        self._sampler, self._ends, self._guesser = sampler, ends, guesser
        self._may_be_invalid, self._is_recorded = bool(config.remove_invalid_values), config.returns_steps

    def choose(self, logits: Array, guide: Callable[[Array], Array] | None = None) -> int:
        """Choose the next token from logits [vocabulary], which `guide` makes others of."""
        if not self._may_be_invalid:
            check_logits(logits, len(self.generated) + 1)
        tokens = self._tokens[: self._length]
        scores = self._sampler.process(tokens, logits if guide is None else guide(logits))
        token = self._sampler.pick(scores)
        if self._is_recorded:
            self.record.add(logits, scores, token)
        self._tokens[self._length] = token
        self._length += 1
        self.generated.append(token)
        if self._guesser is not None:
            self._guesser.append(token)
        is_full = self._length == len(self._tokens)
        self.is_done = self.is_done or self._ends(self._tokens[: self._length], logits) or is_full
        return token

    @property
    def is_idle(self) -> bool:
        """Whether nothing more is generated: it is done, and an end-of-sequence token exists to fill it up with.
        Without one an ended row goes on with its batch, as in transformers."""
        return self.is_done and (self._ends.has_eos_token or self._length == len(self._tokens))

    def guess(self) -> list[int]:
        """Tokens that may follow the newest one; none without a guesser."""
        # The last new token need not be guessed: the step that checks the one before it computes its logits.
        return [] if self._guesser is None else self._guesser.guess(len(self._tokens) - self._length - 1)

    def check(self, guesses: list[int], logits: Array, guide: Callable[[Array], Array] | None = None) -> list[int]:
        """Choose tokens from logits [guesses + 1, vocabulary] up to the first that was not guessed; returns them.

        Each is chosen as it would be one by one, so guesses change the time that it takes and nothing else.
        """
        chosen = [self.choose(logits[0], guide)]
        while len(chosen) <= len(guesses) and chosen[-1] == guesses[len(chosen) - 1] and not self.is_done:
            chosen.append(self.choose(logits[len(chosen)]))
        if self._guesser is not None:
            self._guesser.adapt_count(len(guesses), len(chosen) - 1)
            self.record.guessed += len(guesses)
            self.record.accepted += len(chosen) - 1
        return chosen


class StoppingCriteria:
    """Everything that ends a row: end-of-sequence tokens, stop strings, a `deadline` of time.monotonic(), a `form` that
    is complete, and the caller's own `criteria`.

    A criterion of transformers' class for one of the first three replaces what the configuration says, as there.

    Attributes:
        has_eos_token: whether there is an end-of-sequence token, or a form that ends by itself.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Prompt,
        criteria: Sequence[CallerCriterion],
        stops: StopStrings | None,
        deadline: float | None = None,
        form: RowGrammar | None = None,
    ) -> None:
        kinds = {criterion.kind for criterion in criteria}
        self._eos = frozenset([] if "EosTokenCriteria" in kinds else config.eos_ids)
        self._stops = None if "StopStringCriteria" in kinds else stops
        self._deadline = None if "MaxTimeCriteria" in kinds else deadline
        self._prompt, self._criteria, self._form = prompt, criteria, form
        self.has_eos_token = bool(self._eos) or "EosTokenCriteria" in kinds or form is not None

    def __call__(self, tokens: Array, logits: Array) -> bool:
        """Whether a row ends with the newest of its tokens [length], which was chosen from logits [vocabulary]."""
        if int(tokens[-1]) in self._eos or (self._stops is not None and self._stops(tokens)):
            return True
        if self._deadline is not None and time.monotonic() > self._deadline:
            return True
        if self._form is not None and self._form.is_complete(tokens):
            return True
        return any(criterion(self._prompt.show(tokens), logits) for criterion in self._criteria)
