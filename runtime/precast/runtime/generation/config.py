"""The settings of `generate()`, with transformers' names, precedence and defaults."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import chain
from math import inf, isfinite
from typing import Annotated, Any, get_type_hints

import msgspec

from ..errors import InputError
from ..inputs.tensors import to_python
from ..structured.structure import STRUCTURES, Structure, find_structure
from .unsupported import HARMLESS, SPEECH, UNSUPPORTED, find_unsupported

__all__ = ["GenerationConfig", "default_new_tokens"]

_KEPT_APART = UNSUPPORTED | SPEECH.keys()
"""Settings that a configuration keeps in `unsupported`."""

# As wide as the arrays that hold them.
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Word = Annotated[list[Id], msgspec.Meta(min_length=1)]
Stop = Annotated[str, msgspec.Meta(min_length=1)]


@dataclass
class GenerationConfig:
    """How to continue a prompt. Names and meaning are transformers'; `seed` is ours.

    Attributes may be set, as in transformers; one that there is not, or a value of another type, is an InputError.

    Attributes:
        max_new_tokens: at most so many; max_length counts the prompt too, with its padding. With neither, 20, as in
            transformers.
        min_new_tokens, min_length: no end-of-sequence token before; counted alike.
        do_sample: draw tokens at random; otherwise take the likeliest.
        temperature, top_k, top_p, min_p: shape the distribution that is drawn from; top_k 0 is all.
        repetition_penalty: above 1 makes tokens less likely that occurred before (Keskar et al. 2019).
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 is off.
        encoder_no_repeat_ngram_size: of encoder-decoders: nor one that occurs in the source; 0 is off.
        bos_token_id: what an answer to no prompt at all begins with.
        eos_token_id: one id or several, any of which ends a row; an empty list is none.
        pad_token_id: fills rows that ended before others; the first eos id if None.
        prompt_lookup_num_tokens: guess up to so many next tokens from what followed the last ones where they occurred
            before, and check them in one step: quicker where an answer quotes its prompt, and the same answer. 0 is
            off. A quantized model's kernels round one token otherwise than several, so there the answer may differ.
        max_matching_ngram_size: to guess, look for the last so many tokens, then for fewer; 2 if None.
        stop_strings: texts that end a row when a token completes them; special tokens count, and what precedes it.
        num_beams: follow so many continuations of each prompt at once and return the likeliest as a whole; 1 is off.
        num_return_sequences: rows to return per prompt: the best beams, or so many draws.
        length_penalty: with beams, a row's score is its log-probability divided by its length to this power; 1 if None.
        early_stopping: with beams, True ends a prompt when `num_beams` rows have ended, False when no running row is
            likely to beat them, "never" when none can.
        decoder_start_token_id: what an encoder-decoder's answer begins with; the first bos id if None.
        forced_bos_token_id, forced_eos_token_id: the token after the first, and the last one if a row gets that long.
        suppress_tokens, begin_suppress_tokens: ids that never come, or not first.
        bad_words_ids: sequences of ids that never come.
        sequence_bias: numbers to add to the logits of tokens that would complete sequences: [[ids], number] for each.
        logit_bias: numbers to add to the logits of tokens, by id, as in OpenAI's API: -100 to 100.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that were generated, the second as
            often as they were, as in OpenAI's API: -2 to 2.
        encoder_repetition_penalty: above 1 makes tokens of the source, or of a decoder's prompt, likelier.
        exponential_decay_length_penalty: (start, factor): after so many new tokens an end is ever likelier.
        remove_invalid_values: go on where logits are no numbers, as if they were 0, instead of an error.
        guidance_scale: above 1 moves an answer away from what the model would say without the prompt, or after
            `negative_prompt_ids` (Sanchez et al. 2023); takes twice the time and caches. 1 is off.
        typical_p, epsilon_cutoff, eta_cutoff, top_h: shape the distribution that is drawn from, too.
        num_assistant_tokens: an `assistant_model` guesses at most so many tokens at once; 16 if None.
        max_time: seconds after the call at which rows end with the token that they are at.
        output_scores, output_logits: return the logits of each step too, after and before they are changed, and with
            beams the rows' own scores, where `return_dict_in_generate` is set.
        response_format: the form of an answer as in OpenAI's API, such as {"type": "json_object"}.
        json_schema: a JSON schema that an answer keeps to: a dict, JSON text or a class of pydantic.
        regex: a pattern that the whole answer matches, in Rust's syntax, without look-around; \\d is 0 to 9.
        grammar: a grammar that an answer keeps to, in Lark's form or llama.cpp's (GBNF).
        choices: texts of which an answer is one. Of these five, at most one; they need `precast[structured]`.
        logprobs, top_logprobs: return the log-probability of each new token by the model's own logits, and so many of
            the likeliest ones, as in OpenAI's API; the answer is an output then, as by `return_dict_in_generate`.
        return_dict_in_generate: return an output with `.sequences`, and what else is asked for, instead of an array.
        renormalize_logits: scores are log-probabilities again after everything that changes logits.
        seed: makes sampling repeatable; a list has one for each prompt, which is then answered as alone with that
            seed, whatever stands beside it. If None it is drawn from torch's default generator where torch is imported
            and was seeded, otherwise from numpy's.
        unsupported: settings of transformers that this runtime does not have, by name. A call that they would change
            is refused; others go on. Among them are those of Whisper alone, which reads them: language, task, …
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
    bos_token_id: Id | None = None
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
    sequence_bias: Annotated[list[tuple[Word, float]], msgspec.Meta(min_length=1)] | None = None
    logit_bias: dict[Id, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool | None = None
    guidance_scale: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_h: float | None = None
    num_assistant_tokens: int | None = None
    response_format: Any = None
    json_schema: Any = None
    regex: Any = None
    grammar: Any = None
    choices: Any = None
    max_time: float | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_dict_in_generate: bool | None = None
    renormalize_logits: bool | None = None
    seed: int | list[int] | None = None
    unsupported: dict[str, Any] = field(default_factory=dict)

    def __setattr__(self, name: str, value: Any) -> None:
        """Numpy's and torch's numbers become Python's. Raises InputError for an unknown name, or a value of another
        type."""
        name = _ALIASES.get(name, name)
        if name in _KEPT_APART:
            self.unsupported[name] = to_python(value)
            return
        if name in self.settings():
            value = _convert_setting(name, value)
        elif name != "unsupported":
            _refuse_unknown(name, "A GenerationConfig is given")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Settings that transformers' configuration has and this one lacks: as given, or None."""
        if name in HARMLESS or name in _KEPT_APART:
            return self.unsupported.get(name)
        raise AttributeError(f"A GenerationConfig has no {name!r}. It has: {', '.join(self.settings())}.")

    @classmethod
    def of(cls, given: Any, origin: str) -> GenerationConfig:
        """Make one of a GenerationConfig, ours or transformers', or of a dict. `origin` names it in errors.

        Raises InputError for a name that a dict gives a value and that is none of transformers', and for a value of
        another type. Transformers' own configurations may hold whatever a file said, as `published` reads it.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict) and not hasattr(given, "to_diff_dict"):
            raise InputError(f"{origin} must be a GenerationConfig or a dict, not {given!r:.80}.")
        raw = _without_aliases(given, origin) if isinstance(given, dict) else given.to_diff_dict()
        if isinstance(given, dict):
            for name, value in raw.items():
                if value is not None:
                    _refuse_unknown(name, f"{origin} has")
        return cls._of_known(raw, origin)

    @classmethod
    def published(cls, raw: Mapping[str, Any], origin: str) -> GenerationConfig:
        """Make one of the content of a generation_config.json, as transformers reads it: unknown names are ignored, and
        so is the form of answers, which is the caller's. Raises InputError for a value of another type."""
        return cls._of_known({name: value for name, value in raw.items() if name not in STRUCTURES}, origin)

    @classmethod
    def _of_known(cls, raw: Mapping[str, Any], origin: str) -> GenerationConfig:
        known = cls.settings()
        others = {name: to_python(value) for name, value in raw.items() if name in _KEPT_APART}
        try:
            return cls(**{name: value for name, value in raw.items() if name in known}, unsupported=others)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None

    @classmethod
    @cache
    def settings(cls) -> tuple[str, ...]:
        """The names of all settings that this runtime has."""
        return tuple(each.name for each in fields(cls) if each.name != "unsupported")

    @classmethod
    def names(cls) -> list[str]:
        """All settings that are understood, those that change nothing or are refused included."""
        return [*cls.settings(), *_ALIASES, *sorted(HARMLESS | UNSUPPORTED)]

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """This configuration, with what it leaves open taken from `base`."""
        given = self.to_diff_dict()
        if given.keys() & STRUCTURES.keys():
            # One form at a time: the call's.
            base = replace(base, **_NO_STRUCTURE)
        # A length that the call gives is not to be undone by the other way of saying it in a file.
        if given.keys() & {"max_new_tokens", "max_length"}:
            base = replace(base, max_new_tokens=None, max_length=None)
        if given.keys() & {"min_new_tokens", "min_length"}:
            base = replace(base, min_new_tokens=None, min_length=None)
        return replace(base, **given, unsupported={**base.unsupported, **self.unsupported})

    def without(self, names: Iterable[str]) -> GenerationConfig:
        """This configuration with the settings `names` off, which is what None means in a call."""
        off: dict[str, Any] = {name: 0 if name == "top_k" else None for name in names if name in self.settings()}
        return replace(
            self, **off, unsupported={name: self.unsupported[name] for name in {*self.unsupported} - {*names}}
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that are not None, by name; transformers' configurations have a method of this name."""
        return {name: value for name in self.settings() if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Raise one InputError that lists every value out of range."""
        if problems := list(self._find_problems()):
            raise InputError(" ".join(problems))

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

    def ids_of(self, name: str) -> list[int]:
        """All token ids in the setting of this name, as a list."""
        held = [] if getattr(self, name) is None else getattr(self, name)
        if name == "sequence_bias":
            held = [ids for ids, _ in held]
        if name == "logit_bias":
            return list(held)
        return [*chain.from_iterable(held)] if name in ("bad_words_ids", "sequence_bias") else _as_list(held)

    @property
    def structure(self) -> Structure | None:
        """The form that an answer has to have. Raises InputError."""
        return find_structure({name: getattr(self, name) for name in STRUCTURES})

    @property
    def returns_logprobs(self) -> bool:
        """Whether log-probabilities of new tokens are returned."""
        return bool(self.logprobs or self.top_logprobs)

    @property
    def returns_outputs(self) -> bool:
        """Whether an answer is an output with names, not an array."""
        return bool(self.return_dict_in_generate) or self.returns_logprobs

    @property
    def returns_steps(self) -> bool:
        """Whether something is returned of each step."""
        return self.returns_logprobs or bool(
            self.return_dict_in_generate and (self.output_scores or self.output_logits)
        )

    @property
    def guides(self) -> bool:
        """Whether answers are moved away from those without the prompt."""
        return self.guidance_scale not in (None, 1)

    @property
    def beams(self) -> int:
        """The number of beams; 1 is no beam search."""
        return self.num_beams or 1

    @property
    def stops(self) -> list[str]:
        """All stop strings, as a list."""
        stops = self.stop_strings
        return [] if stops is None else [stops] if isinstance(stops, str) else list(stops)

    def _find_problems(self) -> Iterator[str]:
        yield from self._minimum_problems(_MINIMUM)
        yield from self._positive_problems("repetition_penalty")
        yield from self._positive_problems("encoder_repetition_penalty")
        yield from self._bias_problems()
        yield from self._structure_problems()
        if self.guidance_scale is not None and not isfinite(self.guidance_scale):
            yield f"guidance_scale must be a number, not {self.guidance_scale!r}."
        if (seconds := self.max_time) is not None and not seconds > 0:
            yield f"max_time must be above 0 seconds, not {seconds!r}."
        if self.guides and self.prompt_lookup_num_tokens:
            yield f"guidance_scale={self.guidance_scale} does not go together with guesses of prompt_lookup_num_tokens."
        if self.do_sample:
            yield from self._sampling_problems()
        yield from self._beam_problems() if self.beams > 1 else self._return_problems()
        yield from find_unsupported(
            self.unsupported,
            beams=self.beams,
            samples=bool(self.do_sample),
            returns_outputs=self.returns_outputs,
        )

    def _minimum_problems(self, limits: Mapping[str, int]) -> Iterator[str]:
        for name, low in limits.items():
            value = getattr(self, name)
            if value is not None and min(_as_list(value), default=low) < low:
                yield f"{name} must be a whole number of at least {low}, not {value!r}."

    def _positive_problems(self, name: str, hint: str = "") -> Iterator[str]:
        if (value := getattr(self, name)) is not None and not value >= _SMALLEST_DIVISOR:
            limit = "above 0" if not value > 0 else f"at least {_SMALLEST_DIVISOR}"
            yield f"{name} must be {limit}, not {value!r}.{hint}"

    def _range_problems(self, low: float, high: float, *names: str) -> Iterator[str]:
        for name in names:
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                yield f"{name} must lie between {low} and {high}, not {value!r}."

    def _bias_problems(self) -> Iterator[str]:
        """Check what is added to logits."""
        yield from self._range_problems(-2, 2, "presence_penalty", "frequency_penalty")
        for token, value in (self.logit_bias or {}).items():
            if not -_MAX_BIAS <= value <= _MAX_BIAS:
                yield f"logit_bias must lie between -{_MAX_BIAS} and {_MAX_BIAS}; of token {token} it is {value!r}."
        if not all(value < inf for _, value in self.sequence_bias or ()):
            yield f"sequence_bias holds what is no number to add: {self.sequence_bias!r:.80}."
        if (decay := self.exponential_decay_length_penalty) is not None:
            if decay[0] < 0 or not 0 < decay[1] <= _MOST_DECAY:
                yield f"exponential_decay_length_penalty must be (0 or more, above 0 to {_MOST_DECAY}), not {decay!r}."
            if not self.eos_ids:
                yield "exponential_decay_length_penalty makes ends likelier, and there is no eos_token_id; pass one."

    def _structure_problems(self) -> Iterator[str]:
        """Check the form that is asked for, and what does not go together with one."""
        try:
            structure = self.structure
        except InputError as error:
            yield str(error)
            return
        if structure is None:
            return
        if self.beams > 1:
            yield f"num_beams={self.num_beams} is not done for answers of a given form; pass num_beams=1."
        if foreign := [token for token in self.last_ids if token not in self.eos_ids]:
            yield (
                f"forced_eos_token_id={foreign[0]} is none of eos_token_id, so the longest answers would end with a "
                f"token that {structure.name} does not have. Pass forced_eos_token_id=None."
            )

    def _sampling_problems(self) -> Iterator[str]:
        """Check the settings that only sampling reads."""
        yield from self._positive_problems("temperature", " For the likeliest token each time, use do_sample=False.")
        yield from self._range_problems(0, 1, "top_p", "min_p", "epsilon_cutoff", "eta_cutoff")
        for name in ("top_h", "typical_p"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                yield f"{name} must be above 0 and at most 1, not {value!r}."
        if self.top_k is not None and self.top_k < 0:
            yield f"top_k must be a whole number of at least 0, not {self.top_k}. To draw from all tokens, use top_k=0."

    def _beam_problems(self) -> Iterator[str]:
        """Check the settings of beam search, and those that do not go together with it."""
        asked = f"num_beams={self.num_beams}"
        if (power := self.length_penalty) is not None and not abs(power) <= _MAX_LENGTH_PENALTY:
            yield f"length_penalty must lie between -{_MAX_LENGTH_PENALTY} and {_MAX_LENGTH_PENALTY}, not {power!r}."
        if self.early_stopping not in (None, True, False, "never"):
            yield f"early_stopping must be True, False or 'never', not {self.early_stopping!r}."
        if self.guides:
            yield f"{asked} does not go together with guidance_scale={self.guidance_scale}; pass one of them only."
        if self.returns_logprobs:
            yield f"{asked} has no logprobs; pass output_scores=True and return_dict_in_generate=True instead."
        if self.prompt_lookup_num_tokens:
            yield f"{asked} leaves no room for prompt_lookup_num_tokens={self.prompt_lookup_num_tokens}; pass one only."
        if (count := self.num_return_sequences or 1) > self.beams:
            yield f"num_return_sequences={count} is more than {asked}, and each returned row is a beam."

    def _return_problems(self) -> Iterator[str]:
        if (self.num_return_sequences or 1) > 1 and not self.do_sample:
            yield (
                f"num_return_sequences={self.num_return_sequences} would return equal rows: the likeliest token each "
                f"time is always the same. Pass do_sample=True, or num_beams={self.num_return_sequences}."
            )


_MINIMUM = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "no_repeat_ngram_size": 0,
             "prompt_lookup_num_tokens": 0, "max_matching_ngram_size": 1, "seed": 0, "num_beams": 1,
             "num_return_sequences": 1, "encoder_no_repeat_ngram_size": 0, "num_assistant_tokens": 1,
             "top_logprobs": 0}  # fmt: skip
_SMALLEST_DIVISOR = 1e-30
"""Logits are divided by it: anything smaller would make them infinite in float32."""
_MAX_LENGTH_PENALTY = 20
"""The exponent of a row's length: a higher power is infinite in float32."""


_NO_STRUCTURE: dict[str, Any] = dict.fromkeys(STRUCTURES)
_MAX_BIAS, _MOST_DECAY = 100, 1e6
_ALIASES = {"n": "num_return_sequences", "stop": "stop_strings"}
"""OpenAI's names of settings that transformers has, too."""


def default_new_tokens(room: int) -> int:
    """How many new tokens are asked for where nobody says it, by the places that a cache has left: what fits, up to
    256."""
    return max(1, min(256, room))


def _without_aliases(given: dict[str, Any], origin: str) -> dict[str, Any]:
    """Settings by their names here. Raises InputError for two names of the same."""
    for alias, name in _ALIASES.items():
        if given.get(alias) is not None and given.get(name) is not None:
            raise InputError(f"{origin} has {alias!r} and {name!r}, which are two names of the same; pass one of them.")
    renamed = {_ALIASES.get(name, name): value for name, value in given.items() if value is not None}
    return {**{name: value for name, value in given.items() if name not in _ALIASES}, **renamed}


@cache
def _setting_types() -> dict[str, Any]:
    return get_type_hints(GenerationConfig, include_extras=True)


def _convert_setting(name: str, value: Any) -> Any:
    """A setting's value as the type of its field. Raises InputError."""
    given = to_python(value)
    if name == "sequence_bias" and isinstance(given, dict):
        given = _as_pairs(given)
    elif name == "logit_bias" and isinstance(given, dict):
        given = {_as_id(key): held for key, held in given.items()}
    try:
        return msgspec.convert(given, _setting_types()[name])
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InputError(f"{name}={given!r:.80} is of the wrong type or size: {error}.") from None


def _as_pairs(biases: dict[Any, Any]) -> list[Any]:
    """A sequence_bias that is a dict, as transformers' own examples have it."""
    return [[to_python(ids), to_python(value)] for ids, value in biases.items()]


def _as_id(key: Any) -> Any:
    """A token id that JSON made a text of."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _refuse_unknown(name: str, has: str) -> None:
    """Raise InputError for a name that is no setting of transformers or ours."""
    if name not in GenerationConfig.names():
        choices = [*GenerationConfig.settings(), *_ALIASES]
        hint = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, choices, n=1))
        raise InputError(f"{has} {name!r}, which generate() does not know.{hint} It takes: {', '.join(choices)}.")
