"""Logits -> next token. Formulas are those of transformers' logits processors, applied in its order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, PrecastError
from . import warpers
from .callbacks import CallerAllowedTokens, CallerProcessor
from .config import GenerationConfig
from .probabilities import log_softmax, softmax
from .processors import (
    allow_only,
    decay_length,
    forbid_tokens,
    frequency_penalties,
    no_bad_words,
    no_ngram_of,
    repetition_penalty,
    replace_invalid,
    sequence_bias,
    token_bias,
)
from .prompt import Prompt

if TYPE_CHECKING:
    from ..structured.grammar import RowGrammar

__all__ = ["Processors", "Sampler", "check_choice", "check_logits", "draw_seed"]

Array = np.ndarray[Any, Any]
Processor = Callable[[Array, Array], Array]


class Processors:
    """All logits processors of one prompt's rows: a row's tokens so far, int64 [length], and logits or
    log-probabilities [vocabulary] -> the same, changed.

    `count` new tokens continue the prompt by the settings, and the last may be forced; `source` are the tokens that an
    encoder-decoder answers, or a decoder's prompt; `rules` are the model's own, before the caller's. Of transformers'
    classes among the caller's own processors, the first of a kind replaces the one that the configuration asks for, as
    there; the others follow.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt: Prompt,
        count: int,
        extra: Sequence[CallerProcessor] = (),
        source: Array | None = None,
        allowed: CallerAllowedTokens | None = None,
        form: RowGrammar | None = None,
        rules: Sequence[Processor] = (),
    ) -> None:
        constraints = [*_constraints(prompt, allowed, form)]
        own = [*_configured_processors(config, prompt, count, source, constraints)]
        instead = {each.kind: each for each in reversed(extra) if each.kind in dict(own)}
        others = [each for each in extra if each not in instead.values()]
        steps: list[Processor] = [*(instead.get(kind, step) for kind, step in own), *rules, *others]
        self._steps = [_see_padding(step, prompt) if isinstance(step, CallerProcessor) else step for step in steps]
        if config.do_sample:
            self._steps += _warpers(config)
        if config.renormalize_logits and (config.beams > 1 or config.output_scores):
            # Alone, a row is chosen alike from logits and from their log-probabilities.
            self._steps.append(lambda _, logits: log_softmax(logits))

    def __call__(self, tokens: Array, logits: Array) -> Array:
        if self._steps:
            logits = logits.astype(np.float32)
            for process in self._steps:
                logits = process(tokens, logits)
        return logits

    def together(self, rows: Array, logits: Array) -> Array:
        """The same for all beams of the prompt: rows [beams, length] and log-probabilities [beams, vocabulary]."""
        for process in self._steps:
            if isinstance(process, _AllowedTokens):
                logits = process.together(rows, logits)
            else:
                logits = np.stack([process(row, values) for row, values in zip(rows, logits, strict=True)])
        return logits


class _AllowedTokens:
    """Forbids the tokens that the caller's function does not allow, as transformers' prefix_allowed_tokens_fn."""

    def __init__(self, function: CallerAllowedTokens, prompt: Prompt) -> None:
        self._function, self._prompt = function, prompt

    def __call__(self, tokens: Array, logits: Array) -> Array:
        found: Array = self.together(tokens[None], logits[None])[0]
        return found

    def together(self, rows: Array, logits: Array) -> Array:
        """For all beams of a prompt: where none of them has a token left, the allowed ones are equally likely."""
        mask: Array = np.full_like(logits, -np.inf)
        for row, kept in zip(rows, mask, strict=True):
            kept[self._function(self._prompt.index, self._prompt.show(row), logits.shape[1])] = 0
        found: Array = logits + mask
        return mask if found.max() == -np.inf else found


class Sampler:
    """Chooses the next token of one row: `process` makes scores of its logits, `pick` takes a token.

    `generator` draws; without one the likeliest token is taken.
    """

    def __init__(self, process: Processors, generator: np.random.Generator | None) -> None:
        self.process, self._generator = process, generator

    def pick(self, scores: Array) -> int:
        """A token's id, by its scores [vocabulary]."""
        likeliest = int(scores.argmax())
        check_choice(scores[likeliest])
        return likeliest if self._generator is None else _draw_token(self._generator, scores)


def check_logits(logits: Array, step: int) -> None:
    """Raise PrecastError where the logits of a row's `step`th new token hold NaN."""
    if np.isnan(logits.max()):
        raise PrecastError(
            f"The model's logits for new token {step} hold NaN, so no token is the likeliest: some number in it is too "
            f"large for its precision. Export it with dtype='float32', or ask it something else."
        )


def check_choice(best: Any) -> None:
    """Raise InputError where the best of logits or scores is -inf: every token is ruled out."""
    if best == -np.inf:
        raise InputError(
            "No token may come next: suppress_tokens, bad_words_ids, no_repeat_ngram_size, logits_processor, "
            "prefix_allowed_tokens_fn and the form of the answer together rule out all. Leave one of them out."
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
    config: GenerationConfig,
    prompt: Prompt,
    count: int,
    source: Array | None,
    constraints: Sequence[tuple[str, Processor]],
) -> Iterator[tuple[str, Processor]]:
    """The processors that the configuration asks for, each with the name of transformers' class that does it."""
    yield from _biases(config)
    yield from _penalties(config, prompt, source)
    if words := [word for word in config.bad_words_ids or () if word not in [[end] for end in config.eos_ids]]:
        yield "NoBadWordsLogitsProcessor", lambda tokens, logits: no_bad_words(tokens, logits, words)
    yield from _length_minimums(config, prompt)
    yield from constraints
    yield from _fixed_tokens(config, prompt, count)


def _constraints(
    prompt: Prompt, allowed: CallerAllowedTokens | None, form: RowGrammar | None
) -> Iterator[tuple[str, Processor]]:
    """What says which tokens may come next."""
    if allowed is not None:
        yield "PrefixConstrainedLogitsProcessor", _AllowedTokens(allowed, prompt)
    if form is not None:
        yield "form", form.apply


def _biases(config: GenerationConfig) -> Iterator[tuple[str, Processor]]:
    """What is added to the logits of tokens."""
    if biases := config.sequence_bias:
        yield "SequenceBiasLogitsProcessor", lambda tokens, logits: sequence_bias(tokens, logits, biases)
    if bias := config.logit_bias:
        yield "logit_bias", lambda _, logits: token_bias(logits, bias)


def _penalties(config: GenerationConfig, prompt: Prompt, source: Array | None) -> Iterator[tuple[str, Processor]]:
    """What makes tokens more or less likely that occurred before."""
    if source is not None and (reward := config.encoder_repetition_penalty) is not None and reward != 1:
        yield (
            "EncoderRepetitionPenaltyLogitsProcessor",
            lambda _, logits: repetition_penalty(source, logits, 1 / reward),
        )
    if (penalty := config.repetition_penalty) is not None and penalty != 1:
        yield "RepetitionPenaltyLogitsProcessor", lambda tokens, logits: repetition_penalty(tokens, logits, penalty)
    presence, frequency, start = config.presence_penalty or 0, config.frequency_penalty or 0, len(prompt.tokens)
    if presence or frequency:
        yield "frequency_penalty", lambda row, logits: frequency_penalties(row[start:], logits, presence, frequency)
    if size := config.no_repeat_ngram_size:
        yield "NoRepeatNGramLogitsProcessor", lambda tokens, logits: no_ngram_of(tokens, tokens, logits, size)
    if source is not None and (part := config.encoder_no_repeat_ngram_size):
        yield "EncoderNoRepeatNGramLogitsProcessor", lambda tokens, logits: no_ngram_of(source, tokens, logits, part)


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
    if config.remove_invalid_values:
        yield "InfNanRemoveLogitsProcessor", lambda _, logits: replace_invalid(logits)
    if (decay := config.exponential_decay_length_penalty) is not None:
        yield "ExponentialDecayLengthPenalty", _decay(*decay, config.eos_ids, len(prompt.tokens))
    if never := config.suppress_tokens:
        yield "SuppressTokensLogitsProcessor", lambda _, logits: forbid_tokens(logits, never)
    if not_first := config.begin_suppress_tokens:
        start = width + (width == 1 and first is not None)
        yield "SuppressTokensAtBeginLogitsProcessor", at(start, lambda logits: forbid_tokens(logits, not_first))


def _decay(start: int, factor: float, ends: Sequence[int], length: int) -> Processor:
    def step(tokens: Array, logits: Array) -> Array:
        late, known = len(tokens) - length - start, [end for end in ends if 0 <= end < len(logits)]
        return decay_length(logits, known, factor, late) if late > 0 else logits

    return step


def _warpers(config: GenerationConfig) -> list[Processor]:
    """What shapes the distribution that is drawn from, in transformers' order."""
    # A search goes on with something that is no end.
    least = 1 if config.beams == 1 else 1 + max(1, len(config.eos_ids))
    temperature = config.temperature
    found: list[Processor] = []
    if temperature is not None and temperature != 1:
        found.append(lambda _, logits: logits / np.float32(temperature))
    if (entropy := config.top_h) is not None:
        found.append(lambda _, logits: warpers.top_h(logits, entropy))
    limit = 50 if config.top_k is None else config.top_k
    if limit:
        found.append(lambda _, logits: warpers.top_k(logits, limit, least))
    if (mass := config.top_p) is not None and mass < 1:
        found.append(lambda _, logits: warpers.top_p(logits, mass, least))
    if (share := config.min_p) is not None:
        found.append(lambda _, logits: warpers.min_p(logits, share, least))
    return found + _rare_warpers(config, least)


def _rare_warpers(config: GenerationConfig, least: int) -> list[Processor]:
    found: list[Processor] = []
    if (mass := config.typical_p) is not None and mass < 1:
        found.append(lambda _, logits: warpers.typical_p(logits, mass, least))
    if (epsilon := config.epsilon_cutoff or 0) > 0:
        found.append(lambda _, logits: warpers.epsilon_cutoff(logits, epsilon, least))
    if (eta := config.eta_cutoff or 0) > 0:
        found.append(lambda _, logits: warpers.eta_cutoff(logits, eta, least))
    return found
