"""Beam search over one prompt, and beam sampling, as transformers' vectorised `_beam_search` does them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import GenerationConfig
from .outputs import Answer, Record
from .probabilities import log_softmax
from .sampling import Processors, check_choice, check_logits
from .sequence import StoppingCriteria

__all__ = ["BeamSearch"]

Array = np.ndarray[Any, Any]

_Ended = tuple[np.float32, list[int], list[int]]
"""A row's score, its new tokens, and the beams that they were chosen for."""

_NEVER = np.float32(-1e9)
"""The score of a row that must not be chosen; transformers' number, which decides ties among such rows."""


class BeamSearch:
    """The beams of one prompt: `width` rows that run, and the best `width` that ended.

    A row's score is the sum of its tokens' log-probabilities, float32. A row that ends is scored by that sum divided by
    the number of its new tokens to the power of `length_penalty`. Rows have `count` new tokens at most; `full`, the
    number that the settings say, is how long early_stopping="never" assumes that they may become. Continuations are
    drawn where there is a `generator`, else the likeliest are taken.
    """

    def __init__(
        self,
        prompt: Array,
        count: int,
        config: GenerationConfig,
        process: Processors,
        ends: StoppingCriteria,
        generator: np.random.Generator | None = None,
        *,
        full: int,
    ) -> None:
        self.prompt, self.width, self.is_done = prompt, config.beams, False
        self._process, self._ends, self._count, self._full = process, ends, count, full
        self._penalty = 1.0 if config.length_penalty is None else config.length_penalty
        self._early = config.early_stopping or False
        self._may_be_invalid, self._is_recorded = bool(config.remove_invalid_values), config.returns_steps
        self._generator, self._record = generator, Record(config)
        self._tokens = np.repeat(prompt[None], self.width, 0)
        self._parents = np.zeros((self.width, 0), np.int64)
        # All rows are alike at first, so only the first counts.
        self._scores = np.full(self.width, _NEVER, np.float32)
        self._scores[0] = 0
        self._ended: list[_Ended] = [(_NEVER, [], [])] * self.width
        # As many as could end, and as many again to go on with.
        self._candidates = max(2, 1 + len(config.eos_ids)) * self.width

    @property
    def last_tokens(self) -> list[int]:
        """The newest token of each running row, which the next step feeds."""
        found: list[int] = self._tokens[:, -1].tolist()
        return found

    def best(self, count: int) -> list[Answer]:
        """The best `count` rows that ended."""
        return [Answer(tokens, self._record, float(score), parents) for score, tokens, parents in self._ended[:count]]

    def advance(self, logits: Array) -> list[int]:
        """Choose the next tokens from logits [width, vocabulary]; returns the parent of each row: which row it
        continues."""
        scores, parents, chosen = self._top_candidates(logits)
        tokens = np.concatenate([self._tokens[parents], chosen[:, None]], 1)
        lineage = np.concatenate([self._parents[parents], parents[:, None]], 1)
        new = tokens.shape[1] - len(self.prompt)
        ends = self._find_ended(tokens, logits, parents) | (new == self._count)
        self._keep_ended(scores, tokens, lineage, ends)
        running = np.where(ends, scores + _NEVER, scores)
        order = _argsort_descending(running)[: self.width]
        self._tokens, self._parents, self._scores = tokens[order], lineage[order], running[order]
        self.is_done = bool(ends.all()) or not self._may_improve(new)
        kept: list[int] = parents[order].tolist()
        return kept

    def _top_candidates(self, logits: Array) -> tuple[Array, Array, Array]:
        """The best continuations of all rows, best first: their scores, the rows that they continue, their tokens."""
        likelihoods = log_softmax(logits)
        if not self._may_be_invalid:
            check_logits(likelihoods, self._tokens.shape[1] - len(self.prompt) + 1)
        processed = self._process.together(self._tokens, likelihoods)
        if self._is_recorded:
            self._record.add(logits, processed)
        flat = (processed + self._scores[:, None]).ravel()
        top = self._choose_candidates(flat)
        top = top[_argsort_descending(flat[top])]
        check_choice(flat[top[0]])
        return flat[top], top // logits.shape[1], top % logits.shape[1]

    def _choose_candidates(self, scores: Array) -> Array:
        """Which continuations to look at: the best, or a draw without replacement by their probabilities."""
        if self._generator is not None:
            # The largest of log-probabilities with Gumbel noise are such a draw (Kool et al. 2019).
            scores = scores + self._generator.gumbel(size=scores.shape)
        count = min(self._candidates, len(scores))
        return np.argpartition(scores, -count)[-count:]

    def _find_ended(self, tokens: Array, logits: Array, parents: Array) -> Array:
        """Which candidates a stopping criterion ends, bool [candidates]."""
        return np.array([self._ends(row, logits[parent]) for row, parent in zip(tokens, parents, strict=True)])

    def _keep_ended(self, scores: Array, tokens: Array, lineage: Array, ends: Array) -> None:
        """Rank the candidates that ended, of the first `width`: later ones only replace rows that end."""
        start = len(self.prompt)
        held = scores / np.float32((tokens.shape[1] - start) ** self._penalty)
        self._ended += [
            (held[i], tokens[i, start:].tolist(), lineage[i].tolist()) for i in range(self.width) if ends[i]
        ]
        self._ended.sort(key=lambda each: -each[0])
        del self._ended[self.width :]

    def _may_improve(self, new: int) -> bool:
        """Whether a running row may still beat the worst of the best ended ones, by early_stopping."""
        if not all(tokens for _, tokens, _ in self._ended):
            return True
        if self._early is True:
            return False
        # Transformers' guess of how long the best running row may become.
        length = self._full if self._early == "never" and self._penalty > 0 else new
        return bool(self._scores[0] / np.float32(length**self._penalty) > self._ended[-1][0])


def _argsort_descending(values: Array) -> Array:
    return np.argsort(-values, kind="stable")
