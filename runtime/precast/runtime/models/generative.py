"""The base of all models that generate: requests in groups, step by step, over one session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import only_known
from ..artifact import Artifact
from ..artifact.published_json import parse_object
from ..artifact.schema import Variant
from ..engines import Engine
from ..errors import InputError, PrecastError
from ..generation.beam_search import BeamSearch
from ..generation.callbacks import (
    CallerCriterion,
    CallerProcessor,
    Streamer,
    check_rows,
    distinct_functions,
    transformers_class_of,
)
from ..generation.config import GenerationConfig
from ..generation.prompt import Prompt
from ..generation.prompt_lookup import Lookup
from ..generation.sampling import Processor, Processors, Sampler, draw_seed
from ..generation.sequence import Request, StoppingCriteria
from ..generation.session import Session
from ..generation.stop_strings import StopStrings
from ..inputs.tensors import ModelOutput, convert_like
from .base import CompiledModel
from .languages import language_id

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Generation", "GenerativeModel", "check_streamer"]

Array = np.ndarray[Any, Any]


_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_ID_SETTINGS = (
    *_FORCED,
    "decoder_start_token_id",
    "bos_token_id",
    "eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)
_LANGUAGES = ("forced_bos_token_id", "decoder_start_token_id")
"""Where multilingual models take the language that they answer in."""


class Generation:
    """One call's settings: the caller's own `processors`, `criteria` and `streamer`, and `count` new tokens at most.

    `full` is the number of new tokens that the settings say: it may be more than there is room for, or differ from the
    caller's criteria. `given` is the call's main input: the caller's functions get tensors where it is one.
    """

    def __init__(
        self,
        given: Any,
        config: GenerationConfig,
        count: int,
        processors: Sequence[Processor] | None = None,
        criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        *,
        full: int,
    ) -> None:
        self.config, self.count, self.full = config, count, full
        self._seed = draw_seed() if config.do_sample and config.seed is None else config.seed
        self._functions = distinct_functions("logits_processor", processors)
        self.processors = [CallerProcessor(each, given) for each in self._functions]
        self.criteria = [CallerCriterion(each, given) for each in distinct_functions("stopping_criteria", criteria)]
        self.streamer = None if streamer is None else Streamer(streamer, given)

    def generator(self, row: int) -> np.random.Generator | None:
        """The random generator of one row; it depends on the seed and the row's index, not on its neighbours."""
        return None if self._seed is None or not self.config.do_sample else np.random.default_rng([self._seed, row])

    def check_rows(self, prompts: int) -> None:
        """Raise InputError for a processor that cannot work on so many prompts."""
        check_rows(self._functions, prompts * self.width)

    @property
    def width(self) -> int:
        """Rows that a prompt takes."""
        return max(self.config.beams, self.config.num_return_sequences or 1)


class GenerativeModel(CompiledModel):
    """A model with a key/value cache of fixed capacity, which continues rows of tokens."""

    def __init__(self, artifact: Artifact, variant: Variant, engine: Engine) -> None:
        super().__init__(artifact, variant, engine)
        self._session = Session(engine, [graph for graph in variant.graphs if graph.role != "encode"])
        # The number of the call that the caches belong to; a stream that finds another one has lost them.
        self._owner = 0
        self._own_config: GenerationConfig | None = None

    @only_known
    def reset(self) -> None:
        """Forget the tokens of earlier calls, so that the next one computes all of its prompt."""
        with self._lock:
            self._owner += 1
            self._session.reset()

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings of calls that give none: the artifact's generation_config.json, unless it is set, to a
        GenerationConfig, ours or transformers', or a dict; None goes back to the file."""
        if self._own_config is None:
            self._own_config = GenerationConfig.published(self._generation_file, "generation_config.json")
        return self._own_config

    @generation_config.setter
    def generation_config(self, given: Any) -> None:
        self._own_config = None if given is None else GenerationConfig.of(given, "generation_config")

    @only_known
    def new_session(self) -> Self:
        """The same model with its own buffers, caches and lock, for another thread. Weights are shared."""
        other = super().new_session()
        other._own_config = deepcopy(self._own_config)
        return other

    @cached_property
    def _generation_file(self) -> dict[str, Any]:
        data = self.artifact.contents.get("generation_config.json")
        return {} if data is None else parse_object(data, str(self.artifact.path / "generation_config.json"))

    def _load_contexts(self, contexts: Sequence[Any], width: int) -> None:
        """Load the encoder outputs of `contexts` into the session, `width` rows for each; a decoder has none."""

    def _finish_answer(self, tokens: list[int], config: GenerationConfig) -> list[int]:
        """The tokens of an answer that the caller gets."""
        return tokens

    def _source_tokens(self, context: Any) -> Array | None:
        """The tokens of a context, where it is text."""
        return None

    def _generate_all(
        self, given: Any, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation, front: Array
    ) -> Any:
        """Continue `prompts`, group by group, and put `front` [prompts, length], the caller's view of them, before each
        answer."""
        asked.check_rows(len(prompts))
        found: list[list[int]] = []
        scores: list[float] = []
        with self._lock:
            for part in self._prompt_groups(len(prompts), asked.width):
                group = prompts[part], contexts[part], asked
                if asked.config.beams > 1:
                    best = self._run_beam_search(*group)
                    scores += [score for score, _ in best]
                    found += [tokens for _, tokens in best]
                else:
                    found += self._generate_rows(*group, part.start * asked.width)
        if asked.streamer is not None:
            asked.streamer.end()
        count = asked.config.num_return_sequences or 1
        answers = [self._finish_answer(tokens, asked.config) for tokens in found]
        sequences = convert_like(given, _pad_answers(np.repeat(front, count, 0), answers, asked.config))
        if not asked.config.return_dict_in_generate:
            return sequences
        outputs = {"sequences": sequences}
        if asked.config.output_scores:
            outputs["sequences_scores"] = convert_like(given, np.array(scores, np.float32))
        return ModelOutput(outputs)

    def _prompt_groups(self, count: int, width: int) -> list[slice]:
        """Split prompts into groups that run together, each prompt in `width` rows. Raises InputError where not even
        one fits."""
        if width == 1:
            return self._batch_slices(count)
        if width > self.batch_size:
            raise InputError(
                f"Each prompt takes {width} rows (num_beams or num_return_sequences); the model was compiled for "
                f"{self.batch_size}. Pass num_beams=1 and num_return_sequences=1, or compile with --batch-size {width}."
            )
        self._batch_slices(count)
        size = self.batch_size // width
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _generate_rows(
        self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation, first: int
    ) -> list[list[int]]:
        requests = self._make_requests(prompts, contexts, asked, first)
        for tokens in self._run_steps(requests, contexts):
            if asked.streamer is not None:
                asked.streamer.put(np.array(tokens))
        return [request.generated for request in requests]

    def _run_beam_search(
        self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation
    ) -> list[tuple[float, list[int]]]:
        """Beam search of a group: the returned rows' scores and tokens."""
        searches = self._make_searches(prompts, contexts, asked)
        session, width = self._session, asked.width
        self._owner += 1
        owner = self._owner
        self._load_contexts(contexts, width)
        logits = session.prefill([search.prompt for search in searches for _ in range(width)])
        while True:
            parents: list[int] = list(range(len(searches) * width))
            for index, search in enumerate(searches):
                if not search.is_done:
                    rows = slice(index * width, (index + 1) * width)
                    parents[rows] = [rows.start + parent for parent in search.advance(logits[rows])]
            self._check_owner(owner)
            if all(search.is_done for search in searches):
                break
            session.reorder(parents)
            logits = session.decode(
                list(chain.from_iterable([None] * width if each.is_done else each.last_tokens for each in searches))
            )
        count = asked.config.num_return_sequences or 1
        return [row for search in searches for row in search.best(count)]

    def _run_steps(self, requests: list[Request], contexts: Sequence[Any]) -> Iterator[list[int]]:
        """Generate until all requests are done; yields the new tokens of the rows that go on, one per row."""
        session = self._session
        with self._lock:
            self._owner += 1
            owner = self._owner
            self._load_contexts(contexts, len(requests) // len(contexts))
            logits = session.prefill([request.prompt for request in requests])
            chosen = [request.choose(logits[index]) for index, request in enumerate(requests)]
            self._check_owner(owner)
        yield chosen
        rest = self._step_one_row(requests[0], owner) if session.batch == 1 else self._step_batch(requests, owner)
        yield from rest

    def _step_one_row(self, request: Request, owner: int) -> Iterator[list[int]]:
        session = self._session
        while not request.is_done:
            with self._lock:
                self._check_owner(owner)
                guesses = request.guess()
                chosen = request.check(guesses, session.append([request.generated[-1], *guesses]))
                self._check_owner(owner)
                session.drop(len(guesses) + 1 - len(chosen))
            for token in chosen:
                yield [token]

    def _step_batch(self, requests: list[Request], owner: int) -> Iterator[list[int]]:
        while not all(request.is_done for request in requests):
            with self._lock:
                self._check_owner(owner)
                logits = self._session.decode([None if each.is_idle else each.generated[-1] for each in requests])
                active = [(index, request) for index, request in enumerate(requests) if not request.is_idle]
                chosen = [request.choose(logits[index]) for index, request in active]
                self._check_owner(owner)
            yield chosen

    def _check_owner(self, owner: int) -> None:
        """Raise PrecastError where another call has used the caches, and overwritten the logits."""
        if owner != self._owner:
            raise PrecastError(
                "Another call on the same model has taken over its caches: a stream was left half-way, or a "
                "logits_processor or a stopping criterion calls the model that it works for. Use model.new_session() "
                "for calls that live side by side."
            )

    def _stream_row(
        self, prompt: Prompt, context: Any, config: GenerationConfig, count: int, full: int
    ) -> Iterator[int]:
        if config.beams > 1:
            raise InputError(
                f"num_beams={config.num_beams}: which tokens a search keeps is known at its end only, so it cannot be "
                f"streamed. Pass num_beams=1, or use generate()."
            )
        if (config.num_return_sequences or 1) > 1:
            raise InputError(f"stream() gives one row, not num_return_sequences={config.num_return_sequences}.")
        requests = self._make_requests([prompt], [context], Generation(None, config, count, full=full), 0)
        return (tokens[0] for tokens in self._run_steps(requests, [context]))

    @staticmethod
    def _main_input(name: str, given: Any, inputs: Any = None, first: int | None = None) -> Any:
        """The main input of a call: `given` by its name, or as generate()'s `inputs`, or else one row of the token
        `first`.

        Raises InputError where it is given twice, or not at all.
        """
        if given is not None and inputs is not None:
            raise InputError(f"{name} and inputs are two names of the same; pass one of them.")
        found = inputs if given is None else given
        if found is None and first is None:
            raise InputError(f"Nothing was given: pass {name}.")
        return [[first]] if found is None else found

    def _merge_config(self, given: Any, options: dict[str, Any]) -> GenerationConfig:
        asked = GenerationConfig.of(self._with_languages(options), "generate()")
        if given is not None:
            if isinstance(given, dict):
                given = self._with_languages(given)
            asked = asked.over(GenerationConfig.of(given, "generation_config"))
        self._check_ids(asked, _ID_SETTINGS)
        config = asked.over(self.generation_config).without([name for name in options if options[name] is None])
        config.check()
        # Ids beyond the vocabulary that a file forbids never come anyway; forced ones would have to.
        self._check_ids(config, _FORCED)
        return config

    def _with_languages(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` with the ids of languages that are given by name."""
        named = [name for name in _LANGUAGES if isinstance(options.get(name), str)]
        return {**options, **{name: language_id(self.tokenizer, name, options[name]) for name in named}}

    @staticmethod
    def _answer_lengths(
        new_tokens: Callable[[GenerationConfig], int], config: GenerationConfig, room: int, given: Any,
        options: Mapping[str, Any], criteria: Sequence[Any] | None = None,
    ) -> tuple[int, int]:  # fmt: skip
        """How many new tokens the settings say, as `new_tokens` counts them, and how many to generate at most.

        The caller's own criteria go first; where a file or a default says the number, not the call, it is no more than
        there is room for.
        """
        full, longest = new_tokens(config), _max_length_of(criteria)
        if longest is not None:
            return full, new_tokens(replace(config, max_new_tokens=None, max_length=longest))
        said = dict(options) if given is None else {**vars(GenerationConfig.of(given, "generation_config")), **options}
        is_asked = any(said.get(name) is not None for name in ("max_new_tokens", "max_length"))
        return full, full if is_asked else max(1, min(full, room))

    def _check_ids(self, config: GenerationConfig, names: Iterable[str]) -> None:
        """Raise InputError for a token that a setting names and the model does not have."""
        vocabulary = self._session.vocabulary
        for name in names:
            if wrong := [each for each in config.ids_of(name) if not 0 <= each < vocabulary]:
                hint = " For no such token, pass eos_token_id=[]." if name == "eos_token_id" else ""
                raise InputError(f"{name}={wrong[0]} is none of the model's tokens, 0..{vocabulary - 1}.{hint}")

    def _vocabulary_size(self) -> int:
        return super()._vocabulary_size() or self._session.vocabulary

    def _check_lookup(self, config: GenerationConfig) -> None:
        if not config.prompt_lookup_num_tokens or self._session.is_flexible:
            return
        if self.variant.graphs[0].states:
            raise InputError(
                f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} takes back tokens guessed wrong; "
                f"this model carries states, which cannot be taken back. Pass prompt_lookup_num_tokens=0."
            )
        lengths = self.artifact.contract.shapes.prefill_lengths
        static = f" and the fixed lengths --prefill-lengths {','.join(map(str, lengths))}" if lengths else ""
        raise InputError(
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} checks several tokens of one row in one step, "
            f"which takes a model compiled for batch 1 and any length; this one was compiled for batch "
            f"{self.batch_size}{static}. Pass prompt_lookup_num_tokens=0 to go without, or export it again with "
            f"--batch-size 1 and without --prefill-lengths."
        )

    def _make_requests(
        self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation, first: int
    ) -> list[Request]:
        config, stops = asked.config, self._stop_strings(asked)
        requests: list[Request] = []
        for prompt, context in zip(prompts, contexts, strict=True):
            ends = StoppingCriteria(config, prompt, asked.criteria, stops)
            for _ in range(asked.width):
                generator = asked.generator(first + len(requests))
                sampler = Sampler(self._make_processors(prompt, context, asked), generator)
                requests.append(Request(prompt.tokens, asked.count, sampler, ends, _make_lookup(config, prompt.tokens)))
        return requests

    def _make_searches(self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation) -> list[BeamSearch]:
        stops = self._stop_strings(asked)
        return [
            BeamSearch(
                prompt.tokens, asked.count, asked.config, self._make_processors(prompt, context, asked),
                StoppingCriteria(asked.config, prompt, asked.criteria, stops), full=asked.full,
            )
            for prompt, context in zip(prompts, contexts, strict=True)
        ]  # fmt: skip

    def _make_processors(self, prompt: Prompt, context: Any, asked: Generation) -> Processors:
        return Processors(asked.config, prompt, asked.full, asked.processors, self._source_tokens(context))

    def _stop_strings(self, asked: Generation) -> StopStrings | None:
        return StopStrings(self.tokenizer, asked.config.stops) if asked.config.stops else None


def _max_length_of(criteria: Any) -> int | None:
    """The length of transformers' MaxLengthCriteria among the criteria, which replaces that of the call or its
    configuration."""
    theirs = (
        each
        for each in distinct_functions("stopping_criteria", criteria)
        if transformers_class_of(each) == "MaxLengthCriteria"
    )
    return next((each.max_length for each in theirs), None)


def check_streamer(streamer: Any, rows: int, config: GenerationConfig) -> None:
    """Raise InputError for a streamer that is none, or cannot follow; None is no streamer at all."""
    if streamer is None:
        return
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise InputError(f"streamer has no {name}(); it needs put(tokens) and end().")
    rows *= config.num_return_sequences or 1
    if rows > 1:
        raise InputError(f"A streamer follows one row; this batch has {rows}.")
    if config.beams > 1:
        raise InputError(f"A streamer cannot follow num_beams={config.num_beams}; pass num_beams=1 or no streamer.")


def _make_lookup(config: GenerationConfig, row: Array) -> Lookup | None:
    if not config.prompt_lookup_num_tokens:
        return None
    return Lookup(row.tolist(), config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)


def _pad_answers(front: Array, answers: list[list[int]], config: GenerationConfig) -> Array:
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(config.eos_ids), 0)
    width = max(map(len, answers))
    result = np.full((len(front), front.shape[1] + width), pad, np.int64)
    result[:, : front.shape[1]] = front
    for row, answer in zip(result, answers, strict=True):
        row[front.shape[1] : front.shape[1] + len(answer)] = answer
    return result
