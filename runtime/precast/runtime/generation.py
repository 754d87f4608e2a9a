"""What `generate()` can be told, by transformers' names, with transformers' precedence and defaults."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated, Any, get_type_hints

import msgspec

from .errors import InputError
from .tensors import plain

__all__ = ["GenerationConfig"]

# As wide as the arrays that hold them.
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Word = Annotated[list[Id], msgspec.Meta(min_length=1)]
Stop = Annotated[str, msgspec.Meta(min_length=1)]

# What transformers' generation_config.json may say that asks for nothing: the value that turns it off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "_from_model_config": (True, False),
    "_attn_implementation": (None, "eager", "sdpa", "flash_attention_2"),
    "assistant_early_exit": (None,),
    "bos_token_id": (...,),
    "cache_implementation": (...,),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1, 1.0),
    "low_memory": (...,),
    "num_assistant_tokens": (...,),
    "num_assistant_tokens_schedule": (...,),
    "assistant_confidence_threshold": (...,),
    "assistant_lookbehind": (...,),
    "target_lookbehind": (...,),
    "num_beam_groups": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "penalty_alpha": (None, 0.0),
    "prefill_chunk_size": (...,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "token_healing": (None, False),
    "tokenizer": (...,),
    "top_h": (None,),
    "transformers_version": (...,),
    "typical_p": (None, 1.0),
    "use_cache": (None, True),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Names and meaning are transformers'; `seed` is ours.

    Attributes:
        max_new_tokens: at most so many; max_length counts the prompt too. With neither, 20, as in transformers.
        min_new_tokens, min_length: no end-of-sequence token before.
        do_sample: draw tokens at random; otherwise take the likeliest.
        temperature, top_k, top_p, min_p: shape the distribution that is drawn from; top_k 0 is all.
        repetition_penalty: above 1 makes tokens less likely that occurred before (Keskar et al. 2019).
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 is off.
        encoder_no_repeat_ngram_size: of encoder-decoders: nor one that occurs in the source; 0 is off.
        eos_token_id: one id or several, any of which ends a row; an empty list is none.
        pad_token_id: fills rows that ended before others; the first eos id if None.
        prompt_lookup_num_tokens: guess up to so many next tokens from what followed the last ones where they occurred
            before, and check them in one step: quicker where an answer quotes its prompt, and the same answer. 0 is
            off. A quantized model's kernels round one token otherwise than several, so there the answer may differ.
        max_matching_ngram_size: to guess, look for the last so many tokens, then for fewer; 2 if None.
        stop_strings: texts that end a row when they appear in what was generated.
        num_beams: follow so many continuations of each prompt at once and return the likeliest as a whole; 1 is off.
        num_return_sequences: rows to return per prompt: the best beams, or so many draws.
        length_penalty: with beams, a row's score is its log-probability divided by its length to this power; 1 if None.
        early_stopping: with beams, True ends a prompt when `num_beams` rows have ended, False when no running row is
            likely to beat them, "never" when none can.
        decoder_start_token_id: what an encoder-decoder's answer begins with; the first bos id if None.
        forced_bos_token_id, forced_eos_token_id: the token after the first, and the last one if a row gets that long.
        suppress_tokens, begin_suppress_tokens: ids that never come, or not first.
        bad_words_ids: sequences of ids that never come.
        output_scores: with beams, return their scores too (`return_dict_in_generate`).
        return_dict_in_generate: return `.sequences`, and with beams `.sequences_scores`, instead of an array.
        seed: makes sampling repeatable.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    stop_strings: Stop | list[Stop] | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    decoder_start_token_id: Id | None = None
    forced_bos_token_id: Id | None = None
    forced_eos_token_id: Id | list[Id] | None = None
    suppress_tokens: list[Id] | None = None
    begin_suppress_tokens: list[Id] | None = None
    bad_words_ids: list[Word] | None = None
    output_scores: bool | None = None
    return_dict_in_generate: bool | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Numpy's and torch's numbers become Python's. Raises InputError for a value of another type."""
        for name, value in self.to_diff_dict().items():
            object.__setattr__(self, name, _typed(name, value))

    @classmethod
    def of(cls, given: Any, origin: str) -> GenerationConfig:
        """From a GenerationConfig, ours or transformers', or a dict. `origin` names it in errors.

        Raises InputError for what this runtime does not do, and for a value of another type; what asks for nothing is
        passed over.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict) and not hasattr(given, "to_diff_dict"):
            raise InputError(f"{origin} must be a GenerationConfig or a dict, not {given!r:.80}.")
        raw = given if isinstance(given, dict) else given.to_diff_dict()
        known = {field.name for field in fields(cls)}
        for name, value in raw.items():
            if name not in known:
                _refuse_unless_neutral(name, plain(value), origin)
        try:
            return cls(**{name: value for name, value in raw.items() if name in known})
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None

    @classmethod
    def names(cls) -> list[str]:
        """All settings that are understood, those that only say what asks for nothing included."""
        return [*(field.name for field in fields(cls)), *_NEUTRAL]

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """This configuration, with what it leaves open taken from `base`."""
        given = self.to_diff_dict()
        # A length that the call gives is not to be undone by the other way of saying it in a file.
        if given.keys() & {"max_new_tokens", "max_length"}:
            base = replace(base, max_new_tokens=None, max_length=None)
        if given.keys() & {"min_new_tokens", "min_length"}:
            base = replace(base, min_new_tokens=None, min_length=None)
        return replace(base, **given)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is set, as transformers' configuration of this name says it."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def check(self) -> None:
        """Raise one InputError that lists every value out of range."""
        if holes := list(self._holes()):
            raise InputError(" ".join(holes))

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens to generate after a prompt of this (padded) length."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 20
        if self.max_length <= prompt_length:
            raise InputError(
                f"max_length is {self.max_length}, the prompt alone has {prompt_length} tokens. Give max_new_tokens "
                f"instead."
            )
        return self.max_length - prompt_length

    @property
    def eos_ids(self) -> list[int]:
        """All end-of-sequence ids, as a list."""
        return _as_list(self.eos_token_id)

    @property
    def last_ids(self) -> list[int]:
        """The ids of which one is forced to be the last, as a list."""
        return _as_list(self.forced_eos_token_id)

    @property
    def beams(self) -> int:
        """Rows per prompt that are followed at once."""
        return self.num_beams or 1

    @property
    def stops(self) -> list[str]:
        """All stop strings, as a list."""
        stops = self.stop_strings
        return [] if stops is None else [stops] if isinstance(stops, str) else list(stops)

    def _holes(self) -> Iterator[str]:
        at_least = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "top_k": 0,
                    "no_repeat_ngram_size": 0, "prompt_lookup_num_tokens": 0, "max_matching_ngram_size": 1, "seed": 0,
                    "num_beams": 1, "num_return_sequences": 1, "encoder_no_repeat_ngram_size": 0}  # fmt: skip
        for name, low in at_least.items():
            if (value := getattr(self, name)) is not None and value < low:
                yield f"{name} must be a whole number of at least {low}, not {value!r}."
        for name in ("temperature", "repetition_penalty"):
            if (value := getattr(self, name)) is not None and not value >= _SMALLEST:
                limit = "above 0" if not value > 0 else f"at least {_SMALLEST}"
                hint = " For the likeliest token each time, use do_sample=False." if name == "temperature" else ""
                yield f"{name} must be {limit}, not {value!r}.{hint}"
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                yield f"{name} must lie between 0 and 1, not {value!r}."
        if (power := self.length_penalty) is not None and not abs(power) <= _STEEPEST:
            yield f"length_penalty must lie between -{_STEEPEST} and {_STEEPEST}, not {power!r}."
        if self.early_stopping not in (None, True, False, "never"):
            yield f"early_stopping must be True, False or 'never', not {self.early_stopping!r}."
        yield from self._beam_holes() if self.beams > 1 else self._rows_holes()

    def _beam_holes(self) -> Iterator[str]:
        """What does not go together with beams, as far as the runtime does it."""
        asked = f"num_beams={self.num_beams}"
        if self.do_sample:
            yield f"{asked} with do_sample=True, sampling beams, is not done here; pass do_sample=False or num_beams=1."
        if self.prompt_lookup_num_tokens:
            yield f"{asked} leaves no room for prompt_lookup_num_tokens={self.prompt_lookup_num_tokens}; pass one only."
        if (count := self.num_return_sequences or 1) > self.beams:
            yield f"num_return_sequences={count} is more than {asked}, and each returned row is a beam."

    def _rows_holes(self) -> Iterator[str]:
        if (self.num_return_sequences or 1) > 1 and not self.do_sample:
            yield (
                f"num_return_sequences={self.num_return_sequences} would return equal rows: the likeliest token each "
                f"time is always the same. Pass do_sample=True, or num_beams={self.num_return_sequences}."
            )
        if self.output_scores:
            yield "output_scores=True is done with num_beams above 1 only; pass output_scores=False to go without."


_SMALLEST = 1e-30
"""What logits are divided by: less would make them infinite in float32."""
_STEEPEST = 20
"""The power of a length; a higher one is infinite in float32."""


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(GenerationConfig, include_extras=True)


def _typed(name: str, value: Any) -> Any:
    given = plain(value)
    try:
        return msgspec.convert(given, _types()[name])
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InputError(f"{name}={given!r:.80} is of the wrong type or size: {error}.") from None


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _refuse_unless_neutral(name: str, value: Any, origin: str) -> None:
    if name not in _NEUTRAL:
        choices = [field.name for field in fields(GenerationConfig)]
        hint = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, choices, n=1))
        raise InputError(
            f"{origin} has {name!r}, which generate() does not know.{hint} It takes: {', '.join(choices)}."
        )
    if ... not in _NEUTRAL[name] and value not in _NEUTRAL[name]:
        raise InputError(
            f"{origin} asks for {name}={value!r}, which this runtime does not do. Pass {name}="
            f"{_NEUTRAL[name][-1]!r} to go without."
        )
