"""Decoders: one graph with a free query length, or static prefill graphs and a decode graph, over one set of caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from precast.runtime.artifact.schema import Dim, Dtype, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError, UsageError

from ..options import ExportOptions
from ..plan import GraphPlan, Plan, check_length, common, run_skeleton
from ..resolve import Checkpoint

__all__ = ["CachePlan", "DecoderPlan", "plan"]

HEAD_MULTIPLE = 8
"""Head sizes are rounded up to this: ONNX Runtime's GroupQueryAttention takes multiples of 8 only."""


@dataclass(frozen=True)
class CachePlan:
    """The cache of one layer."""

    heads: int
    head_dim: int


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


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> DecoderPlan:
    """The graphs and caches. Raises UsageError for impossible shapes, CheckpointError for a state that is no cache."""
    if len(options.sequence_length) > 1:
        raise UsageError(
            f"--sequence-length {','.join(map(str, options.sequence_length))}: a decoder has one capacity. Give the "
            f"largest, {max(options.sequence_length)}; shorter requests cost no more in it."
        )
    capacity = options.sequence_length[0] if options.sequence_length else _default_capacity(checkpoint)
    check_length(checkpoint, capacity)
    prefill = tuple(sorted(options.prefill_lengths))
    if prefill and prefill[-1] > capacity:
        raise UsageError(f"--prefill-lengths {prefill[-1]} is more than --sequence-length {capacity}.")
    batch = options.batch_size or 1
    return DecoderPlan(
        **common(checkpoint, options, task, model),
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
    cache = run_skeleton(model, task, example).get("past_key_values")
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
