"""The base of all models that generate: requests in groups, step by step, over one session."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import only_known
from ..artifact import Artifact
from ..artifact.published_json import parse_object
from ..artifact.schema import Graph, Variant
from ..artifact.stages import compiled_graphs
from ..engines import Engine, owns_caches
from ..errors import InputError, PrecastError
from ..generation.adapters import AdapterSlots, LoadedAdapter
from ..generation.beam_search import BeamSearch
from ..generation.callbacks import (
    CallerAllowedTokens,
    CallerCriterion,
    CallerProcessor,
    Streamers,
    check_rows,
    distinct_functions,
    transformers_class_of,
)
from ..generation.config import GenerationConfig
from ..generation.draft import Draft
from ..generation.guidance import Guidance
from ..generation.outputs import Answer, combine_outputs
from ..generation.prefix import Prefix, read_prefix
from ..generation.prompt import Prompt
from ..generation.prompt_lookup import Lookup
from ..generation.sampling import Processor, Processors, Sampler, draw_seed
from ..generation.sequence import Guesser, Request, StoppingCriteria
from ..generation.session import Session
from ..generation.stop_strings import StopStrings
from ..inputs.tensors import ModelOutput, convert_like
from .base import CompiledModel
from .languages import language_id

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..structured.grammar import Grammars, RowGrammar

__all__ = ["Call", "Generation", "GenerativeModel", "TokenStream", "check_seeds", "check_streamer", "pad_answers"]

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
    "sequence_bias",
    "logit_bias",
)
_ADDED_TO = ("sequence_bias", "logit_bias")
"""What a file says of tokens that there are not cannot be added to their logits."""
_LANGUAGES = ("forced_bos_token_id", "decoder_start_token_id")
"""Where multilingual models take the language that they answer in."""


class DraftModel:
    """Another model that guesses for this one, by caches of its own.

    `cost` is the time of one of its steps in steps of the model that checks: as its weights are to that one's.
    """

    def __init__(self, model: GenerativeModel, cost: float) -> None:
        self._session, self._cost = model.new_session()._session, cost
        self._session.use_adapters([])

    def reset(self) -> None:
        """Forget all tokens."""
        self._session.reset()

    def guesser(self, row: Array, most: int | None) -> Draft:
        """Guesses for one row, at most so many at once, or as many as pay."""
        return Draft(self._session, row.tolist(), most, self._cost)


class Generation:
    """One call's settings: the caller's own functions, and `count` new tokens at most.

    Args:
        given: the call's main input: the caller's functions get tensors where it is one.
        config: the settings.
        count: as many as the settings say, the caller's criteria, and the room.
        full: the number of new tokens that the settings alone say.
        processors, criteria, streamer, allowed: as the arguments of generate() of transformers.
        draft: a model that guesses.
        negative: what guides an answer away, one row of tokens for each prompt.
        rules: logits processors of the model's own.
    """

    def __init__(
        self,
        given: Any,
        config: GenerationConfig,
        count: int,
        *,
        full: int,
        processors: Sequence[Processor] | None = None,
        criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        allowed: Any = None,
        draft: DraftModel | None = None,
        negative: Sequence[Array] | None = None,
        rules: Sequence[Callable[[Array, Array], Array]] = (),
    ) -> None:
        self.rules = rules
        self.config, self.count, self.full, self.draft, self.negative = config, count, full, draft, negative
        self._seed = draw_seed() if config.do_sample and config.seed is None else config.seed
        self._functions = distinct_functions("logits_processor", processors)
        self.processors = [CallerProcessor(each, given) for each in self._functions]
        self.criteria = [CallerCriterion(each, given) for each in distinct_functions("stopping_criteria", criteria)]
        self.allowed = None if allowed is None else CallerAllowedTokens(allowed, given)
        self.streamers = None if streamer is None else Streamers(streamer, given)
        self.deadline = None if config.max_time is None else time.monotonic() + config.max_time

    def begin_streams(self, prompts: Sequence[Prompt]) -> None:
        """Tell streamers what answers begin with: a single one as the caller gave it, those of a list each its own row
        without padding."""
        if self.streamers is not None:
            are_listed = self.streamers.are_listed
            self.streamers.begin([each.tokens if are_listed else each.shown for each in prompts])

    def generator(self, row: int) -> np.random.Generator | None:
        """The random generator of one row; it depends on the seed and the row's index, not on its neighbours. Of
        several seeds each is of a prompt, whose rows are counted from 0."""
        if self._seed is None or not self.config.do_sample:
            return None
        if isinstance(self._seed, int):
            return np.random.default_rng([self._seed, row])
        prompt, place = divmod(row, 1 if self.config.beams > 1 else self.width)
        return np.random.default_rng([self._seed[prompt], place])

    def check_rows(self, prompts: int) -> None:
        """Raise InputError for a processor that cannot work on so many prompts, or seeds that are not as many."""
        check_seeds(self.config.seed, prompts)
        check_rows(self._functions, prompts * self.width)

    @property
    def width(self) -> int:
        """Rows that a prompt takes."""
        return max(self.config.beams, self.config.num_return_sequences or 1)


@dataclass(frozen=True)
class Call:
    """A call of generate() or stream() whose arguments are checked.

    Attributes:
        given: its main input; answers are arrays of that kind.
        prompts: what is continued.
        contexts: for each prompt what the encoder gets; None of decoders.
        asked: the settings.
        front: what stands before each answer, [prompts, length].
    """

    given: Any
    prompts: list[Prompt]
    contexts: Sequence[Any]
    asked: Generation
    front: Array


class TokenStream(Iterator[int]):
    """The tokens of one row as they are generated."""

    def __init__(self, steps: Generator[list[int], None, None], request: Request) -> None:
        self._steps, self._record = steps, request.record

    def __next__(self) -> int:
        return next(self._steps)[0]

    def close(self) -> None:
        """Leave it; nothing more comes."""
        self._steps.close()

    @property
    def draft_tokens(self) -> int:
        """How many tokens were guessed so far, by an `assistant_model` or a prompt lookup."""
        return self._record.guessed

    @property
    def accepted_draft_tokens(self) -> int:
        """How many of them were right."""
        return self._record.accepted


class GenerativeModel(CompiledModel):
    """A model with a key/value cache of fixed capacity, which continues rows of tokens."""

    def __init__(
        self,
        artifact: Artifact,
        variant: Variant,
        engine: Engine,
        slots: AdapterSlots | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        super().__init__(artifact, variant, engine)
        lora = artifact.contract.lora
        self._slots = slots or (AdapterSlots(lora) if lora else None)
        self._prefix = prefix or read_prefix(artifact, self._cached_graphs[0])
        self._session = self._make_session()
        # The number of the call that the caches belong to; a stream that finds another one has lost them.
        self._owner = 0
        self._own_config: GenerationConfig | None = None
        self._draft: tuple[GenerativeModel, DraftModel] | None = None
        self._grammars: dict[tuple[int, ...], Grammars] = {}

    @only_known
    def reset(self) -> None:
        """Forget the tokens of earlier calls, so that the next one computes all of its prompt."""
        with self._lock:
            self._owner += 1
            self._session.reset()
            if "_second_session" in self.__dict__:
                self._second_session.reset()
            if self._draft is not None:
                self._draft[1].reset()

    def session(self) -> Session:
        """Its graphs and caches, to be stepped by a loop of your own: `prefill(rows)` and `decode(tokens)` give logits.

        They are the model's own: any other call on it takes them over, as this one does from a stream that was left
        half-way. `new_session().session()` has caches of its own.
        """
        with self._lock:
            self._owner += 1
            self._session.reset()
            self._session.use_adapters([])
        return self._session

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

    @property
    def has_own_config(self) -> bool:
        """Whether `generation_config` says something else than the artifact's file."""
        return self.generation_config != GenerationConfig.published(self._generation_file, "generation_config.json")

    @only_known
    def new_session(self) -> Self:
        """The same model with its own buffers, caches and lock, for another thread. Weights are shared, and what the
        caches hold is copied, unless a call is using them: the new session need not read the same beginning again."""
        other = super().new_session()
        if not self._session.context and not owns_caches(self._engine) and self._lock.acquire(blocking=False):
            try:
                session = self._session
                other._session.restore(session.tokens, session.snapshot(), session.adapters)
            finally:
                self._lock.release()
        other._take_settings(self)
        return other

    def _take_settings(self, other: GenerativeModel) -> None:
        """Answer calls by what is set of another session of the same model."""
        self._own_config, self._grammars = deepcopy(other._own_config), other._grammars
        self.opening = other.opening

    @cached_property
    def _generation_file(self) -> dict[str, Any]:
        data = self.artifact.contents.get("generation_config.json")
        return {} if data is None else parse_object(data, str(self.artifact.path / "generation_config.json"))

    def _load_contexts(self, contexts: Sequence[Any], width: int) -> None:
        """Load the encoder outputs of `contexts` into the session, `width` rows for each; a decoder has none."""

    def _finish_answer(self, tokens: list[int], config: GenerationConfig) -> list[int]:
        """The tokens of an answer that the caller gets."""
        return tokens

    def _source_tokens(self, prompt: Prompt, context: Any) -> Array | None:
        """The tokens that an answer is one to, where they are text."""
        return prompt.tokens

    def _generate_all(self, call: Call) -> Any:
        """Continue all prompts, group by group."""
        given, asked = call.given, call.asked
        asked.begin_streams(call.prompts)
        found = self._answer_all(call.prompts, call.contexts, asked)
        if asked.streamers is not None:
            asked.streamers.end()
        config = asked.config
        answers = [self._finish_answer(answer.tokens, config) for answer in found]
        front = np.repeat(call.front, config.num_return_sequences or 1, 0)
        sequences = convert_like(given, pad_answers(front, answers, config))
        if not config.returns_outputs:
            return sequences
        others = {name: _convert_all(given, value) for name, value in combine_outputs(found, config).items()}
        if asked.draft is not None:
            others |= {
                "draft_tokens": sum(each.record.guessed for each in found),
                "accepted_draft_tokens": sum(each.record.accepted for each in found),
            }
        return ModelOutput(sequences=sequences, **others)

    def _answer_all(self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation) -> list[Answer]:
        """The rows that are returned for `prompts`, group by group."""
        asked.check_rows(len(prompts))
        found: list[Answer] = []
        with self._lock:
            for part in self._prompt_groups(len(prompts), asked.width):
                group = prompts[part], contexts[part], asked
                if asked.config.beams > 1:
                    found += self._run_beam_search(*group)
                else:
                    found += self._generate_rows(*group, part.start * asked.width)
        return found

    def _prompt_groups(self, count: int, width: int) -> list[slice]:
        """Split prompts into groups that run together, each prompt in `width` rows. Raises InputError where not even
        one fits."""
        if width == 1:
            return self._batch_slices(count)
        if width > self.batch_size:
            raise InputError(
                f"Each prompt takes {width} rows (num_beams or num_return_sequences); the model was compiled for "
                f"{self.batch_size}. Pass num_beams=1 and num_return_sequences=1, or compile with batch_size={width}."
            )
        self._batch_slices(count)
        size = self.batch_size // width
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _generate_rows(
        self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation, first: int
    ) -> list[Answer]:
        requests = self._make_requests(prompts, contexts, asked, first)
        adapters = _adapters_of(prompts, asked.width)
        for _ in self._run_steps(requests, contexts, adapters, self._make_guidance(prompts, asked)):
            if asked.streamers is not None:
                for row, request in enumerate(requests, first):
                    asked.streamers.tell(row, request.generated, is_last=request.is_idle)
        return [Answer(request.generated, request.record) for request in requests]

    def _run_beam_search(self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation) -> list[Answer]:
        """Beam search of a group: the returned rows."""
        searches = self._make_searches(prompts, contexts, asked)
        session, width = self._session, asked.width
        self._owner += 1
        owner = self._owner
        self._load_contexts(contexts, width)
        session.use_adapters(_adapters_of(prompts, width))
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

    def _run_steps(
        self,
        requests: list[Request],
        contexts: Sequence[Any],
        adapters: Sequence[LoadedAdapter | None],
        make_guidance: Callable[[], Guidance] | None,
    ) -> Generator[list[int], None, None]:
        """Generate until all requests are done; yields the new tokens of the rows that go on, one per row."""
        session = self._session
        with self._lock:
            self._owner += 1
            owner = self._owner
            self._load_contexts(contexts, len(requests) // len(contexts))
            session.use_adapters(adapters)
            logits = session.prefill([request.prompt for request in requests])
            guidance = make_guidance and make_guidance()
            chosen = _choose_all(enumerate(requests), logits, guidance)
            self._check_owner(owner)
        yield chosen
        if session.batch == 1 and not guidance:
            yield from self._step_one_row(requests[0], owner)
        else:
            yield from self._step_batch(requests, owner, guidance)

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

    def _step_batch(self, requests: list[Request], owner: int, guidance: Guidance | None) -> Iterator[list[int]]:
        while not all(request.is_done for request in requests):
            with self._lock:
                self._check_owner(owner)
                tokens = [None if each.is_idle else each.generated[-1] for each in requests]
                logits = self._session.decode(tokens)
                if guidance:
                    guidance.decode(tokens)
                active = [(index, request) for index, request in enumerate(requests) if not request.is_idle]
                chosen = _choose_all(active, logits, guidance)
                self._check_owner(owner)
            yield chosen

    def _make_guidance(self, prompts: Sequence[Prompt], asked: Generation) -> Callable[[], Guidance] | None:
        """What begins the rows that guide these prompts; None where nothing does."""
        if asked.negative is None or not asked.config.guides:
            return None
        rows = [asked.negative[prompt.index] for prompt in prompts for _ in range(asked.width)]
        scale = asked.config.guidance_scale
        assert scale is not None, "it guides"
        return lambda: Guidance(self._second_session, rows, scale, _adapters_of(prompts, asked.width))

    @cached_property
    def _second_session(self) -> Session:
        return self._make_session()

    def _make_session(self) -> Session:
        return Session(self._engine, self._cached_graphs, self._prefix, self._slots)

    @property
    def _cached_graphs(self) -> list[Graph]:
        return [graph for graph in self.variant.graphs if graph.role != "encode"]

    def _check_owner(self, owner: int) -> None:
        """Raise PrecastError where another call has used the caches, and overwritten the logits."""
        if owner != self._owner:
            raise PrecastError(
                "Another call on the same model has taken over its caches: a stream was left half-way, or a "
                "logits_processor or a stopping criterion calls the model that it works for. Use model.new_session() "
                "for calls that live side by side."
            )

    def _stream_row(self, call: Call) -> TokenStream:
        """The tokens of the only prompt's answer as they come."""
        asked, config = call.asked, call.asked.config
        if len(call.prompts) != 1:
            raise InputError(f"stream() answers one row; this batch has {len(call.prompts)}. Use generate().")
        if config.beams > 1:
            raise InputError(
                f"num_beams={config.num_beams}: which tokens a search keeps is known at its end only, so it cannot be "
                f"streamed. Pass num_beams=1, or use generate()."
            )
        if (config.num_return_sequences or 1) > 1:
            raise InputError(f"stream() gives one row, not num_return_sequences={config.num_return_sequences}.")
        if config.returns_steps:
            raise InputError("stream() gives tokens and no logprobs or scores. Leave them out, or use generate().")
        asked.check_rows(1)
        requests = self._make_requests(call.prompts, call.contexts, asked, 0)
        guidance = self._make_guidance(call.prompts, asked)
        steps = self._run_steps(requests, call.contexts, _adapters_of(call.prompts, 1), guidance)
        return TokenStream(steps, requests[0])

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
        if config.guides and self._session.context:
            raise InputError(
                f"guidance_scale={config.guidance_scale} is for decoders: what this model would say without its source "
                f"is not defined. Pass guidance_scale=None."
            )
        if (config.top_logprobs or 0) > self._session.vocabulary:
            raise InputError(
                f"top_logprobs={config.top_logprobs} is more than the model's {self._session.vocabulary} tokens."
            )
        self._check_ids(config, (*_FORCED, *_ADDED_TO))
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
        if config.prompt_lookup_num_tokens:
            self._check_guesses(f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}", "=0")

    def _check_guesses(self, asked: str, off: str) -> None:
        """Raise InputError where this model cannot check, or take back, several tokens in one step."""
        name = asked.partition("=")[0]
        if self.variant.graphs[0].states:
            raise InputError(
                f"{asked} takes back tokens guessed wrong; this model carries states, which cannot be taken back. "
                f"Pass {name}{off}."
            )
        if self._session.is_flexible:
            return
        lengths = self.artifact.contract.shapes.prefill_lengths
        static = f" and the fixed lengths prefill_lengths={','.join(map(str, lengths))}" if lengths else ""
        raise InputError(
            f"{asked} checks several tokens of one row in one step, which takes a model compiled for batch 1 and any "
            f"length; this one was compiled for batch {self.batch_size}{static}. Pass {name}{off} to go without, or "
            f"export it again with batch_size=1 and without prefill_lengths."
        )

    def _draft_for(self, assistant: Any, config: GenerationConfig) -> DraftModel | None:
        """What guesses by `assistant_model`, or None without one. Raises InputError where it cannot."""
        if assistant is None:
            return None
        asked = "assistant_model"
        if not isinstance(assistant, GenerativeModel) or assistant._session.context:
            raise InputError(
                f"{asked} must be a CompiledModelForCausalLM, not {assistant!r:.80}. Compile the smaller model, too."
            )
        for setting, is_on in (
            ("num_beams", config.beams > 1),
            ("prompt_lookup_num_tokens", bool(config.prompt_lookup_num_tokens)),
            ("guidance_scale", config.guides),
        ):
            if is_on:
                raise InputError(f"{asked} does not go together with {setting}={getattr(config, setting)}; pass one.")
        self._check_guesses(asked, "=None")
        try:
            assistant._check_guesses("num_assistant_tokens", "=None")
        except InputError as error:
            raise InputError(f"{assistant.artifact.path} cannot be the {asked}: {error}") from None
        if self._draft is None or self._draft[0] is not assistant:
            self._check_vocabulary(assistant)
            self._draft = assistant, DraftModel(assistant, assistant._weight_bytes / max(1, self._weight_bytes))
        return self._draft[1]

    def _check_vocabulary(self, assistant: GenerativeModel) -> None:
        """Raise InputError where the tokens of an assistant are others than this model's."""
        theirs, ours = assistant._session.vocabulary, self._session.vocabulary
        if theirs != ours:
            raise InputError(
                f"The assistant_model has another vocabulary: {theirs} tokens, and this model {ours}. Its guesses "
                f"would be other words; take a smaller model of the same family."
            )
        if wrong := next((i for i in range(ours) if assistant.tokenizer.token(i) != self.tokenizer.token(i)), None):
            raise InputError(
                f"The assistant_model has another vocabulary: token {wrong} is {assistant.tokenizer.token(wrong)!r}, "
                f"and here {self.tokenizer.token(wrong)!r}. Take a smaller model of the same family."
            )

    @property
    def _weight_bytes(self) -> int:
        """Bytes of its weights, and of its graphs, which may hold some."""
        files = {*self.variant.weights, *(graph.file for graph in compiled_graphs(self.variant))}
        return sum(self.artifact.contract.files[name].size for name in files)

    def _make_requests(
        self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation, first: int
    ) -> list[Request]:
        config, stops = asked.config, self._stop_strings(asked)
        requests: list[Request] = []
        for prompt, context in zip(prompts, contexts, strict=True):
            for _ in range(asked.width):
                form = self._begin_form(prompt, config)
                ends = StoppingCriteria(config, prompt, asked.criteria, stops, asked.deadline, form)
                generator = asked.generator(first + len(requests))
                sampler = Sampler(self._make_processors(prompt, context, asked, form), generator)
                guesser = _make_guesser(asked, prompt.tokens)
                requests.append(Request(prompt.tokens, asked.count, sampler, ends, guesser, config))
        return requests

    def _make_searches(self, prompts: list[Prompt], contexts: Sequence[Any], asked: Generation) -> list[BeamSearch]:
        stops = self._stop_strings(asked)
        return [
            BeamSearch(
                prompt.tokens, asked.count, asked.config, self._make_processors(prompt, context, asked),
                StoppingCriteria(asked.config, prompt, asked.criteria, stops, asked.deadline),
                asked.generator(prompt.index), full=asked.full,
            )
            for prompt, context in zip(prompts, contexts, strict=True)
        ]  # fmt: skip

    def _make_processors(
        self, prompt: Prompt, context: Any, asked: Generation, form: RowGrammar | None = None
    ) -> Processors:
        source = self._source_tokens(prompt, context)
        return Processors(asked.config, prompt, asked.full, asked.processors, source, asked.allowed, form, asked.rules)

    def _known_ends(self, config: GenerationConfig) -> list[int]:
        """The ends that the model has: files may name others, which never come."""
        return [token for token in config.eos_ids if 0 <= token < self._session.vocabulary]

    def _begin_form(self, prompt: Prompt, config: GenerationConfig) -> RowGrammar | None:
        """The form of one row's answer, at its beginning."""
        structure, ends = config.structure, tuple(self._known_ends(config))
        if structure is None:
            return None
        if ends not in self._grammars:
            # Most calls need none of what it imports.
            from ..structured.grammar import Grammars

            self._grammars[ends] = Grammars(self.tokenizer, self._session.vocabulary, ends)
        is_forced = config.forced_bos_token_id is not None and len(prompt.shown) == 1
        return self._grammars[ends].begin(structure, len(prompt.tokens) + is_forced)

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


def check_seeds(seed: int | list[int] | None, prompts: int) -> None:
    """Raise InputError for a list of seeds that has not one for each prompt."""
    if isinstance(seed, list) and len(seed) != prompts:
        raise InputError(
            f"seed is a list of {len(seed)}, and there are {prompts} prompts; pass one for each, or a single number."
        )


def check_streamer(streamer: Any, rows: int, config: GenerationConfig) -> None:
    """Raise InputError for a streamer that is none, or cannot follow, and for a list of more or fewer than there are
    rows; None is no streamer at all."""
    if streamer is None:
        return
    are_listed = isinstance(streamer, list | tuple)
    for each in streamer if are_listed else [streamer]:
        for name in ("put", "end"):
            if not callable(getattr(each, name, None)):
                raise InputError(f"streamer has no {name}(); it needs put(tokens) and end().")
    rows *= config.num_return_sequences or 1
    if are_listed and len(streamer) != rows:
        raise InputError(f"streamer lists {len(streamer)} streamers, and there are {rows} rows; give one for each row.")
    if not are_listed and rows > 1:
        raise InputError(f"A streamer follows one row; this batch has {rows}. Give a list, one streamer for each row.")
    if config.beams > 1:
        raise InputError(f"A streamer cannot follow num_beams={config.num_beams}; pass num_beams=1 or no streamer.")


def _adapters_of(prompts: Sequence[Prompt], width: int) -> list[LoadedAdapter | None]:
    """The adapters of the rows of these prompts, `width` for each."""
    return [prompt.adapter for prompt in prompts for _ in range(width)]


def _make_guesser(asked: Generation, row: Array) -> Guesser | None:
    config = asked.config
    if asked.draft is not None:
        return asked.draft.guesser(row, config.num_assistant_tokens)
    if not config.prompt_lookup_num_tokens:
        return None
    return Lookup(row.tolist(), config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)


def _choose_all(requests: Iterable[tuple[int, Request]], logits: Array, guidance: Guidance | None) -> list[int]:
    """The next tokens of rows, by their index."""
    if guidance is None:
        return [request.choose(logits[index]) for index, request in requests]
    return [request.choose(logits[index], partial(guidance, index)) for index, request in requests]


def _convert_all(given: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(convert_like(given, each) for each in value)
    return convert_like(given, value)


def pad_answers(front: Array, answers: list[list[int]], config: GenerationConfig) -> Array:
    """Answers after what begins them, int64 [rows, longest], filled up with pad_token_id."""
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(config.eos_ids), 0)
    width = max(map(len, answers))
    result = np.full((len(front), front.shape[1] + width), pad, np.int64)
    result[:, : front.shape[1]] = front
    for row, answer in zip(result, answers, strict=True):
        row[front.shape[1] : front.shape[1] + len(answer)] = answer
    return result
