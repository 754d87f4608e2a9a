"""Plan an export without reading weights: task, static shapes, graphs, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import pytorch_utils

from precast.runtime.artifact.schema import Axis, Dim, Dtype, Graph, Input, Lora, Output, Role
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import ExportError, UsageError
from precast.runtime.hosts.machine import memory_bytes

from ..adapters.prefix_files import LayerSizes, PrefixFile
from ..architectures.scaled_rotary import longrope_limit
from ..checkpoint import early
from ..checkpoint.checkpoint import Checkpoint
from ..options import ExportOptions
from ..options.parallel import Degrees, ParallelOptions, PipelineOptions
from . import kind_of

__all__ = [
    "GraphPlan",
    "Plan",
    "TensorPlan",
    "check_blocks",
    "check_length",
    "common_fields",
    "make_plan",
    "run_skeleton",
    "single_batch_size",
    "shapes_only",
]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor whose dimensions are sizes or the names of axes ("batch", "length"). Along named axes inputs are filled
    with `pad` and outputs cut, except along those in `exact`, which callers must give in full."""

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
    """What is compiled, for every kind of model.

    Attributes:
        dtype: of tracing and of results.
        weight_dtype, weight_bytes: the precision that was asked for, and the size of the parameters in it, tied ones
            counted once.
        lengths: the compiled sequence lengths; a decoder's one capacity.
        prefill_lengths: prompt lengths with a graph of fixed length each.
        prefix: what stands before every prompt, if anything does.
        lora: the slots for adapters, if there are any.
        layer_sizes: the heads and widths that a decoder itself caches, by layer.
        degrees: between how many ranks weights are divided, where there are several; caches are then one rank's.
        stages: into how many runs of layers the programs are cut.
    """

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
    prefix: PrefixFile | None = None
    layer_sizes: tuple[LayerSizes, ...] = ()
    lora: Lora | None = None
    degrees: Degrees | None = None
    stages: int = 1

    @property
    def cache_widths(self) -> list[int]:
        """The head size that the cache of each layer is compiled with; none where there are no caches."""
        return []

    @property
    def states(self) -> Sequence[Any]:
        """The states of a fixed size that it carries from token to token."""
        return ()

    @property
    def reads_text(self) -> bool:
        """Whether token ids are among its inputs."""
        return True

    @property
    def cache_bytes(self) -> int:
        return 0

    @property
    def notes(self) -> dict[str, str]:
        """Facts about how the model is compiled, for the artifact and for the user, by name."""
        return {}

    def outline(self) -> list[Graph]:
        """The graphs as far as they are known before tracing."""
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int:
        """An estimate of the export's peak: the model in float32, what a compiler or runtime packs of it, buffers."""
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


def make_plan(
    checkpoint: Checkpoint, options: ExportOptions, part_of: Callable[[nn.Module, Degrees], nn.Module] | None = None
) -> Plan:
    """Decide what to compile. `part_of` makes one rank's model of a whole one, where there are several ranks.

    Raises UsageError for missing or impossible shapes, CheckpointError for a model type that cannot be exported for
    this task.
    """
    options.check()
    task = checkpoint.task(options.task)
    options.check_task(task)
    model = checkpoint.skeleton(task)
    degrees = _plan_degrees(options, task)
    local = part_of(model, degrees) if part_of and degrees else model
    result: Plan = kind_of(task).plan(checkpoint, options, task, local)
    if degrees:
        result = replace(result, degrees=degrees, weight_bytes=_weight_bytes(model, options))
    result = replace(result, stages=_plan_stages(checkpoint, options, result))
    _check_memory(result)
    return result


def _plan_stages(checkpoint: Checkpoint, options: ExportOptions, plan: Plan) -> int:
    """The stages that are asked for. Raises UsageError for what cannot be cut into so many."""
    asked = options.backend_options
    if not isinstance(asked, PipelineOptions) or asked.pipeline_parallel == 1:
        return 1
    given, task = f"pipeline_parallel={asked.pipeline_parallel}", plan.task
    if task.kind != "decoder":
        raise UsageError(f"{given} divides the layers of decoders, and {task.name!r} is done by none. Leave it out.")
    if plan.states:
        raise UsageError(f"{given}: {checkpoint.name} carries states from token to token, which no stage keeps. Leave "
                         f"it out.")  # fmt: skip
    layers = int(checkpoint.text_config.num_hidden_layers)
    if asked.pipeline_parallel > layers:
        choices = f"Possible are 2 to {layers}" if layers > 2 else "Possible is 2" if layers == 2 else "Leave it out"
        raise UsageError(f"{given}: {checkpoint.name} has {layers} layers, and every process has one. {choices}.")
    return asked.pipeline_parallel


def _plan_degrees(options: ExportOptions, task: Task) -> Degrees | None:
    """The degrees that are asked for; None for one rank. Raises UsageError for what cannot be divided."""
    asked = options.backend_options
    if not isinstance(asked, ParallelOptions) or not asked.is_parallel:
        return None
    given = f"tensor_parallel={asked.tensor_parallel}"
    if task.kind != "decoder":
        raise UsageError(f"{given} divides decoders, and {task.name!r} is done by none. {asked.instead_of_ranks}.")
    if options.quantization.rounds_activations:
        raise UsageError(
            f"{given} divides weights in the order of the checkpoint, and those of quantize={options.quantize!r} are "
            f"packed for the kernels of whole layers. Give quantize='int8'."
        )
    if options.quantize == "auto":
        raise UsageError(
            f"{given} divides weights of one scheme, and quantize='auto' chooses groups and offsets layer by layer. "
            f"Give quantize='int8', or quantize='int4' with symmetric=True."
        )
    return asked.degrees


def _check_memory(plan: Plan) -> None:
    available = memory_bytes()
    if plan.memory_bytes > available:
        raise UsageError(
            f"This export needs about {_gigabytes(plan.memory_bytes)} of memory (weights "
            f"{_gigabytes(plan.weight_bytes)}, cache {_gigabytes(plan.cache_bytes)}); there is {_gigabytes(available)}"
            f". A smaller sequence_length or batch_size makes the cache smaller."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def common_fields(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> dict[str, Any]:
    """The fields that every plan has, except shapes and graphs."""
    return {
        "task": task,
        "model_type": checkpoint.config.model_type,
        "dtype": "float32",
        "weight_dtype": options.dtype,
        "auto_cast": options.auto_cast,
        "dynamic_batch_size": options.dynamic_batch_size,
        "weight_bytes": _weight_bytes(model, options),
        "quantize": options.quantize,
        "pad_token_id": checkpoint.pad_token_id,
        "has_tokenizer": checkpoint.has_tokenizer,
    }


def _weight_bytes(model: nn.Module, options: ExportOptions) -> int:
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return int(getattr(torch, options.dtype).itemsize * numbers)


def single_batch_size(options: ExportOptions) -> int:
    """The batch size of a model with one set of caches, 1 by default. Raises UsageError for several."""
    sizes = options.batch_sizes or (1,)
    if len(sizes) > 1:
        raise UsageError(
            f"batch_size={','.join(map(str, sizes))}: a model that generates has caches for one batch size. Give the "
            f"largest, {sizes[-1]}; smaller batches run in it."
        )
    return sizes[0]


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise UsageError for a length beyond the model's positions, or beyond those with the same rotary angles."""
    early.check_length(checkpoint.name, checkpoint.max_length, length)
    limit = longrope_limit(checkpoint.text_config)
    if limit is not None and length > limit:
        raise UsageError(
            f"sequence_length={length}: {checkpoint.name} rotates all positions otherwise in a sequence of more than "
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
            f"sequence_length={length}: {checkpoint.name} attends in blocks (attention_type block_sparse) to rows of "
            f"more than {largest} tokens, and which blocks depends on how far a row is padded, so that no compiled "
            f"length has the answers of the row alone. Give at most {largest}, where transformers attends fully, too; "
            f'or write "attention_type": "original_full" into its config.json, for full attention at any length.'
        )


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this block models run on the meta device, for shapes alone.

    transformers' caches of tensors for a whole process are off (BEiT's table of relative positions, by the size of the
    image): a model with weights would otherwise compute with a tensor that has no values.
    """
    is_compiling = pytorch_utils.is_torchdynamo_compiling
    pytorch_utils.is_torchdynamo_compiling = lambda: True
    try:
        with torch.no_grad(), torch.device("meta"), _ZeroScalars():  # type: ignore[no-untyped-call]
            yield
    finally:
        pytorch_utils.is_torchdynamo_compiling = is_compiling


class _ZeroScalars(TorchDispatchMode):
    """Answers 0 where code reads a number from a tensor without values (to warn about padding, say)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **(kwargs or {}))


class _KeepNumbers(TorchFunctionMode):
    """Keeps tensors of a single number on the CPU, with their values: DeBERTa computes sizes with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if func is torch.tensor and isinstance(args[0], (int, float)) else {}
        return func(*args, **{**device, **(kwargs or {})})


def run_skeleton(model: nn.Module, task: Task, example: dict[str, Any]) -> Any:
    """The outputs of a model without weights, of which only shapes have a meaning. Raises ExportError."""
    try:
        with shapes_only(), _KeepNumbers():
            return model(**example, return_dict=True)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} could not be planned for {task.name}: its forward pass failed on empty weights "
            f"with {type(error).__name__}: {error}"
        ) from error
