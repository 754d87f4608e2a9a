"""Encoder-decoders: the base of all, and those of text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ..artifact import ENCODER_MASK, Artifact
from ..artifact.schema import Graph, Variant
from ..engines import Engine
from ..errors import InputError
from ..generation.config import GenerationConfig
from ..generation.prompt import Prompt
from ..generation.sampling import Processor
from ..generation.session import Session
from ..inputs.padding import as_ids, as_mask, real_rows, scatter_rows
from ..inputs.tensors import ModelOutput, allocate, convert_like, to_numpy
from .generative import Call, Generation, GenerativeModel, TokenStream, check_streamer
from .training_loss import with_labels

__all__ = ["CompiledModelForSeq2SeqLM", "EncoderCall", "EncoderDecoder"]

Array = np.ndarray[Any, Any]
Source = TypeVar("Source")


class EncoderDecoder(GenerativeModel, Generic[Source]):
    """An encoder, and a decoder whose layers attend to its outputs.

    Each source is encoded by itself, padded only up to the compiled length; its cross-attention keys and values then
    lie in the session, in the rows of that source.
    """

    def __init__(self, artifact: Artifact, variant: Variant, engine: Engine) -> None:
        super().__init__(artifact, variant, engine)
        graphs = [graph for graph in variant.graphs if graph.role == "encode"]
        self._encoders = {int(graph.length): EncoderCall(engine, graph) for graph in graphs}  # type: ignore[arg-type]
        # The sources whose encoder outputs the session holds, and how many rows each has.
        self._held: tuple[Sequence[Source], int] = [], 0

    @property
    def capacity(self) -> int:
        """Tokens per answer that fit, those that it begins with included."""
        return self._session.capacity

    def _run_encoder(self, source: Source) -> tuple[EncoderCall, int]:
        """Run the encoder; returns the call that holds its outputs, and how many positions are no padding."""
        raise NotImplementedError

    def _load_contexts(self, contexts: Sequence[Source], width: int) -> None:
        session = self._session
        session.reset()
        if self._is_loaded(contexts, width):
            return
        self._held = [], width
        for index, source in enumerate(contexts):
            call, size = self._run_encoder(source)
            call.copy_to(session, slice(index * width, (index + 1) * width), size)
        self._held = contexts, width

    def _is_loaded(self, contexts: Sequence[Source], width: int) -> bool:
        """Whether the session holds the encoder outputs of these very objects already."""
        held, rows = self._held
        return rows == width and len(held) == len(contexts) and all(map(operator.is_, held, contexts))

    def _score_rows(self, sources: Sequence[Source], ids: Array, mask: Array) -> Array:
        """Logits for every token of the decoder's rows, zeros where there is padding."""
        self._check_rows(len(ids), len(sources))
        self._check_room(int(mask.sum(1).max()), 0)
        rows, found = real_rows(ids, mask), []
        with self._lock:
            self._owner += 1
            for part in self._batch_slices(len(rows)):
                self._load_contexts(sources[part], 1)
                found += self._session.logits_at(rows[part], [range(len(row)) for row in rows[part]])
        return scatter_rows(found, mask)

    def start_token(self, config: GenerationConfig) -> int:
        """The token that an answer begins with."""
        found = _configured_start(config)
        if found is None:
            raise InputError(
                "Neither the call nor the artifact's generation_config.json says what an answer begins with. Pass "
                "decoder_start_token_id=N or decoder_input_ids."
            )
        return found

    def _check_rows(self, count: int, sources: int) -> None:
        if count != sources:
            raise InputError(f"decoder_input_ids has {count} rows; there are {sources} sources.")

    def _check_room(self, first: int, new: int) -> None:
        """Raise InputError where an answer does not fit."""
        need = first + new
        if need <= self.capacity:
            return
        fewer = f" Ask for max_new_tokens={self.capacity - first} at most." if new and first < self.capacity else ""
        what = f"{first} tokens and {new} new ones" if new else f"{first} tokens"
        raise InputError(
            f"An answer of {what} does not fit into the compiled {self.capacity}.{fewer} "
            f"{self._suggest_larger(max(self._encoders), f' --decoder-sequence-length {need}')}"
        )


class CompiledModelForSeq2SeqLM(EncoderDecoder[Array]):
    """Text to text: translation, summarization and others."""

    task = "text2text-generation"

    @with_labels
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
    ) -> ModelOutput:
        """Logits for every token of the decoder's rows.

        Args:
            input_ids: the sources, int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1; padding may be on either side.
            decoder_input_ids: int64 [batch, answer], each row beginning with the decoder's start token.
            decoder_attention_mask: [batch, answer] of 0 and 1.

        Returns:
            `.logits` [batch, answer, vocabulary]: each row's as without its padding, zeros where there is padding.

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        if decoder_input_ids is None:
            raise InputError("Logits are those of the decoder's rows: pass decoder_input_ids, or use generate().")
        sources = self._check_sources(self._main_input("input_ids", input_ids), attention_mask)
        ids, mask = self._check_decoder_inputs(decoder_input_ids, decoder_attention_mask)
        return ModelOutput(logits=convert_like(input_ids, self._score_rows(sources, ids, mask)))

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        streamer: Any = None,
        *,
        prefix_allowed_tokens_fn: Any = None,
        inputs: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """Answer each source, as `transformers.GenerationMixin.generate` does.

        Args:
            input_ids, inputs: the sources, int64 [batch, length], numpy or torch, by either name; without any,
                bos_token_id.
            attention_mask: [batch, length] of 0 and 1; padding may be anywhere.
            generation_config: a GenerationConfig, ours or transformers', or a dict. `options` take precedence over it,
                it over the artifact's generation_config.json, and that over the defaults.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: as for decoders.
            streamer: told the first tokens, then each new one by `put`, and the end by `end`; for several rows a list
                of them, each of which is told its own row.
            decoder_input_ids: what the answers begin with, int64 [batch, length]; decoder_start_token_id if None, and
                that goes in front where no row begins with it.
            decoder_attention_mask: which of them are no padding.
            options: fields of GenerationConfig, such as max_new_tokens=64 or num_beams=4.

        Returns:
            int64 [batch * num_return_sequences, first + new]: what each answer begins with and what was generated;
            rows that ended early are filled with pad_token_id. With return_dict_in_generate as for decoders.

        Raises:
            InputError: an argument is wrong, or the request is longer than compiled for.
        """
        functions = {"processors": logits_processor, "criteria": stopping_criteria, "streamer": streamer,
                     "allowed": prefix_allowed_tokens_fn}  # fmt: skip
        begin = decoder_input_ids, decoder_attention_mask
        return self._generate_all(
            self._prepare(input_ids, attention_mask, generation_config, options, functions, begin, inputs)
        )

    def stream(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        *,
        prefix_allowed_tokens_fn: Any = None,
        inputs: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        **options: Any,
    ) -> TokenStream:
        """The tokens of one answer as they are generated, without those that it begins with; arguments as for
        `generate`, and max_time counts from this call.

        The stream may be left at any time; a later call on the same model takes over the caches.
        """
        functions = {"processors": logits_processor, "criteria": stopping_criteria, "allowed": prefix_allowed_tokens_fn}
        options = {"return_dict_in_generate": False, **options}
        begin = decoder_input_ids, decoder_attention_mask
        return self._stream_row(
            self._prepare(input_ids, attention_mask, generation_config, options, functions, begin, inputs)
        )

    def _prepare(
        self, given: Any, mask: Any, generation_config: Any, options: dict[str, Any], functions: dict[str, Any],
        begin: tuple[Any, Any], inputs: Any,
    ) -> Call:  # fmt: skip
        """Check the arguments of generate() or stream(). Raises InputError."""
        config = self._merge_config(generation_config, options)
        given = self._main_input("input_ids", given, inputs, config.bos_token_id)
        sources = self._check_sources(given, mask)
        if begin[0] is None:
            begin = [[self.start_token(config)]] * len(sources), begin[1]
        front, is_real = self._prepend_start(*self._check_decoder_inputs(*begin), config)
        self._check_rows(len(front), len(sources))
        prompts = real_rows(front, is_real)
        first = max(map(len, prompts))
        full, count = self._answer_lengths(
            lambda by: by.new_tokens(front.shape[1]), config, self.capacity - first, generation_config, options,
            functions["criteria"],
        )  # fmt: skip
        self._check_room(first, count)
        self._check_lookup(config)
        check_streamer(functions.get("streamer"), len(sources), config)
        asked = Generation(given, config, count, full=full, **functions)
        return Call(given, Prompt.rows(prompts, front), sources, asked, front)

    def _check_decoder_inputs(self, given: Any, mask: Any) -> tuple[Array, Array]:
        """decoder_input_ids and decoder_attention_mask, checked."""
        ids = as_ids(to_numpy(given), self._vocabulary_size(), "decoder_input_ids")
        return ids, as_mask(to_numpy(mask), ids)

    def _prepend_start(self, ids: Array, mask: Array, config: GenerationConfig) -> tuple[Array, Array]:
        """Put the start token before all rows where none of them begins with it, as transformers does."""
        start = _configured_start(config)
        if start is None or (ids[:, 0] == start).any():
            return ids, mask
        before = ((0, 0), (1, 0))
        return np.pad(ids, before, constant_values=start), np.pad(mask, before, constant_values=True)

    def _check_sources(self, input_ids: Any, attention_mask: Any) -> list[Array]:
        ids = as_ids(to_numpy(input_ids), self._vocabulary_size())
        rows = real_rows(ids, as_mask(to_numpy(attention_mask), ids))
        longest, limit = max(map(len, rows)), max(self._encoders)
        if longest > limit:
            raise InputError(
                f"A source has {longest} tokens; the model was compiled for {limit}. {self._suggest_larger(longest)}"
            )
        return rows

    def _source_tokens(self, prompt: Prompt, context: Array) -> Array:
        return context

    def _run_encoder(self, source: Array) -> tuple[EncoderCall, int]:
        call = self._encoders[min(length for length in self._encoders if length >= len(source))]
        call.inputs["input_ids"][:] = call.pads["input_ids"]
        call.inputs["input_ids"][0, : len(source)] = source
        call.inputs["attention_mask"][:] = 0
        call.inputs["attention_mask"][0, : len(source)] = 1
        call.run()
        return call, len(source)


class EncoderCall:
    """An encode graph bound to its arrays."""

    def __init__(self, engine: Engine, graph: Graph) -> None:
        self.pads = {spec.name: spec.pad for spec in graph.inputs}
        self.inputs = {spec.name: allocate(_static_sizes(spec.shape), spec.dtype) for spec in graph.inputs}
        self._outputs = {spec.name: allocate(_static_sizes(spec.shape), spec.dtype) for spec in graph.outputs}
        self.run = engine.bind(graph.name, self.inputs, self._outputs)

    def copy_to(self, session: Session, rows: slice, size: int) -> None:
        """Copy the outputs into these rows of the session, which attend to their first `size` positions."""
        for name, array in self._outputs.items():
            session.context[name][rows, :, : array.shape[2]] = array
        if ENCODER_MASK in session.context:
            session.context[ENCODER_MASK][rows] = np.arange(session.context[ENCODER_MASK].shape[1]) < size


def _configured_start(config: GenerationConfig) -> int | None:
    return config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id


def _static_sizes(shape: Sequence[Any]) -> list[int]:
    return [size for size in shape if isinstance(size, int)]
