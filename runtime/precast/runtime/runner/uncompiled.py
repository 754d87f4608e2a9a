"""A checkpoint that runs without having been compiled ahead of time, with the interface of a compiled decoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import vocabulary_of
from ..artifact.published_json import parse_object
from ..errors import InputError
from ..generation.config import GenerationConfig
from ..inputs.padding import as_ids, as_mask, real_rows, scatter_rows
from ..inputs.tensors import ModelOutput, convert_like, to_numpy, to_python
from ..inputs.tokenizer import Tokenizer
from ..models.causal_lm import infer_mask
from ..models.generative import check_seeds

__all__ = ["UncompiledModel"]

Array = np.ndarray[Any, Any]


class UncompiledModel:
    """A decoder in the mode `eager` or `torch-compile`; `open_model` makes it.

    Args:
        inner: the model as the exporter opens it, which knows PyTorch.
        mode: its name.
    """

    task = "text-generation"

    def __init__(self, inner: Any, mode: str) -> None:
        self._inner, self.mode = inner, mode
        self.batch_size: int = inner.batch_size
        self.capacity: int = inner.capacity
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        sizes = f"batch_size={self.batch_size}, capacity={self.capacity}"
        return f"{type(self).__name__}({self._inner.name!r}, mode={self.mode!r}, {sizes})"

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return str(self._inner.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return dict(self._inner.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, as an artifact of this checkpoint has it. Raises ArtifactError where there is none."""
        return Tokenizer(Path(self.name), _Files(self._inner.files), names=("input_ids", "attention_mask"))

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The settings of calls that give none: the checkpoint's generation_config.json."""
        data = self._inner.files.get("generation_config.json")
        found = {} if data is None else parse_object(data, f"{self.name}/generation_config.json")
        return GenerationConfig.published(found, "generation_config.json")

    @property
    def compile_seconds(self) -> float | None:
        """What compiling took so far; None where nothing is compiled."""
        step = self._inner.step
        return None if step is None else float(step.seconds)

    @property
    def compiled_graphs(self) -> int:
        """How many graphs were compiled: one for each shape of the decode step, where one graph can be made of it."""
        return 0 if self._inner.step is None else int(self._inner.step.graphs)

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> ModelOutput:
        """Logits for every token of every row, as `CompiledModelForCausalLM` gives them; in the mode `torch-compile`
        token by token, by the compiled step. Raises InputError."""
        ids, mask = self._check(input_ids, attention_mask)
        rows = real_rows(ids, mask)
        self._check_room(max(map(len, rows)), 0)
        with self._lock:
            logits = self._step_through(rows) if self._inner.step is not None else self._forward(rows)
        return ModelOutput(logits=convert_like(input_ids, scatter_rows(logits, mask)))

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Continue each row by transformers' own generate().

        Args:
            input_ids: int64 [batch, length], numpy or torch.
            attention_mask: [batch, length] of 0 and 1; padding may be anywhere.
            options: of transformers' generate(), and `seed`, which seeds PyTorch, or a list with one for each row,
                which is then drawn by itself: the tokens that are drawn are others than those of a compiled model.
                Scores and other outputs besides the tokens are not returned.

        Returns:
            int64 [batch * num_return_sequences, length + new]: the input followed by what was generated.

        Raises:
            InputError: an argument is wrong, or the request is longer than the capacity.
        """
        settings = {name: to_python(value) for name, value in options.items()}
        config = _known_settings(settings).over(self.generation_config)
        ids, mask = self._check(input_ids, attention_mask, config)
        rows, width = real_rows(ids, mask), ids.shape[1]
        self._check_room(width, config.new_tokens(width))
        seeds = settings.pop("seed", None)
        seeds = seeds if config.do_sample else None
        check_seeds(seeds, len(rows))
        with self._lock:
            whole = self._generate(rows, width, settings, seeds)
        front = np.repeat(ids, len(whole) // len(ids), 0)
        return convert_like(input_ids, np.concatenate([front, whole[:, width:]], 1))

    def _generate(self, rows: Sequence[Array], width: int, settings: dict[str, Any], seeds: Any) -> Array:
        """transformers' answers, int64 [rows, width + new]; of several seeds each row's by its own."""
        if not isinstance(seeds, list):
            seeded = settings if seeds is None else {**settings, "seed": seeds}
            found: Array = self._inner.generate(*_pad_left(rows, width), seeded)
            return found
        parts = [
            self._inner.generate(*_pad_left([row], width), {**settings, "seed": seed})
            for row, seed in zip(rows, seeds, strict=True)
        ]
        pad, longest = self.generation_config.pad_token_id or 0, max(part.shape[1] for part in parts)
        filled = [np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=pad) for part in parts]
        return np.concatenate(filled)

    def session(self) -> Any:
        """Its cache of fixed capacity, to be stepped by a loop of your own: `prefill(rows)` and `decode(tokens)` give
        logits. Any other call on the model takes it over."""
        return self._inner.session()

    def warm_up(self) -> float:
        """Run one prefill and one decode step, which compiles what is compiled; returns the seconds it took."""
        started = time.perf_counter()
        with self._lock:
            session = self.session()
            session.prefill([np.zeros(1, np.int64)] * self.batch_size)
            session.decode([0] * self.batch_size)
        return time.perf_counter() - started

    def reset(self) -> None:
        """Nothing is kept from call to call; compiled models have a method of this name."""

    def to(self, device: str) -> UncompiledModel:
        """Move the weights to a device. Raises HostError."""
        self._inner.to(device)
        return self

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the checkpoint as transformers does."""
        self._inner.save(Path(save_directory))

    def profile(self, **schedule: Any) -> AbstractContextManager[Any]:
        """Record steps by torch.profiler, for `ModelRunner.define_profiler`."""
        found: AbstractContextManager[Any] = self._inner.profile(**schedule)
        return found

    def _forward(self, rows: Sequence[Array]) -> list[Array]:
        logits = self._inner.logits(*_pad_left(rows, max(map(len, rows))))
        return [values[len(values) - len(row) :] for row, values in zip(rows, logits, strict=True)]

    def _step_through(self, rows: Sequence[Array]) -> list[Array]:
        found: list[list[Array]] = [[] for _ in rows]
        for start in range(0, len(rows), self.batch_size):
            session, part = self.session(), rows[start : start + self.batch_size]
            logits = session.prefill([row[:1] for row in part])
            for step in range(max(map(len, part))):
                if step:
                    logits = session.decode([int(row[step]) if step < len(row) else None for row in part])
                for index, row in enumerate(part):
                    if step < len(row):
                        found[start + index].append(logits[index])
        return [np.stack(each) for each in found]

    def _check(
        self, input_ids: Any, attention_mask: Any, config: GenerationConfig | None = None
    ) -> tuple[Array, Array]:
        ids = as_ids(to_numpy(input_ids), vocabulary_of(self.config))
        if attention_mask is None and config is not None:
            return ids, infer_mask(ids, config)
        return ids, as_mask(to_numpy(attention_mask), ids)

    def _check_room(self, length: int, new: int) -> None:
        if length + new > self.capacity:
            what = f"{length} tokens" if not new else f"{length} prompt tokens and {new} new ones"
            fewer = (
                f" Ask for max_new_tokens={self.capacity - length} at most." if new and length < self.capacity else ""
            )
            raise InputError(
                f"{what} do not fit into the capacity of {self.capacity}.{fewer} Open the model with "
                f"sequence_length={length + new}."
            )


class _Files:
    """Files by name, as `inputs.companions.Readable`."""

    def __init__(self, held: Mapping[str, bytes]) -> None:
        self._held = held

    def get(self, name: str) -> bytes | None:
        """See Readable."""
        return self._held.get(name)

    def below(self, folder: str) -> dict[str, bytes]:
        """See Readable."""
        start = f"{folder}/"
        return {name.removeprefix(start): data for name, data in self._held.items() if name.startswith(start)}


def _known_settings(settings: Mapping[str, Any]) -> GenerationConfig:
    """The settings that a compiled model has too, checked: what transformers alone has is checked there. Raises
    InputError for a value of another type or out of range."""
    known = {name: value for name, value in settings.items() if name in GenerationConfig.names()}
    config = replace(GenerationConfig.of(known, "generate()"), unsupported={})
    config.check()
    return config


def _pad_left(rows: Sequence[Array], width: int) -> tuple[Array, Array]:
    """Token ids and attention mask, int64 [rows, width], padded on the left, as transformers continues rows."""
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return ids, mask
