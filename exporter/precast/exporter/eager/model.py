"""Open a checkpoint to be run by transformers, or with its decode step compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from precast.runtime.arguments import refuse_unknown
from precast.runtime.artifact import Artifact
from precast.runtime.artifact.locks import Scratch
from precast.runtime.errors import HostError, UsageError
from precast.runtime.terminal import quoted

from ..architectures.cache_names import cache_argument
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.describe import describe_error
from ..companions.files import config_of, write_companions
from .compiled_step import CompiledStep
from .options import EagerOptions
from .profiler import profile_steps
from .session import EagerSession, token_positions
from .source import find_source

__all__ = ["EagerModel", "open_eager"]

Array = np.ndarray[Any, Any]

DEFAULT_CAPACITY = 2048
"""Tokens per row where nothing says how many, and of a static cache unless more are asked for."""
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


def open_eager(name: str | Path, *, compiles: bool = False, **keywords: Any) -> EagerModel:
    """Open a checkpoint, or the one that an artifact was compiled from.

    Args:
        name: a Hub id, a checkpoint directory, a .gguf file, or the directory of an artifact.
        compiles: let torch.compile compile the decode step when it first runs.
        keywords: see EagerOptions.

    Raises:
        UsageError: an option is wrong, or the model is no decoder.
        CheckpointError: there is no such checkpoint, or it cannot be loaded.
        HostError: this machine has no such device.
    """
    options = EagerOptions.of(keywords, "open_model()")
    _check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint, artifact = find_source(name, options)
    task = checkpoint.task(artifact.contract.task if artifact else None)
    if task.kind != "decoder":
        raise UsageError(
            f"{name} does {task.name}; without compiling ahead of time only text-generation is run. Compile it: "
            f"precast export {quoted(checkpoint.given)} --task {quoted(task.name)} -o OUT"
        )
    module = checkpoint.load(task, options.dtype).to(options.device)
    if getattr(module, "_supports_sdpa", False):
        # What transformers runs by default, as anybody does who does not compile.
        module.set_attn_implementation("sdpa")  # type: ignore[operator]
    return EagerModel(checkpoint, module, options, artifact, compiles=compiles)


def _check_device(device: str) -> None:
    """Raise HostError for a device that PyTorch does not have here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HostError(
            f"PyTorch {torch.__version__} cannot use device={device!r} here: {str(error).splitlines()[0]} "
            f"Leave it out to run on the CPU."
        ) from error


class EagerModel:
    """A decoder that transformers runs. Arrays are numpy's; rows with padding anywhere are the caller's to align: here
    padding is on the left.

    Attributes:
        name: the checkpoint, as recorded in artifacts.
        module: the model of transformers.
        batch_size, capacity: see EagerOptions.
        step: the compiled decode step; None where nothing is compiled.
    """

    def __init__(
        self, checkpoint: Checkpoint, module: Any, options: EagerOptions, artifact: Artifact | None, *, compiles: bool
    ) -> None:
        self.name, self.module, self._checkpoint = checkpoint.name, module, checkpoint
        shapes = artifact.contract.shapes if artifact else None
        self.batch_size = options.batch_size or (shapes.batch_size if shapes else 1)
        held = shapes.sequence_length[0] if shapes and shapes.sequence_length else None
        longest = checkpoint.max_length or DEFAULT_CAPACITY
        default = held or (min(longest, DEFAULT_CAPACITY) if compiles else longest)
        self.capacity = options.sequence_length or default
        self.step = CompiledStep(module) if compiles else None
        self._caches: dict[int, Any] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return config_of(self._checkpoint, self.module)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The files that an artifact of this checkpoint has beside its graphs, by name: tokenizer, settings."""
        with Scratch() as folder:
            write_companions(folder, self._checkpoint.tokenizer, self._checkpoint, self.module)
            return {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }

    def to(self, device: str) -> None:
        """Move the weights to a device. Raises HostError."""
        _check_device(device)
        self.module.to(device)
        self._caches.clear()

    def logits(self, ids: Array, mask: Array) -> Array:
        """Logits of every token, [rows, length, vocabulary]."""
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if "position_ids" in signature(self.module.forward).parameters:
            given["position_ids"] = token_positions(given["attention_mask"])
        with torch.no_grad():
            on_device = {name: value.to(self.module.device) for name, value in given.items()}
            logits = self.module(**on_device, use_cache=False, return_dict=True).logits
        found: Array = logits.float().cpu().numpy()
        return found

    def generate(self, ids: Array, mask: Array, settings: Mapping[str, Any]) -> Array:
        """What transformers' generate() answers, int64 [rows, length + new].

        Args:
            ids, mask: int64 [rows, length].
            settings: of generate(), by transformers' names; and `seed`, which seeds PyTorch.

        Raises UsageError for what it does not know.
        """
        options = {name: value for name, value in settings.items() if name not in _OUTPUTS or value}
        self._check_settings(options)
        if (seed := options.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        if "stop_strings" in options:
            options["tokenizer"] = self._checkpoint.tokenizer
        if self.step is not None:
            rows = len(ids) * max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
            options |= {cache_argument(self.module): self._empty_cache(rows), "compile_config": self.step.config}
        device = self.module.device
        try:
            found = self.module.generate(
                torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device), **options
            )
        except ValueError as error:
            # Of settings that exclude each other.
            raise UsageError(f"transformers' generate() refuses this: {describe_error(error)}") from error
        answer: Array = found.cpu().numpy()
        return answer

    def session(self) -> EagerSession:
        """The cache of a batch, empty, to be stepped by hand. Whoever calls generate() takes it over."""
        step = self.module if self.step is None else self.step
        return EagerSession(self.module, self._empty_cache(self.batch_size), self.batch_size, self.capacity, step)

    def profile(self, **schedule: Any) -> AbstractContextManager[Any]:
        """Record steps by torch.profiler; see `profile_steps`."""
        return profile_steps(**schedule)

    def save(self, folder: Path) -> None:
        """Write a checkpoint with these weights, as transformers does."""
        self.module.save_pretrained(folder)
        if self._checkpoint.tokenizer is not None:
            self._checkpoint.tokenizer.save_pretrained(folder)

    def _check_settings(self, options: Mapping[str, Any]) -> None:
        known = {"seed", "stop_strings", *vars(transformers.GenerationConfig())} - {*_OUTPUTS}
        names = sorted(name for name in known if not name.startswith("_"))
        hint = " These are transformers' own; what precast has besides needs mode='compiled'."
        refuse_unknown("generate() of an eager model", options, names, hint)

    def _empty_cache(self, rows: int) -> Any:
        """The static cache for so many rows. It is kept: compiled code is bound to its memory."""
        if rows not in self._caches:
            self._caches[rows] = _make_cache(self.module, self.capacity)
        self._caches[rows].reset()
        return self._caches[rows]


def _make_cache(module: Any, capacity: int) -> StaticCache:
    """A static cache for a decoder, of any batch. Layers that attend to a window only hold all tokens, too: those that
    transformers makes for a window count in Python, for which torch.compile would compile every step anew."""
    cache = StaticCache(config=module.config.get_text_config(decoder=True), max_cache_len=capacity)
    cache.layers = [StaticLayer(max_cache_len=capacity) if layer.is_sliding else layer for layer in cache.layers]
    return cache
