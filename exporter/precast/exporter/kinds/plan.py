"""Checkpoint + options -> what will be compiled: task, static shapes, graphs, sizes. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import pytorch_utils

from precast.runtime.artifact.schema import Axis, Dim, Dtype, Graph, Input, Output, Role
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import ExportError, UsageError
from precast.runtime.hosts.machine import memory_bytes

from ..architectures.scaled_rotary import longrope_limit
from ..checkpoint import early
from ..checkpoint.resolve import Checkpoint
from ..options import ExportOptions
from . import kind_of

__all__ = [
    "GraphPlan",
    "Plan",
    "TensorPlan",
    "check_blocks",
    "check_length",
    "common",
    "make_plan",
    "run_skeleton",
    "single_batch",
    "without_values",
]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor whose dimensions are sizes or the names of axes ("batch", "length"). Inputs are filled with `pad` along
    named axes, except along those in `exact`, which callers must give in full, and outputs are cut along them."""

    name: str
    dtype: Dtype
    axes: tuple[int | Axis, ...]
    pad: int = 0
    exact: tuple[Axis, ...] = ()

    def as_input(self, sizes: Mapping[Any, int | Dim]) -> Input:
        return Input(name=self.name, dtype=self.dtype, shape=self._shape(sizes), pad=self.pad, axes=self._named())

    def as_output(self, sizes: Mapping[Any, int | Dim]) -> Output:
        return Output(name=self.name, dtype=self.dtype, shape=self._shape(sizes), slice=self._named())

    def _named(self) -> list[Axis | None]:
        return [axis if isinstance(axis, str) and axis not in self.exact else None for axis in self.axes]

    def _shape(self, sizes: Mapping[Any, int | Dim]) -> list[int | Dim]:
        return [sizes[axis] if isinstance(axis, str) else axis for axis in self.axes]


@dataclass(frozen=True)
class GraphPlan:
    """One graph to compile; `length` is static, or free within bounds."""

    name: str
    role: Role
    batch: int
    length: int | Dim


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every export has. `dtype` is what is traced in, and what results are; `weight_dtype` what is asked for, and
    `weight_bytes` the size of the parameters in it, tied ones counted once. `prefill_lengths` are those of prompts for
    which graphs of fixed lengths are compiled."""

    task: Task
    model_type: str
    dtype: Dtype
    weight_dtype: Dtype
    auto_cast: str
    batch_size: int
    lengths: tuple[int, ...]
    dynamic_batch_size: bool
    graphs: tuple[GraphPlan, ...]
    weight_bytes: int
    quantize: str
    pad_token_id: int
    has_tokenizer: bool
    prefill_lengths: tuple[int, ...] = ()

    @property
    def cache_widths(self) -> list[int]:
        """The head size that the cache of each layer is compiled with; none where there are no caches."""
        return []

    @property
    def reads_text(self) -> bool:
        """Whether token ids are among its inputs."""
        return True

    @property
    def cache_bytes(self) -> int:
        return 0

    @property
    def notes(self) -> dict[str, str]:
        """What the artifact records, and the user is told, of how the model is compiled."""
        return {}

    def outline(self) -> list[Graph]:
        """The graphs as far as they are known before tracing."""
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int:
        """An estimate of the export's peak: the model in float32, its packed copy, and the buffers of writing it."""
        in_float32 = self.weight_bytes * 4 // getattr(torch, self.weight_dtype).itemsize
        return int(2.5 * in_float32) + self.cache_bytes

    def as_json(self) -> dict[str, Any]:
        """The plan's facts, for `--dry-run`."""
        return {
            "task": self.task.name,
            "model_type": self.model_type,
            "batch_size": self.batch_size,
            "sequence_length": list(self.lengths),
            "dynamic_batch_size": self.dynamic_batch_size,
            "graphs": [graph.name for graph in self.graphs],
            "dtype": self.weight_dtype,
            "auto_cast": self.auto_cast,
            "quantize": self.quantize,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "memory_bytes": self.memory_bytes,
            **({} if self.has_tokenizer or not self.reads_text else {"tokenizer": None}),
            **self.notes,
        }


def make_plan(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """Decide what to compile. Raises UsageError for missing or impossible shapes, CheckpointError for a model type
    that cannot be exported for this task."""
    options.check()
    task = checkpoint.task(options.task)
    options.check_task(task)
    model = checkpoint.skeleton(task)
    result: Plan = kind_of(task).plan(checkpoint, options, task, model)
    _check_memory(result)
    return result


def _check_memory(plan: Plan) -> None:
    available = memory_bytes()
    if plan.memory_bytes > available:
        raise UsageError(
            f"This export needs about {_gigabytes(plan.memory_bytes)} of memory (weights "
            f"{_gigabytes(plan.weight_bytes)}, cache {_gigabytes(plan.cache_bytes)}); there is {_gigabytes(available)}"
            f". A smaller --sequence-length or --batch-size makes the cache smaller."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def common(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> dict[str, Any]:
    """What every plan has, but for its shapes and graphs."""
    size = getattr(torch, options.dtype).itemsize
    return {
        "task": task,
        "model_type": checkpoint.config.model_type,
        "dtype": "float32",
        "weight_dtype": options.dtype,
        "auto_cast": options.auto_cast,
        "dynamic_batch_size": options.dynamic_batch_size,
        "weight_bytes": size * sum(parameter.numel() for parameter in model.parameters()),
        "quantize": options.quantize,
        "pad_token_id": checkpoint.pad_token_id,
        "has_tokenizer": checkpoint.has_tokenizer,
    }


def single_batch(options: ExportOptions) -> int:
    """The batch size of a model that has one set of caches, 1 by default. Raises UsageError for several."""
    sizes = options.batch_sizes or (1,)
    if len(sizes) > 1:
        raise UsageError(
            f"--batch-size {','.join(map(str, sizes))}: a model that generates has caches for one batch size. Give the "
            f"largest, {sizes[-1]}; smaller batches run in it."
        )
    return sizes[0]


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise UsageError for more than the model was made for, or than its rotary angles are the same for."""
    early.check_length(checkpoint.name, checkpoint.max_length, length)
    limit = longrope_limit(checkpoint.text_config)
    if limit is not None and length > limit:
        raise UsageError(
            f"--sequence-length {length}: {checkpoint.name} rotates all positions otherwise in a sequence of more than "
            f"{limit} tokens (rope type longrope, its original_max_position_embeddings), where caches hold what was "
            f"rotated before, and the rows of one call differ in length. Give at most {limit}."
        )


def check_blocks(checkpoint: Checkpoint, length: int) -> None:
    """Raise UsageError for a length at which BigBird attends block by block."""
    config = checkpoint.config
    if getattr(config, "attention_type", None) != "block_sparse":
        return
    largest = (5 + 2 * config.num_random_blocks) * config.block_size
    if length > largest:
        raise UsageError(
            f"--sequence-length {length}: {checkpoint.name} attends in blocks (attention_type block_sparse) to rows of "
            f"more than {largest} tokens, and which blocks depends on how far a row is padded, so that no compiled "
            f"length has the answers of the row alone. Give at most {largest}, where transformers attends fully, too; "
            f'or write "attention_type": "original_full" into its config.json, for full attention at any length.'
        )


@contextmanager
def without_values() -> Iterator[None]:
    """Run a model for its shapes alone. What transformers caches for a whole process (BEiT's table of relative
    positions, by the size of the image alone) must not be made here: the model with its weights would compute with a
    tensor that has no values."""
    uncached = patch.object(pytorch_utils, "is_torchdynamo_compiling", lambda: True)
    with torch.no_grad(), torch.device("meta"), uncached, _NoValues():  # type: ignore[no-untyped-call]
        yield


class _NoValues(TorchDispatchMode):
    """Answers 0 where code looks into an empty tensor (to warn about padding, say); only shapes matter here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **(kwargs or {}))


class _Numbers(TorchFunctionMode):
    """Single numbers keep their values where everything else has none: DeBERTa computes sizes with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {"device": "cpu"} if func is torch.tensor and isinstance(args[0], (int, float)) else {}
        return func(*args, **{**place, **(kwargs or {})})


def run_skeleton(model: nn.Module, task: Task, example: dict[str, Any]) -> Any:
    """The answer of a model without weights, whose shapes are all that it has. Raises ExportError."""
    try:
        with without_values(), _Numbers():
            return model(**example, return_dict=True)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} could not be planned for {task.name}: its forward pass failed on empty weights "
            f"with {type(error).__name__}: {error}"
        ) from error
