"""One row on its way through generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .callbacks import Criterion
from .config import GenerationConfig
from .prompt import Prompt
from .prompt_lookup import Lookup
from .sampling import Sampler, check_logits
from .stop_strings import StopStrings

__all__ = ["Ends", "Request"]

Array = np.ndarray[Any, Any]


class Request:
    """A row's prompt, what was generated, and whether it is done: it ended, or has `count` new tokens."""

    def __init__(self, prompt: Array, count: int, sampler: Sampler, ends: Ends, lookup: Lookup | None) -> None:
        self.prompt, self.generated, self.is_done = prompt, [], False  # type: tuple[Array, list[int], bool]
        self._tokens = np.concatenate([prompt, np.zeros(count, prompt.dtype)])
        self._length = len(prompt)
        self._sampler, self._ends, self._lookup = sampler, ends, lookup

    def choose(self, logits: Array) -> int:
        """Take the next token from logits [vocabulary]."""
        check_logits(logits, len(self.generated) + 1)
        token = self._sampler(self._tokens[: self._length], logits)
        self._tokens[self._length] = token
        self._length += 1
        self.generated.append(token)
        if self._lookup is not None:
            self._lookup.append(token)
        is_full = self._length == len(self._tokens)
        self.is_done = self.is_done or self._ends(self._tokens[: self._length], logits) or is_full
        return token

    @property
    def rests(self) -> bool:
        """Whether it has ended and nothing more is generated: without a token that ends rows none fills them either, so
        that they go on with their batch, as in transformers."""
        return self.is_done and (self._ends.have_a_token or self._length == len(self._tokens))

    def guess(self) -> list[int]:
        """Tokens that may come after the newest one; none without a lookup."""
        # The last token of all need not be guessed: the step that checks the one before it gives it.
        return [] if self._lookup is None else self._lookup.guess(len(self._tokens) - self._length - 1)

    def check(self, guesses: list[int], logits: Array) -> list[int]:
        """Take tokens as long as they were guessed, and the first that was not, from logits [guesses + 1, vocabulary].

        Each is chosen as it would be one by one, so the guesses change nothing but the time that it takes.
        """
        chosen = [self.choose(logits[0])]
        while len(chosen) <= len(guesses) and chosen[-1] == guesses[len(chosen) - 1] and not self.is_done:
            chosen.append(self.choose(logits[len(chosen)]))
        if self._lookup is not None:
            self._lookup.learn(len(guesses), len(chosen) - 1)
        return chosen


class Ends:
    """Does a row end here? By an end-of-sequence token, a stop string, or one of the caller's `criteria`.

    Of transformers' classes for the first two the caller's own take the place of what the configuration says, as there.

    Attributes:
        have_a_token: whether there is an end-of-sequence token.
    """

    def __init__(
        self, config: GenerationConfig, prompt: Prompt, criteria: Sequence[Criterion], stops: StopStrings | None
    ) -> None:
        kinds = {criterion.kind for criterion in criteria}
        self._eos = frozenset([] if "EosTokenCriteria" in kinds else config.eos_ids)
        self._stops = None if "StopStringCriteria" in kinds else stops
        self._prompt, self._criteria = prompt, criteria
        self.have_a_token = bool(self._eos) or "EosTokenCriteria" in kinds

    def __call__(self, tokens: Array, logits: Array) -> bool:
        """For a row's tokens [length] and the logits [vocabulary] that its newest was chosen from."""
        if int(tokens[-1]) in self._eos or (self._stops is not None and self._stops(tokens)):
            return True
        return any(criterion(self._prompt.show(tokens), logits) for criterion in self._criteria)
