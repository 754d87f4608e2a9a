"""What `generate()` returns besides the tokens, step by step: scores, logits and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .config import GenerationConfig
from .probabilities import log_softmax

__all__ = ["Answer", "Record", "combine_outputs"]

Array = np.ndarray[Any, Any]


@dataclass
class Record:
    """What is kept of a row, or of all beams of a prompt, by the settings that ask for it.

    Attributes:
        scores, logits: of each step, after and before the processors: [vocabulary], or [beams, vocabulary].
        logprobs: of each new token, by the model's own logits.
        likeliest: of each step the ids of the likeliest tokens, best first, and their log-probabilities.
        guessed, accepted: how many tokens a draft guessed, and how many of them were right.
    """

    config: GenerationConfig
    scores: list[Array] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[tuple[Array, Array]] = field(default_factory=list)
    guessed: int = 0
    accepted: int = 0

    def add(self, logits: Array, scores: Array, token: int | None = None) -> None:
        """Keep what is asked for of a step; `token` is what a row was continued with."""
        if self.config.output_scores:
            self.scores.append(scores.astype(np.float32))
        if self.config.output_logits:
            self.logits.append(logits.astype(np.float32))
        if token is not None and self.config.returns_logprobs:
            values = log_softmax(logits)
            best = np.argsort(-values, kind="stable")[: self.config.top_logprobs or 0]
            self.logprobs.append(float(values[token]))
            self.likeliest.append((best, values[best]))


@dataclass(frozen=True)
class Answer:
    """One row that is returned.

    Attributes:
        tokens: those that were generated.
        record: of this row, or of all beams of its prompt.
        score: of a beam.
        parents: which of the prompt's beams each token of a beam was chosen for.
    """

    tokens: list[int]
    record: Record
    score: float = 0
    parents: Sequence[int] = ()


def combine_outputs(answers: Sequence[Answer], config: GenerationConfig) -> dict[str, Any]:
    """The outputs of all rows by transformers' names, and log-probabilities; a row that ended has zeros, and -1 for
    beams."""
    found: dict[str, Any] = {}
    is_search, width = config.beams > 1, max(len(answer.tokens) for answer in answers)
    records = list({id(answer.record): answer.record for answer in answers}.values())
    if is_search and config.output_scores:
        found["sequences_scores"] = np.array([answer.score for answer in answers], np.float32)
    if config.output_scores:
        found["scores"] = _stack_steps([record.scores for record in records])
    if config.output_logits:
        found["logits"] = _stack_steps([record.logits for record in records])
    if is_search:
        count = config.num_return_sequences or 1
        firsts = [config.beams * (index // count) for index in range(len(answers))]
        rows = [[first + parent for parent in each.parents] for first, each in zip(firsts, answers, strict=True)]
        found["beam_indices"] = _padded(rows, width, -1, np.int32)
    if config.returns_logprobs:
        found["logprobs"] = _padded([record.logprobs for record in records], width, 0, np.float32)
    if config.top_logprobs:
        for index, (name, dtype) in enumerate((("top_logprobs_ids", np.int64), ("top_logprobs", np.float32))):
            steps = [[pair[index] for pair in record.likeliest] for record in records]
            found[name] = _padded(steps, width, np.zeros(config.top_logprobs), dtype)
    return found


def _stack_steps(records: Sequence[Sequence[Array]]) -> tuple[Array, ...]:
    """Per step the rows of all records, [rows, vocabulary]."""
    nothing = [np.zeros_like(steps[0]) for steps in records]
    return tuple(
        np.vstack([steps[step] if step < len(steps) else empty for steps, empty in zip(records, nothing, strict=True)])
        for step in range(max(map(len, records)))
    )


def _padded(rows: Sequence[Sequence[Any]], width: int, fill: Any, dtype: Any) -> Array:
    return np.array([[*row[:width], *[fill] * (width - len(row))] for row in rows], dtype)
