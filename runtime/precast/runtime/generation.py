"""What `generate()` can be told, by transformers' names, with transformers' precedence and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import InputError

__all__ = ["GenerationConfig"]

# What transformers' generation_config.json may say that asks for nothing: the value that turns it off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "_from_model_config": (True, False),
    "_attn_implementation": (None, "eager", "sdpa", "flash_attention_2"),
    "assistant_early_exit": (None,),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "bos_token_id": (...,),
    "cache_implementation": (...,),
    "constraints": (None,),
    "decoder_start_token_id": (...,),
    "diversity_penalty": (None, 0.0),
    "early_stopping": (...,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "length_penalty": (...,),
    "low_memory": (...,),
    "num_assistant_tokens": (...,),
    "num_assistant_tokens_schedule": (...,),
    "assistant_confidence_threshold": (...,),
    "assistant_lookbehind": (...,),
    "target_lookbehind": (...,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "penalty_alpha": (None, 0.0),
    "prefill_chunk_size": (...,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "return_dict_in_generate": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "token_healing": (None, False),
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
        eos_token_id: one id or several, any of which ends a row; an empty list is none.
        pad_token_id: fills rows that ended before others; the first eos id if None.
        prompt_lookup_num_tokens: guess up to so many next tokens from what followed the last ones where they occurred
            before, and check them in one step: quicker where an answer quotes its prompt, and the same answer. 0 is
            off. A quantized model's kernels round one token otherwise than several, so there the answer may differ.
        max_matching_ngram_size: to guess, look for the last so many tokens, then for fewer; 2 if None.
        stop_strings: texts that end a row when they appear in what was generated.
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
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    stop_strings: str | list[str] | None = None
    seed: int | None = None

    @classmethod
    def of(cls, given: Any, origin: str) -> GenerationConfig:
        """From a GenerationConfig, ours or transformers', or a dict. `origin` names it in errors.

        Raises InputError for what this runtime does not do; what asks for nothing is passed over.
        """
        if isinstance(given, cls):
            return given
        raw = given if isinstance(given, dict) else given.to_diff_dict()
        known = {field.name for field in fields(cls)}
        for name, value in raw.items():
            if name not in known:
                _refuse_unless_neutral(name, value, origin)
        return cls(**{name: value for name, value in raw.items() if name in known})

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """This configuration, with what it leaves open taken from `base`."""
        given = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        # A length that the call gives is not to be undone by the other way of saying it in a file.
        if given.keys() & {"max_new_tokens", "max_length"}:
            base = replace(base, max_new_tokens=None, max_length=None)
        if given.keys() & {"min_new_tokens", "min_length"}:
            base = replace(base, min_new_tokens=None, min_length=None)
        return replace(base, **given)

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
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @property
    def stops(self) -> list[str]:
        """All stop strings, as a list."""
        stops = self.stop_strings
        return [] if stops is None else [stops] if isinstance(stops, str) else list(stops)

    def _holes(self) -> Iterator[str]:
        at_least = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "top_k": 0,
                    "no_repeat_ngram_size": 0, "prompt_lookup_num_tokens": 0, "max_matching_ngram_size": 1}  # fmt: skip
        for name, low in at_least.items():
            if (value := getattr(self, name)) is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < low
            ):
                yield f"{name} must be a whole number of at least {low}, not {value!r}."
        for name in ("temperature", "repetition_penalty"):
            if (value := getattr(self, name)) is not None and not value > 0:
                hint = " For the likeliest token each time, use do_sample=False." if name == "temperature" else ""
                yield f"{name} must be above 0, not {value!r}.{hint}"
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                yield f"{name} must lie between 0 and 1, not {value!r}."


def _refuse_unless_neutral(name: str, value: Any, origin: str) -> None:
    if name not in _NEUTRAL:
        choices = ", ".join(field.name for field in fields(GenerationConfig))
        raise InputError(f"{origin} has {name!r}, which generate() does not know. It takes: {choices}.")
    if ... not in _NEUTRAL[name] and value not in _NEUTRAL[name]:
        raise InputError(
            f"{origin} asks for {name}={value!r}, which this runtime does not do. Pass {name}="
            f"{_NEUTRAL[name][-1]!r} to go without."
        )
