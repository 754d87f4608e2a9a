"""transformers' tests of logits processors and stopping criteria, of ours under their names.

Ours have no classes: a setting of GenerationConfig asks for each rule, so each class here is a configuration with that
one setting. What theirs can be told besides, which no `generate()` tells them, is left to theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.generation as theirs

from precast.runtime.generation.callbacks import CallerAllowedTokens
from precast.runtime.generation.config import GenerationConfig
from precast.runtime.generation.prompt import Prompt
from precast.runtime.generation.sampling import Processors
from precast.runtime.generation.sequence import StoppingCriteria

from . import tally

Settings = Callable[..., dict[str, Any]]
_DRAWN = {"do_sample": True, "top_k": 0}


def _ids(given: Any) -> Any:
    return given.tolist() if isinstance(given, torch.Tensor) else given


PROCESSORS: dict[str, Settings] = {
    "MinLengthLogitsProcessor": lambda min_length, eos_token_id: {
        "min_length": min_length,
        "eos_token_id": _ids(eos_token_id),
    },
    "MinNewTokensLengthLogitsProcessor": lambda prompt_length_to_skip, min_new_tokens, eos_token_id: {
        "min_new_tokens": min_new_tokens,
        "eos_token_id": _ids(eos_token_id),
        "prompt": prompt_length_to_skip,
    },
    "TemperatureLogitsWarper": lambda temperature: {"temperature": temperature, **_DRAWN},
    "TopKLogitsWarper": lambda top_k: {**_DRAWN, "top_k": top_k},
    "TopPLogitsWarper": lambda top_p: {"top_p": top_p, **_DRAWN},
    "MinPLogitsWarper": lambda min_p: {"min_p": min_p, **_DRAWN},
    "RepetitionPenaltyLogitsProcessor": lambda penalty: {"repetition_penalty": penalty},
    "NoRepeatNGramLogitsProcessor": lambda ngram_size: {"no_repeat_ngram_size": ngram_size},
    "EncoderNoRepeatNGramLogitsProcessor": lambda encoder_ngram_size, encoder_input_ids: {
        "encoder_no_repeat_ngram_size": encoder_ngram_size,
        "sources": encoder_input_ids.reshape(-1, encoder_input_ids.shape[-1]).numpy(),
    },
    "NoBadWordsLogitsProcessor": lambda bad_words_ids, eos_token_id=None: {
        "bad_words_ids": bad_words_ids,
        "eos_token_id": _ids(eos_token_id),
    },
    "SequenceBiasLogitsProcessor": lambda sequence_bias: {"sequence_bias": sequence_bias},
    "EncoderRepetitionPenaltyLogitsProcessor": lambda penalty, encoder_input_ids: {
        "encoder_repetition_penalty": penalty,
        "sources": encoder_input_ids.reshape(-1, encoder_input_ids.shape[-1]).numpy(),
    },
    "PrefixConstrainedLogitsProcessor": lambda prefix_allowed_tokens_fn, num_beams: {
        "allowed": prefix_allowed_tokens_fn,
        "beams": num_beams,
    },
    "InfNanRemoveLogitsProcessor": lambda: {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": lambda exponential_decay_length_penalty, eos_token_id, input_ids_seq_length: {
        "exponential_decay_length_penalty": exponential_decay_length_penalty,
        "eos_token_id": _ids(eos_token_id),
        "prompt": input_ids_seq_length,
    },
    "TopHLogitsWarper": lambda top_h: {"top_h": top_h, **_DRAWN},
    "TypicalLogitsWarper": lambda mass: {"typical_p": mass, **_DRAWN},
    "EpsilonLogitsWarper": lambda epsilon: {"epsilon_cutoff": epsilon, **_DRAWN},
    "EtaLogitsWarper": lambda epsilon: {"eta_cutoff": epsilon, **_DRAWN},
    "ForcedBOSTokenLogitsProcessor": lambda bos_token_id: {"forced_bos_token_id": bos_token_id},
    "ForcedEOSTokenLogitsProcessor": lambda max_length, eos_token_id: {
        "max_length": max_length,
        "forced_eos_token_id": _ids(eos_token_id),
    },
    "LogitNormalization": lambda: {"num_beams": 2, "renormalize_logits": True},
    "SuppressTokensLogitsProcessor": lambda suppress_tokens: {"suppress_tokens": _ids(suppress_tokens)},
    "SuppressTokensAtBeginLogitsProcessor": lambda begin_suppress_tokens, begin_index: {
        "begin_suppress_tokens": _ids(begin_suppress_tokens),
        "prompt": begin_index,
    },
}
CRITERIA: dict[str, Settings] = {"EosTokenCriteria": lambda eos_token_id: {"eos_token_id": _ids(eos_token_id)}}


def standing_in(name: str, settings: Settings, kind: Callable[[dict[str, Any]], Any]) -> Any:
    """What is called as transformers' class `name`: ours of `kind`, or theirs where ours are not told that much."""
    original = getattr(theirs, name)

    def make(*args: Any, device: Any = None, **given: Any) -> Any:
        try:
            chosen = settings(*args, **given)
        except TypeError:
            return original(*args, **given)
        made = kind(chosen)
        made.prompt_length_to_skip = chosen.get("prompt")
        return made

    return make


class _Ours:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = dict(settings)
        prompt = self._settings.pop("prompt", None) or 1
        self._sources = self._settings.pop("sources", [None])
        allowed, self._beams = self._settings.pop("allowed", None), self._settings.pop("beams", 1)
        self._allowed = None if allowed is None else CallerAllowedTokens(allowed, torch.zeros(0))
        self._prompt = Prompt(*[np.zeros(prompt, np.int64)] * 2)
        self._config = GenerationConfig(**self._settings)
        self._config.check()


class Processor(_Ours):
    """One of our rules, for rows of tensors."""

    def __call__(self, input_ids: torch.LongTensor | None, scores: torch.FloatTensor) -> torch.FloatTensor:
        tally.reached()
        tokens_of = np.zeros((len(scores), 1), np.int64) if input_ids is None else input_ids.numpy()
        count = (self._config.max_length or 10_000) - len(self._prompt.shown)
        each, found = len(scores) // len(self._sources), []
        for row in range(0, len(scores), self._beams):
            prompt, rows = replace(self._prompt, index=row // self._beams), slice(row, row + self._beams)
            source = self._sources[row // each]
            process = Processors(self._config, prompt, count, source=source, allowed=self._allowed)
            found.append(process.together(tokens_of[rows], scores.numpy()[rows]))
        return torch.from_numpy(np.concatenate(found))


class Criterion(_Ours):
    """What ends rows, for rows of tensors."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        tally.reached()
        ends = StoppingCriteria(self._config, self._prompt, [], None)
        return torch.tensor([ends(tokens, np.zeros(0)) for tokens in input_ids.numpy()])


def pytest_configure() -> None:
    for names, kind in ((PROCESSORS, Processor), (CRITERIA, Criterion)):
        for name, settings in names.items():
            setattr(theirs, name, standing_in(name, settings, kind))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the statistics of watermarks, which are none of ours and take minutes."""
    chosen = [item for item in items if "synthid" not in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
