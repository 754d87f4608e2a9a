"""Text generation with a compiled decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .artifact import Artifact
from .artifact.schema import Variant
from .engines import Engine
from .errors import ArtifactError, InputError, PrecastError
from .generation import GenerationConfig
from .lookup import Lookup
from .model import CompiledModel
from .padding import as_ids, as_mask, real_rows
from .request import Ends, Request
from .sampling import Processor, Sampler
from .session import Session
from .tensors import ModelOutput, like, to_numpy

__all__ = ["CompiledModelForCausalLM"]

Array = np.ndarray[Any, Any]


class CompiledModelForCausalLM(CompiledModel):
    """A decoder with its key/value cache of fixed capacity."""

    task = "text-generation"

    def __init__(self, artifact: Artifact, variant: Variant, engine: Engine) -> None:
        super().__init__(artifact, variant, engine)
        self._session = Session(engine, variant.graphs)
        # Which call the caches belong to; a stream that finds another number has lost them.
        self._owner = 0

    @property
    def capacity(self) -> int:
        """Tokens per row that fit, prompt and answer together."""
        return self._session.capacity

    def reset(self) -> None:
        """Forget the tokens of earlier calls, so that the next one computes all of its prompt."""
        with self._lock:
            self._owner += 1
            self._session.reset()

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """What the artifact's generation_config.json says."""
        path = self.artifact.path / "generation_config.json"
        try:
            raw = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ArtifactError(f"{path} is not valid JSON: {error}.") from error
        return GenerationConfig.of(raw, "generation_config.json")

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> ModelOutput:
        """Logits for every token of every row.

        Args:
            input_ids: int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1; padding may be on either side.

        Returns:
            `.logits` [batch, length, vocabulary]: each row's as without its padding, zeros where there is padding.

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        ids, mask = self._inputs(input_ids, attention_mask)
        rows = real_rows(ids, mask)
        self._check_room(rows, 0)
        found = self.logits_at(rows, [range(len(row)) for row in rows])
        logits = np.zeros((*ids.shape, found[0].shape[-1]), found[0].dtype)
        for target, keep, values in zip(logits, mask, found, strict=True):
            target[keep] = values
        return ModelOutput(logits=like(input_ids, logits))

    def logits_at(self, rows: Sequence[Array], positions: Sequence[Sequence[int]]) -> list[Array]:
        """Logits after some tokens of each row: for scores, perplexity, comparison.

        Args:
            rows: per row its tokens, int64 [length].
            positions: per row the indices of tokens, ascending.

        Returns:
            Per row [len(positions), vocabulary].
        """
        found: list[Array] = []
        with self._lock:
            self._owner += 1
            for part in self._slices(len(rows)):
                found += self._session.logits_at(rows[part], positions[part])
        return found

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """Continue each row, as `transformers.GenerationMixin.generate` does.

        What the caches hold from the call before is used again: at batch 1 whatever a prompt begins with, as in the
        next turn of a chat; with more rows only where each lacks its last token. The answer is the one from scratch,
        but a quantized model's kernels round one token otherwise than several, so there it may differ; `reset()` first
        makes it repeatable.

        Args:
            input_ids: int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1; padding may be anywhere, the answer is that of the row without.
            generation_config: a GenerationConfig, ours or transformers', or a dict. `options` take precedence over it,
                it over the artifact's generation_config.json, and that over the defaults.
            logits_processor: each called with one row's tokens [1, length] and logits [1, vocabulary]; returns logits.
            stopping_criteria: each called with a row's tokens [1, length] and logits [1, vocabulary]; true ends it.
            streamer: told the prompt, then each step's tokens by `put`, and the end by `end`.
            options: fields of GenerationConfig, such as max_new_tokens=64.

        Returns:
            int64 [batch, length + new]: the input followed by what was generated; rows that ended early are filled with
            pad_token_id.

        Raises:
            InputError: an argument is wrong, or the request is longer than compiled for.
        """
        ids, mask = self._inputs(input_ids, attention_mask)
        config = self._config(generation_config, options)
        rows = real_rows(ids, mask)
        count = config.new_tokens(ids.shape[1])
        self._check_room(rows, count)
        self._check_lookup(config)
        if streamer is not None:
            _check_streamer(streamer, rows)
            streamer.put(ids)
        answers: list[list[int]] = []
        with self._lock:
            for part in self._slices(len(rows)):
                requests = self._requests(
                    rows[part], count, config, logits_processor or (), stopping_criteria or (), part.start
                )
                for tokens in self._steps(requests):
                    if streamer is not None:
                        streamer.put(np.array(tokens))
                answers += [request.generated for request in requests]
        if streamer is not None:
            streamer.end()
        return like(input_ids, _assemble(ids, answers, config))

    def stream(
        self, input_ids: Any, attention_mask: Any = None, generation_config: Any = None, **options: Any
    ) -> Iterator[int]:
        """The tokens of one row as they are generated; arguments as for `generate`.

        The stream may be left at any time. A later call on the same model takes over the caches, and the stream then
        ends with a PrecastError; `new_session()` gives it caches of its own.
        """
        ids, mask = self._inputs(input_ids, attention_mask)
        if len(ids) != 1:
            raise InputError(f"stream() continues one row; this batch has {len(ids)}. Use generate().")
        config = self._config(generation_config, options)
        rows = real_rows(ids, mask)
        count = config.new_tokens(ids.shape[1])
        self._check_room(rows, count)
        self._check_lookup(config)
        return (tokens[0] for tokens in self._steps(self._requests(rows, count, config)))

    def _steps(self, requests: list[Request]) -> Iterator[list[int]]:
        """Generate until all requests are done; yields the new tokens of the rows that go on, one per row."""
        session = self._session
        with self._lock:
            self._owner += 1
            owner = self._owner
            logits = session.prefill([request.prompt for request in requests])
            chosen = [request.choose(logits[index]) for index, request in enumerate(requests)]
        yield chosen
        rest = self._one_row(requests[0], owner) if session.batch == 1 else self._many_rows(requests, owner)
        yield from rest

    def _one_row(self, request: Request, owner: int) -> Iterator[list[int]]:
        session = self._session
        while not request.is_done:
            with self._lock:
                self._check_owner(owner)
                guesses = request.guess()
                chosen = request.check(guesses, session.append([request.generated[-1], *guesses]))
                session.drop(len(guesses) + 1 - len(chosen))
            for token in chosen:
                yield [token]

    def _many_rows(self, requests: list[Request], owner: int) -> Iterator[list[int]]:
        while not all(request.is_done for request in requests):
            with self._lock:
                self._check_owner(owner)
                logits = self._session.decode([None if each.is_done else each.generated[-1] for each in requests])
                active = [(index, request) for index, request in enumerate(requests) if not request.is_done]
                chosen = [request.choose(logits[index]) for index, request in active]
            yield chosen

    def _check_owner(self, owner: int) -> None:
        if owner != self._owner:
            raise PrecastError(
                "This stream was left half-way and another call on the same model has taken over its caches. "
                "Use model.new_session() for streams that live side by side."
            )

    def _inputs(self, input_ids: Any, attention_mask: Any) -> tuple[Array, Array]:
        ids = as_ids(to_numpy(input_ids), self._vocabulary())
        return ids, as_mask(to_numpy(attention_mask), ids)

    def _config(self, given: Any, options: dict[str, Any]) -> GenerationConfig:
        config = self.generation_config
        if given is not None:
            config = GenerationConfig.of(given, "generation_config").over(config)
        config = GenerationConfig.of(options, "generate()").over(config)
        config.check()
        return config

    def _check_room(self, rows: list[Array], new: int) -> None:
        longest = max(map(len, rows))
        if longest + new <= self.capacity:
            return
        need = longest + new
        what = f"{longest} tokens" if not new else f"{longest} prompt tokens and {new} new ones, {need} together,"
        fewer = (
            f" Ask for max_new_tokens={self.capacity - longest} at most, or" if new and longest < self.capacity else ""
        )
        verb = " compile" if fewer else " Compile"
        raise InputError(
            f"{what} do not fit into the compiled capacity of {self.capacity}.{fewer}{verb} a larger one: "
            f"{self._recompile(need)}"
        )

    def _check_lookup(self, config: GenerationConfig) -> None:
        if not config.prompt_lookup_num_tokens or self._session.is_flexible:
            return
        lengths = self.artifact.contract.shapes.prefill_lengths
        static = f" and the fixed lengths --prefill-lengths {','.join(map(str, lengths))}" if lengths else ""
        raise InputError(
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} checks several tokens of one row in one step, "
            f"which takes a model compiled for batch 1 and any length; this one was compiled for batch "
            f"{self.batch_size}{static}. Pass prompt_lookup_num_tokens=0 to go without, or export it again with "
            f"--batch-size 1 and without --prefill-lengths."
        )

    def _requests(
        self,
        rows: list[Array],
        count: int,
        config: GenerationConfig,
        processors: Sequence[Processor] = (),
        criteria: Sequence[Any] = (),
        first: int = 0,
    ) -> list[Request]:
        # A row's randomness depends on the seed and on its own place, not on its neighbours.
        seeds = [None if config.seed is None else [config.seed, first + index] for index in range(len(rows))]
        samplers = [
            Sampler(config, row, np.random.default_rng(seed), processors) for row, seed in zip(rows, seeds, strict=True)
        ]
        ends = Ends(config, criteria, self.tokenizer if config.stops else None)
        return [
            Request(row, count, sampler, ends, _lookup(config, row))
            for row, sampler in zip(rows, samplers, strict=True)
        ]


def _lookup(config: GenerationConfig, row: Array) -> Lookup | None:
    if not config.prompt_lookup_num_tokens:
        return None
    return Lookup(row.tolist(), config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)


def _check_streamer(streamer: Any, rows: list[Array]) -> None:
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise InputError(f"streamer has no {name}(); it needs put(tokens) and end().")
    if len(rows) > 1:
        raise InputError(f"A streamer follows one row; this batch has {len(rows)}.")


def _assemble(ids: Array, answers: list[list[int]], config: GenerationConfig) -> Array:
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(config.eos_ids), 0)
    width = max(map(len, answers))
    result = np.full((len(ids), ids.shape[1] + width), pad, np.int64)
    result[:, : ids.shape[1]] = ids
    for row, answer in zip(result, answers, strict=True):
        row[ids.shape[1] : ids.shape[1] + len(answer)] = answer
    return result
