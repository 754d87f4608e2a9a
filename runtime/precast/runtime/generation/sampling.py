"""Logits -> next token. Formulas are those of transformers' logits processors, applied in its order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, PrecastError
from .callbacks import CallerProcessor
from .config import GenerationConfig
from .probabilities import log_softmax, softmax
from .prompt import Prompt

__all__ = ["Processors", "Sampler", "check_choice", "check_logits", "draw_seed"]

Array = np.ndarray[Any, Any]
Processor = Callable[[Array, Array], Array]


class Processors:
    """All logits processors of one row: its tokens so far, int64 [length], and logits or log-probabilities
    [vocabulary] -> the same, changed.

    `count` new tokens continue the prompt by the settings, and the last may be forced; `source` are the tokens that an
    encoder-decoder answers. Of transformers' classes among the caller's own processors, the first of a kind replaces
    the one that the configuration asks for, as there; the others follow.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Prompt,
        count: int,
        extra: Sequence[CallerProcessor] = (),
        source: Array | None = None,
    ) -> None:
        own = [*_configured_processors(config, prompt, count, source)]
        instead = {each.kind: each for each in reversed(extra) if each.kind in dict(own)}
        others = [each for each in extra if each not in instead.values()]
        steps = [(kind, instead.get(kind, step)) for kind, step in own] + [(None, each) for each in others]
        self._steps = [_see_padding(step, prompt) if isinstance(step, CallerProcessor) else step for _, step in steps]
        if config.do_sample:
            self._steps += _sampling_warpers(config)
        if config.renormalize_logits and config.beams > 1:
            # Alone, a row is chosen alike from logits and from their log-probabilities.
            self._steps.append(lambda _, logits: log_softmax(logits))

    def __call__(self, tokens: Array, logits: Array) -> Array:
        if self._steps:
            logits = logits.astype(np.float32)
            for process in self._steps:
                logits = process(tokens, logits)
        return logits


class Sampler:
    """Chooses the next token of one row from its tokens so far, int64 [length], and its logits [vocabulary].

    `generator` draws; without one the likeliest token is taken.
    """

    def __init__(self, process: Processors, generator: np.random.Generator | None) -> None:
        self._process, self._generator = process, generator

    def __call__(self, tokens: Array, logits: Array) -> int:
        """The next token's id."""
        logits = self._process(tokens, logits)
        likeliest = int(logits.argmax())
        check_choice(logits[likeliest])
        return likeliest if self._generator is None else _draw_token(self._generator, logits)


def check_logits(logits: Array, step: int) -> None:
    """Raise PrecastError where the logits of a row's `step`th new token hold NaN."""
    if np.isnan(logits.max()):
        raise PrecastError(
            f"The model's logits for new token {step} hold NaN, so no token is the likeliest: some number in it is too "
            f"large for its precision. Export it with --dtype float32, or ask it something else."
        )


def check_choice(best: Any) -> None:
    """Raise InputError where the best of logits or scores is -inf: every token is ruled out."""
    if best == -np.inf:
        raise InputError(
            "No token may come next: suppress_tokens, bad_words_ids, no_repeat_ngram_size and logits_processor "
            "together rule out all. Leave one of them out."
        )


def draw_seed() -> int:
    """A seed from the framework's own generator, so that whoever seeds that makes runs repeatable: torch's, where it is
    imported and has been seeded (torch.manual_seed, transformers.set_seed), otherwise numpy's (np.random.seed)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.initial_seed() != torch.Generator().initial_seed():
        return int(torch.randint(_SEEDS, ()))
    # The one that np.random.seed seeds.
    return int(np.random.randint(_SEEDS, dtype=np.int64))


_SEEDS = 2**63 - 1


def _draw_token(generator: np.random.Generator, logits: Array) -> int:
    """Sample a token from the softmax of its logits."""
    if logits.max() == np.inf:
        # An infinite logit has all of the probability.
        logits = np.where(logits == np.inf, np.float32(0), np.float32(-np.inf))
    possible = np.flatnonzero(logits > -np.inf)
    return int(generator.choice(possible, p=softmax(logits[possible].astype(np.float64))))


def _see_padding(process: CallerProcessor, prompt: Prompt) -> Processor:
    """Hand the caller's processor the row with its padding, as the caller gave it."""
    return lambda tokens, logits: process(prompt.show(tokens), logits)


def _configured_processors(
    config: GenerationConfig, prompt: Prompt, count: int, source: Array | None
) -> Iterator[tuple[str, Processor]]:
    """The processors that the configuration asks for, each with the name of transformers' class that does it."""
    if (penalty := config.repetition_penalty) is not None and penalty != 1:
        yield "RepetitionPenaltyLogitsProcessor", lambda tokens, logits: repetition_penalty(tokens, logits, penalty)
    if size := config.no_repeat_ngram_size:
        yield "NoRepeatNGramLogitsProcessor", lambda tokens, logits: no_ngram_of(tokens, tokens, logits, size)
    if source is not None and (part := config.encoder_no_repeat_ngram_size):
        yield "EncoderNoRepeatNGramLogitsProcessor", lambda tokens, logits: no_ngram_of(source, tokens, logits, part)
    if words := [word for word in config.bad_words_ids or () if word not in [[end] for end in config.eos_ids]]:
        yield "NoBadWordsLogitsProcessor", lambda tokens, logits: no_bad_words(tokens, logits, words)
    yield from _length_minimums(config, prompt)
    yield from _fixed_tokens(config, prompt, count)


def _length_minimums(config: GenerationConfig, prompt: Prompt) -> Iterator[tuple[str, Processor]]:
    """Forbid the end of a row that is too short yet; min_new_tokens goes before min_length."""
    width, new, ends = len(prompt.shown), config.min_new_tokens, config.eos_ids
    least = (config.min_length or 0) if new is None else width + new
    if not ends or least <= width:
        return

    def step(tokens: Array, logits: Array) -> Array:
        return forbid_tokens(logits, ends) if prompt.length_of(tokens) < least else logits

    yield "MinLengthLogitsProcessor", step
    if new is not None:
        yield "MinNewTokensLengthLogitsProcessor", step


def _fixed_tokens(config: GenerationConfig, prompt: Prompt, count: int) -> Iterator[tuple[str, Processor]]:
    """Force the first and the last token of a row; forbid tokens everywhere, or at its beginning."""
    width = len(prompt.shown)

    def at(length: int, step: Callable[[Array], Array]) -> Processor:
        return lambda tokens, logits: step(logits) if prompt.length_of(tokens) == length else logits

    if (first := config.forced_bos_token_id) is not None:
        yield "ForcedBOSTokenLogitsProcessor", at(1, lambda logits: allow_only(logits, [first]))
    if last := config.last_ids:
        yield "ForcedEOSTokenLogitsProcessor", at(width + count - 1, lambda logits: allow_only(logits, last))
    if never := config.suppress_tokens:
        yield "SuppressTokensLogitsProcessor", lambda _, logits: forbid_tokens(logits, never)
    if not_first := config.begin_suppress_tokens:
        start = width + (width == 1 and first is not None)
        yield "SuppressTokensAtBeginLogitsProcessor", at(start, lambda logits: forbid_tokens(logits, not_first))


def _sampling_warpers(config: GenerationConfig) -> list[Processor]:
    """What shapes the distribution that is drawn from: temperature, top_k, top_p, min_p."""
    found: list[Processor] = []
    if (temperature := config.temperature) is not None and temperature != 1:
        found.append(lambda _, logits: logits / np.float32(temperature))
    limit = 50 if config.top_k is None else config.top_k
    if limit:
        found.append(lambda _, logits: top_k(logits, limit))
    if (mass := config.top_p) is not None and mass < 1:
        found.append(lambda _, logits: top_p(logits, mass))
    if (share := config.min_p) is not None:
        found.append(lambda _, logits: min_p(logits, share))
    return found


def repetition_penalty(tokens: Array, logits: Array, penalty: float) -> Array:
    """Divide positive and multiply negative logits of tokens that occurred (Keskar et al. 2019)."""
    penalised: Array = logits.copy()
    seen = logits[tokens]
    penalised[tokens] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return penalised


def no_ngram_of(history: Array, tokens: Array, logits: Array, size: int) -> Array:
    """Forbid tokens that would complete an n-gram of `size` tokens that occurs in `history`."""
    if len(history) < size or len(tokens) < size - 1:
        return logits
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    tail = tokens[len(tokens) - size + 1 :]
    return forbid_tokens(logits, windows[(windows[:, :-1] == tail).all(1), -1].tolist())


def no_bad_words(tokens: Array, logits: Array, words: Sequence[Sequence[int]]) -> Array:
    """Forbid tokens that would complete one of these sequences."""
    ends = [word[-1] for word in words if tokens[len(tokens) - len(word) + 1 :].tolist() == list(word[:-1])]
    return forbid_tokens(logits, ends)


def forbid_tokens(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid these tokens; ids outside the vocabulary never come anyway."""
    result: Array = logits.copy()
    result[[token for token in ids if 0 <= token < len(logits)]] = -np.inf
    return result


def allow_only(logits: Array, ids: Sequence[int]) -> Array:
    """Forbid all but these tokens, which become equally likely."""
    result: Array = np.full_like(logits, -np.inf)
    result[list(ids)] = 0
    return result


def top_k(logits: Array, count: int) -> Array:
    """Keep the `count` likeliest tokens, and those that tie with the last of them."""
    if count >= len(logits):
        return logits
    threshold = np.partition(logits, -count)[-count]
    return np.where(logits < threshold, -np.inf, logits)


def top_p(logits: Array, mass: float) -> Array:
    """Keep the likeliest tokens that together reach `mass` (Holtzman et al. 2020), at least one."""
    possible = np.flatnonzero(logits > -np.inf)
    order = possible[np.argsort(logits[possible], kind="stable")]
    dropped = np.cumsum(softmax(logits[order])) <= 1 - mass
    dropped[-1] = False
    result: Array = logits.copy()
    result[order[dropped]] = -np.inf
    return result


def min_p(logits: Array, share: float) -> Array:
    """Keep tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = softmax(logits)
    return np.where(probabilities < share * probabilities.max(), -np.inf, logits)
