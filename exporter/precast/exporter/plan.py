"""Checkpoint + options -> what will be compiled: task, static shapes, graphs, sizes. Reads no weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from precast.runtime.artifact.machine import memory_bytes
from precast.runtime.artifact.schema import Axis, Dim, Dtype, Graph, Input, Output, Role
from precast.runtime.artifact.tasks import Task, get_task
from precast.runtime.errors import CheckpointError, ExportError, UsageError

from .options import ExportOptions
from .resolve import Checkpoint

__all__ = ["CachePlan", "DecoderPlan", "EncoderPlan", "GraphPlan", "Plan", "TensorPlan", "make_plan"]

HEAD_MULTIPLE = 8
"""Head sizes are rounded up to this: ONNX Runtime's GroupQueryAttention takes multiples of 8 only."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor whose dimensions are sizes or the names of axes ("batch", "length")."""

    name: str
    dtype: Dtype
    axes: tuple[int | Axis, ...]
    pad: int = 0

    def as_input(self, sizes: Mapping[str, int | Dim]) -> Input:
        return Input(name=self.name, dtype=self.dtype, shape=self._shape(sizes), pad=self.pad)

    def as_output(self, sizes: Mapping[str, int | Dim]) -> Output:
        cut = [axis if isinstance(axis, str) else None for axis in self.axes]
        return Output(name=self.name, dtype=self.dtype, shape=self._shape(sizes), slice=cut)

    def _shape(self, sizes: Mapping[str, int | Dim]) -> list[int | Dim]:
        return [sizes[axis] if isinstance(axis, str) else axis for axis in self.axes]


@dataclass(frozen=True)
class CachePlan:
    """The cache of one layer."""

    heads: int
    head_dim: int


@dataclass(frozen=True)
class GraphPlan:
    """One graph to compile; `length` is static, or free within bounds."""

    name: str
    role: Role
    batch: int
    length: int | Dim


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every export has. `weight_bytes` is the size of the parameters in `dtype`, tied ones counted once."""

    task: Task
    model_type: str
    dtype: Dtype
    batch_size: int
    lengths: tuple[int, ...]
    dynamic_batch_size: bool
    graphs: tuple[GraphPlan, ...]
    weight_bytes: int
    quantize: str
    pad_token_id: int

    @property
    def cache_bytes(self) -> int:
        return 0

    def outline(self) -> list[Graph]:
        """The graphs as far as they are known before tracing."""
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int:
        """An estimate of the export's peak: the model, its packed copy, and the buffers of writing it."""
        return int(2.5 * self.weight_bytes) + self.cache_bytes

    def as_json(self) -> dict[str, Any]:
        """The plan's facts, for `--dry-run`."""
        return {
            "task": self.task.name,
            "model_type": self.model_type,
            "batch_size": self.batch_size,
            "sequence_length": list(self.lengths),
            "dynamic_batch_size": self.dynamic_batch_size,
            "graphs": [graph.name for graph in self.graphs],
            "dtype": self.dtype,
            "quantize": self.quantize,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class EncoderPlan(Plan):
    """One graph per length, each a whole forward pass."""

    inputs: tuple[TensorPlan, ...]
    outputs: tuple[TensorPlan, ...]

    def outline(self) -> list[Graph]:
        return [self.describe(graph) for graph in self.graphs]

    def describe(self, graph: GraphPlan) -> Graph:
        """The graph in the words of the contract; `file` is the backend's to fill in."""
        sizes = {"batch": graph.batch, "length": graph.length}
        return Graph(
            name=graph.name,
            role=graph.role,
            file="pending",
            batch=graph.batch,
            length=graph.length,
            capacity=0,
            inputs=[spec.as_input(sizes) for spec in self.inputs],
            outputs=[spec.as_output(sizes) for spec in self.outputs],
            cache=[],
        )


@dataclass(frozen=True, kw_only=True)
class DecoderPlan(Plan):
    """One graph with a free query length, or static prefill graphs and a decode graph, over one set of caches."""

    cache: tuple[CachePlan, ...]
    cache_dtype: Dtype
    prefill_lengths: tuple[int, ...]

    @property
    def capacity(self) -> int:
        return self.lengths[0]

    def outline(self) -> list[Graph]:
        return [
            Graph(
                name=graph.name, role=graph.role, file="pending", batch=graph.batch, length=graph.length,
                capacity=self.capacity, inputs=[], outputs=[], cache=[],
            )
            for graph in self.graphs
        ]  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        numbers = sum(2 * layer.heads * layer.head_dim for layer in self.cache) * self.batch_size * self.capacity
        item_size: int = getattr(torch, self.cache_dtype).itemsize
        return numbers * item_size


def make_plan(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """Decide what to compile. Raises UsageError for missing or impossible shapes, CheckpointError for a model type
    that cannot be exported for this task."""
    options.check()
    task = get_task(options.task or checkpoint.infer_task())
    if options.is_lossy and task.kind != "decoder":
        raise UsageError(
            f"--quantize and --kv-cache are for decoders: what they cost is measured on the text that a model "
            f"predicts, and {task.name!r} predicts none. Leave them out."
        )
    model = checkpoint.skeleton(task)
    plan = _plan_decoder if task.kind == "decoder" else _plan_encoder
    result = plan(checkpoint, options, task, model)
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


# ---------------------------------------------------------------- encoders


def _plan_encoder(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> EncoderPlan:
    if missing := [axis for axis in task.axes if not getattr(options, axis)]:
        flags = " and ".join(f"--{axis.replace('_', '-')} N" for axis in missing)
        raise UsageError(
            f"The task {task.name!r} is compiled for fixed shapes: {', '.join(task.axes)}. Add {flags}, for example: "
            f"precast export {checkpoint.given} --batch-size 1 --sequence-length 128 -o OUT"
        )
    if options.prefill_lengths:
        raise UsageError(f"--prefill-lengths is for decoders; the task {task.name!r} has no prefill.")
    lengths = tuple(sorted(options.sequence_length))
    _check_length(checkpoint, lengths[-1])
    batch = options.batch_size or 1
    names = ["model"] if len(lengths) == 1 else [f"model_{length}" for length in lengths]
    return EncoderPlan(
        **_common(checkpoint, options, task, model),
        batch_size=batch,
        lengths=lengths,
        graphs=tuple(GraphPlan(name, "encode", batch, length) for name, length in zip(names, lengths, strict=True)),
        inputs=_encoder_inputs(checkpoint, model),
        outputs=_encoder_outputs(model, task, options.dtype),
    )


def _encoder_inputs(checkpoint: Checkpoint, model: nn.Module) -> tuple[TensorPlan, ...]:
    accepted = inspect.signature(model.forward).parameters
    pads = {"input_ids": checkpoint.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    if getattr(checkpoint.text_config, "type_vocab_size", 2) < 2:
        del pads["token_type_ids"]
    return tuple(TensorPlan(name, "int64", ("batch", "length"), pad) for name, pad in pads.items() if name in accepted)


def _encoder_outputs(model: nn.Module, task: Task, dtype: Dtype) -> tuple[TensorPlan, ...]:
    """Run the weightless model at two sizes: a dimension that follows the batch or the length is that axis."""
    small, large = (_encoder_shapes(model, task, batch, length) for batch, length in ((2, 5), (3, 7)))
    axes: dict[tuple[int, int], Axis] = {(2, 3): "batch", (5, 7): "length"}
    return tuple(
        TensorPlan(
            name, dtype, tuple(a if a == b else axes[a, b] for a, b in zip(small[name], large[name], strict=True))
        )
        for name in task.outputs
    )


def _encoder_shapes(model: nn.Module, task: Task, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    example = {"input_ids": torch.ones(batch, length, dtype=torch.int64, device="meta")}
    result = _run_skeleton(model, task, example)
    return {name: tuple(result[name].shape) for name in task.outputs}


# ---------------------------------------------------------------- decoders


def _plan_decoder(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> DecoderPlan:
    if len(options.sequence_length) > 1:
        raise UsageError(
            f"--sequence-length {','.join(map(str, options.sequence_length))}: a decoder has one capacity. Give the "
            f"largest, {max(options.sequence_length)}; shorter requests cost no more in it."
        )
    capacity = options.sequence_length[0] if options.sequence_length else _default_capacity(checkpoint)
    _check_length(checkpoint, capacity)
    prefill = tuple(sorted(options.prefill_lengths))
    if prefill and prefill[-1] > capacity:
        raise UsageError(f"--prefill-lengths {prefill[-1]} is more than --sequence-length {capacity}.")
    batch = options.batch_size or 1
    return DecoderPlan(
        **_common(checkpoint, options, task, model),
        batch_size=batch,
        lengths=(capacity,),
        prefill_lengths=prefill,
        graphs=_decoder_graphs(batch, capacity, prefill),
        cache=_cache_plan(checkpoint, model, task),
        cache_dtype=options.kv_cache,
    )


def _decoder_graphs(batch: int, capacity: int, prefill: tuple[int, ...]) -> tuple[GraphPlan, ...]:
    if not prefill:
        return (GraphPlan("model", "decoder", batch, Dim(min=1, max=capacity)),)
    return (
        *(GraphPlan(f"prefill_{length}", "prefill", batch, length) for length in prefill),
        GraphPlan("decode", "decode", batch, 1),
    )


def _default_capacity(checkpoint: Checkpoint) -> int:
    limit = checkpoint.max_length
    if limit is None:
        raise UsageError(
            f"The config of {checkpoint.name} does not say how long its sequences may be; give --sequence-length N "
            f"(prompt and new tokens together)."
        )
    return limit


def _cache_plan(checkpoint: Checkpoint, model: nn.Module, task: Task) -> tuple[CachePlan, ...]:
    """Run the weightless model on two tokens and look at the cache that it fills."""
    example = {"input_ids": torch.ones(1, 2, dtype=torch.int64, device="meta"), "use_cache": True}
    cache = _run_skeleton(model, task, example).get("past_key_values")
    if cache is None:
        raise CheckpointError(
            f"{checkpoint.name} cannot do {task.name}: as its config.json sets it up, {type(model).__name__} is no "
            f"decoder and returns no key/value cache."
        )
    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.ndim != 4 for layer in layers):
        raise CheckpointError(
            f"{type(model).__name__} keeps a state other than one key/value cache per layer; precast cannot export it "
            f"for {task.name} yet."
        )
    return tuple(_layer_plan(layer) for layer in layers)


def _layer_plan(layer: Any) -> CachePlan:
    width = max(layer.keys.shape[-1], layer.values.shape[-1])
    return CachePlan(layer.keys.shape[1], -(-width // HEAD_MULTIPLE) * HEAD_MULTIPLE)


# ---------------------------------------------------------------- both


def _common(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> dict[str, Any]:
    size = getattr(torch, options.dtype).itemsize
    return {
        "task": task,
        "model_type": checkpoint.config.model_type,
        "dtype": options.dtype,
        "dynamic_batch_size": options.dynamic_batch_size,
        "weight_bytes": size * sum(parameter.numel() for parameter in model.parameters()),
        "quantize": options.quantize,
        "pad_token_id": checkpoint.pad_token_id,
    }


def _check_length(checkpoint: Checkpoint, length: int) -> None:
    limit = checkpoint.max_length
    if limit is not None and length > limit:
        raise UsageError(
            f"--sequence-length {length} is more than {checkpoint.name} was made for: its "
            f"max_position_embeddings allow {limit}."
        )


class _NoValues(TorchDispatchMode):
    """Answers 0 where code looks into an empty tensor (to warn about padding, say); only shapes matter here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


def _run_skeleton(model: nn.Module, task: Task, example: dict[str, Any]) -> Any:
    try:
        with torch.no_grad(), _NoValues():  # type: ignore[no-untyped-call]
            return model(**example, return_dict=True)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} could not be planned for {task.name}: its forward pass failed on empty weights "
            f"with {type(error).__name__}: {error}"
        ) from error
