"""Text generation with a compiled decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import only_known
from ..errors import InputError
from ..generation.adapters import NO_SLOTS, LoadedAdapter, adapter_rows
from ..generation.config import GenerationConfig
from ..generation.given_prefix import hash_prefix, open_prefix
from ..generation.prompt import Prompt
from ..generation.sampling import Processor
from ..generation.session_file import load_session, save_session
from ..inputs.padding import as_array, as_ids, as_mask, real_rows, scatter_rows
from ..inputs.tensors import ModelOutput, convert_like, to_numpy
from .call_options import check_positions
from .generative import Call, Generation, GenerativeModel, TokenStream, check_streamer
from .training_loss import with_labels

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CompiledModelForCausalLM", "infer_mask"]

Array = np.ndarray[Any, Any]


class CompiledModelForCausalLM(GenerativeModel):
    """A decoder with its key/value cache of fixed capacity."""

    task = "text-generation"
    _after_prefix: Self | None = None
    """The session of the prefix that a call named last."""

    @property
    def capacity(self) -> int:
        """Tokens per row that fit, prompt and answer together, after a prefix."""
        return self._session.capacity

    @property
    def prefix_length(self) -> int:
        """Positions of the prefix that every row begins with; 0 where there is none."""
        return self._prefix.length if self._prefix else 0

    @property
    def prefix_sha256(self) -> str | None:
        """The hash of the file of a prefix that was given at run time; None where there is none."""
        return self._session.prefix_sha256

    @only_known
    def new_session(self, *, prefix: str | Path | None = None) -> Self:
        """The same model with its own buffers, caches and lock, for another thread. Weights are shared, and what the
        caches hold is copied, unless a call is using them: the new session need not read the same beginning again.

        Args:
            prefix: the folder of a PEFT adapter of type PREFIX_TUNING: the caches of the new session begin with it, and
                hold nothing else. By default they begin as this session's do.

        Raises:
            InputError: there is no such prefix, it is of another kind or of another model, or this model has no place
                for it.
        """
        if prefix is None:
            return super().new_session()
        read = open_prefix(prefix, self.artifact, self._cached_graphs[0], self._engine)
        other = type(self)(self.artifact, self.variant, self._engine, slots=self._slots, prefix=read)
        other._take_settings(self)
        return other

    @only_known
    def reset(self) -> None:
        """Forget the tokens of earlier calls, so that the next one computes all of its prompt."""
        super().reset()
        if self._after_prefix is not None:
            self._after_prefix.reset()

    def _model_after(self, prefix: str | Path | None) -> Self:
        """The session that answers a call which names this prefix; without one the model itself. Raises InputError."""
        if prefix is None:
            return self
        model = self._after_prefix
        if model is None or model.prefix_sha256 != hash_prefix(prefix):
            model = self._after_prefix = self.new_session(prefix=prefix)
        model._take_settings(self)
        return model

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are loaded: the hash of the files of each, by name."""
        return self._slots.hashes if self._slots else {}

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """Where the files of the adapters were that are loaded, by name."""
        return self._slots.paths if self._slots else {}

    @property
    def prefix_path(self) -> str | None:
        """Where a prefix that was given at run time was said to be; None where there is none."""
        return self._prefix.given if self._prefix else None

    @only_known
    def load_adapter(self, name: str, path: str | Path, *, force_base: bool = False) -> None:
        """Load a LoRA adapter, which `generate(…, adapter=name)` then adds to the model's weights, for all sessions of
        this model.

        Args:
            name: what calls are to name it by.
            path: the directory that peft's save_pretrained() wrote, with its weights in safetensors.
            force_base: take one that names another base model.

        Raises:
            InputError: the model has no slot for it, or it is not of this model, or of another kind.
            OutOfMemoryError: there is not so much memory free.
        """
        if self._slots is None:
            raise InputError(f"The adapter {name!r:.80} cannot be loaded: {NO_SLOTS}")
        source = self.artifact.contract.source
        base = source.model if source.revision and not force_base else None
        self._slots.load(name, Path(path), base)

    @only_known
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, so that another one can be loaded. Raises InputError where none of this name is."""
        if self._slots is None:
            raise InputError(f"No adapter {name!r:.80} is loaded: {NO_SLOTS}")
        self._slots.unload(name)

    def _shared_parts(self) -> dict[str, Any]:
        return {"slots": self._slots, "prefix": self._prefix}

    def _held_inputs(self) -> dict[str, Array]:
        return self._slots.arrays if self._slots else {}

    @with_labels
    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, *, adapter: Any = None
    ) -> ModelOutput:
        """Logits for every token of every row.

        Args:
            input_ids: int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1; padding may be on either side.
            position_ids: [batch, length], only those that attention_mask gives, by which the model counts anyway.
            adapter: the name of a loaded adapter, or a list with one name, or None, for each row.

        Returns:
            `.logits` [batch, length, vocabulary]: each row's as without its padding, zeros where there is padding.

        Raises:
            InputError: the tensors do not fit each other or the compiled sizes.
        """
        ids, mask = self._check_inputs(self._main_input("input_ids", input_ids), attention_mask)
        check_positions(position_ids, mask)
        rows = real_rows(ids, mask)
        self._check_room(rows, 0)
        logits = self.logits_at(rows, [range(len(row)) for row in rows], adapter=adapter)
        return ModelOutput(logits=convert_like(input_ids, scatter_rows(logits, mask)))

    @only_known
    def logits_at(
        self, rows: Sequence[Array], positions: Sequence[Sequence[int]], *, adapter: Any = None
    ) -> list[Array]:
        """Logits after some tokens of each row: for scores, perplexity, comparison.

        Args:
            rows: per row its tokens, int64 [length].
            positions: per row the indices of tokens, ascending.
            adapter: the name of a loaded adapter, or a list with one name, or None, for each row.

        Returns:
            Per row [len(positions), vocabulary].

        Raises:
            InputError: the tokens are none or do not fit, or there is none at a position.
        """
        rows = [
            as_ids(to_numpy(row), self._vocabulary_size(), f"rows[{at}]", ("length",)) for at, row in enumerate(rows)
        ]
        if not rows or len(positions) != len(rows):
            raise InputError(f"There are {len(rows)} rows and {len(positions)} lists of positions; each row has one.")
        positions = [
            _check_row_positions(asked, len(row), at)
            for at, (asked, row) in enumerate(zip(positions, rows, strict=True))
        ]
        self._check_room(rows, 0)
        adapters = self._adapter_rows(adapter, len(rows))
        found: list[Array] = []
        with self._lock:
            self._owner += 1
            for part in self._batch_slices(len(rows)):
                found += self._session.logits_at(rows[part], positions[part], adapters[part])
        return found

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
        assistant_model: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        inputs: Any = None,
        position_ids: Any = None,
        adapter: Any = None,
        prefix: str | Path | None = None,
        **options: Any,
    ) -> Any:
        """Continue each row, as `transformers.GenerationMixin.generate` does.

        What the caches hold from the call before is used again: at batch 1 whatever a prompt begins with, as in the
        next turn of a chat; with more rows only where each lacks its last token. The answer is the one from scratch,
        but a quantized model's kernels round one token otherwise than several, so there it may differ; `reset()` first
        makes it repeatable.

        Args:
            input_ids, inputs: int64 [batch, length], numpy or torch, by either name; without any, bos_token_id.
            attention_mask: [batch, length] of 0 and 1; padding may be anywhere, the answer is that of the row without.
                None takes pad_token_id for padding, as transformers does, unless it is among eos_token_id.
            generation_config: a GenerationConfig, ours or transformers', or a dict. `options` take precedence over it,
                it over the artifact's generation_config.json, and that over the defaults.
            logits_processor: each called with one row's tokens [1, length], padding included, and logits
                [1, vocabulary]; returns logits. Tensors of torch, where input_ids are or where it is of a class of
                transformers, otherwise numpy's arrays.
            stopping_criteria: each called with the same; true ends the row. Classes of transformers get no logits.
            streamer: told the prompt, then each new token by `put`, and the end by `end`; for several rows a list of
                them, each of which is told its own row.
            prefix_allowed_tokens_fn: called with a prompt's index and one row's tokens [length]; returns the ids that
                may come next.
            assistant_model: another CompiledModelForCausalLM of the same vocabulary, smaller, which guesses tokens
                that one step checks: quicker, and the same answer. For batch 1. A quantized model's kernels round one
                token otherwise than several, so there the answer may differ.
            negative_prompt_ids, negative_prompt_attention_mask: with guidance_scale, what to lead away from, int64
                [batch, length]; the prompt's last token if None.
            position_ids: [batch, length], only those that attention_mask gives.
            adapter: the name of a loaded adapter, or a list with one name, or None, for each row.
            prefix: the folder of a PEFT adapter of type PREFIX_TUNING, which stands before every row, as in a
                `new_session(prefix=…)`, one of which is kept for the last prefix.
            options: fields of GenerationConfig, such as max_new_tokens=64; OpenAI's n and stop are understood, too.

        Returns:
            int64 [batch * num_return_sequences, length + new]: the input followed by what was generated; rows that
            ended early are filled with pad_token_id. Without eos_token_id nothing fills a row that a stopping criterion
            ended: it goes on until all rows that run with it have ended, as in transformers. With
            return_dict_in_generate an output with `.sequences` and, where asked for: `.scores` and `.logits`, for each
            step [rows, vocabulary], zeros for rows that ended; of beams `.sequences_scores` [rows] and `.beam_indices`
            [rows, new]; `.logprobs` [rows, new], `.top_logprobs` and `.top_logprobs_ids` [rows, new, top_logprobs]; of
            an assistant `.draft_tokens` and `.accepted_draft_tokens`, how many it guessed and how many were right.

        Raises:
            InputError: an argument is wrong, or the request is longer than compiled for.
        """
        functions = {"processors": logits_processor, "criteria": stopping_criteria, "streamer": streamer,
                     "allowed": prefix_allowed_tokens_fn}  # fmt: skip
        model = self._model_after(prefix)
        call = model._prepare(
            input_ids, attention_mask, generation_config, options, functions, inputs=inputs, position_ids=position_ids,
            assistant=assistant_model, negative=(negative_prompt_ids, negative_prompt_attention_mask),
            adapter=adapter,
        )  # fmt: skip
        return model._generate_all(call)

    def stream(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        *,
        prefix_allowed_tokens_fn: Any = None,
        assistant_model: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        inputs: Any = None,
        position_ids: Any = None,
        adapter: Any = None,
        prefix: str | Path | None = None,
        **options: Any,
    ) -> TokenStream:
        """The tokens of one row as they are generated; arguments as for `generate`, and max_time counts from this call.

        The stream may be left at any time. A later call on the same model takes over the caches, and the stream then
        ends with a PrecastError; `new_session()` gives it caches of its own.
        """
        functions = {"processors": logits_processor, "criteria": stopping_criteria, "allowed": prefix_allowed_tokens_fn}
        options = {"return_dict_in_generate": False, **options}
        model = self._model_after(prefix)
        call = model._prepare(
            input_ids, attention_mask, generation_config, options, functions, inputs=inputs, position_ids=position_ids,
            assistant=assistant_model, negative=(negative_prompt_ids, negative_prompt_attention_mask),
            adapter=adapter,
        )  # fmt: skip
        return model._stream_row(call)

    def _prepare(
        self, given: Any, mask: Any, generation_config: Any, options: dict[str, Any], functions: dict[str, Any], *,
        inputs: Any, position_ids: Any, assistant: Any, negative: tuple[Any, Any], adapter: Any,
    ) -> Call:  # fmt: skip
        """Check the arguments of generate() or stream(). Raises InputError."""
        config = self._merge_config(generation_config, options)
        given = self._main_input("input_ids", given, inputs, config.bos_token_id)
        ids, mask = self._check_inputs(given, mask, config)
        check_positions(position_ids, mask)
        rows = real_rows(ids, mask)
        room = self.capacity - max(map(len, rows))
        full, count = self._answer_lengths(
            lambda by: by.new_tokens(ids.shape[1]), config, room, generation_config, options, functions["criteria"]
        )
        self._check_room(rows, count)
        self._check_lookup(config)
        check_streamer(functions.get("streamer"), len(rows), config)
        asked = Generation(
            given, config, count, full=full, draft=self._draft_for(assistant, config),
            negative=self._negative_rows(*negative, rows, config, count), **functions,
        )  # fmt: skip
        adapters = self._adapter_rows(adapter, len(rows))
        return Call(given, Prompt.rows(rows, ids, adapters), [None] * len(rows), asked, ids)

    @only_known
    def save_session(self, path: str | Path) -> None:
        """Write what the caches hold, the prompts and answers of the last call, to a file that `load_session` opens:
        a long system prompt is read once per machine.

        It belongs to this artifact and variant; only its owner can read it. Raises InputError where it cannot be
        written, and of models whose caches are in the memory of a device.
        """
        with self._lock:
            save_session(self._session, Path(path), self.artifact.contract.digest, self.variant.name)

    @only_known
    def load_session(self, path: str | Path) -> int:
        """Hold what was saved by `save_session`: the next call computes only what its prompt has besides. Returns the
        number of tokens.

        Whoever can write the file can make the model believe that it has read other tokens than it says. Raises
        InputError for a file that is not there, or of another artifact, and FormatError for one that is damaged.
        """
        with self._lock:
            self._owner += 1
            load_session(
                self._session, Path(path), self.artifact.contract.digest, self.variant.name, self._session.vocabulary
            )
            return sum(map(len, self._session.tokens))

    def _negative_rows(
        self, given: Any, mask: Any, rows: list[Array], config: GenerationConfig, new: int
    ) -> list[Array] | None:
        """What guides answers away from it, one row per prompt; None without guidance. Raises InputError."""
        if not config.guides:
            if given is not None or mask is not None:
                raise InputError(
                    "negative_prompt_ids needs guidance_scale, by how much to lead away from it; 1.5, say."
                )
            return None
        if given is None:
            return [row[-1:] for row in rows]
        ids = as_ids(to_numpy(given), self._vocabulary_size(), "negative_prompt_ids")
        found = real_rows(ids, as_mask(to_numpy(mask), ids))
        if len(found) != len(rows):
            raise InputError(f"negative_prompt_ids has {len(found)} rows and input_ids {len(rows)}; each has one.")
        self._check_room(found, new)
        return found

    def _adapter_rows(self, given: Any, rows: int) -> list[LoadedAdapter | None]:
        """The adapter of each row. Raises InputError where a prefix stands before them."""
        found = adapter_rows(self._slots, given, rows)
        if self._prefix is not None and any(found):
            raise InputError(
                f"adapter={given!r:.80} cannot be combined with a prefix, whose keys and values are those of the model "
                f"without an adapter; leave one of them out."
            )
        return found

    def _check_inputs(
        self, input_ids: Any, attention_mask: Any, config: GenerationConfig | None = None
    ) -> tuple[Array, Array]:
        ids = as_ids(to_numpy(input_ids), self._vocabulary_size())
        if attention_mask is None and config is not None:
            return ids, infer_mask(ids, config)
        return ids, as_mask(to_numpy(attention_mask), ids)

    def _check_room(self, rows: list[Array], new: int) -> None:
        longest = max(map(len, rows))
        if longest + new <= self.capacity:
            return
        need = longest + new
        what = f"{longest} tokens" if not new else f"{longest} prompt tokens and {new} new ones, {need} together,"
        fewer = f" Ask for max_new_tokens={self.capacity - longest} at most." if new and longest < self.capacity else ""
        taken = self.prefix_length
        capacity = f"{self.capacity + taken}, of which a prefix takes {taken}" if taken else str(self.capacity)
        raise InputError(
            f"{what} do not fit into the compiled capacity of {capacity}.{fewer} {self._suggest_larger(need + taken)}"
        )


def infer_mask(ids: Array, config: GenerationConfig) -> Array:
    """The attention mask of prompts given without one, as transformers' generate() infers it: padding is pad_token_id,
    unless that is an end-of-sequence token too. Raises InputError for a row of padding only."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_ids:
        return np.ones(ids.shape, bool)
    mask: Array = ids != pad
    if not mask.any(1).all():
        raise InputError(
            f"Row {int(np.argmin(mask.any(1)))} of input_ids holds nothing but pad_token_id={pad}. If that is what it "
            f"says, pass attention_mask."
        )
    return mask


def _check_row_positions(asked: Sequence[int], length: int, row: int) -> list[int]:
    """Check the positions that are asked for in a row of `length` tokens. Raises InputError."""
    found = as_array(asked, f"positions[{row}]")
    is_good = found.ndim == 1 and found.size and found.dtype.kind in "iu"
    if not is_good or found[0] < 0 or found[-1] >= length or np.any(found[1:] <= found[:-1]):
        raise InputError(
            f"positions[{row}] must be whole numbers, ascending, from 0 to {length - 1}, the last token of that row; "
            f"these are {asked!r:.80}."
        )
    positions: list[int] = found.tolist()
    return positions
