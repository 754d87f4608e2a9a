"""Decoders: one graph with a free query length, or static prefill graphs and a decode graph, over one set of caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Dim, Dtype, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError

from ...architectures.scaled_rotary import longrope_limit
from ...checkpoint.resolve import Checkpoint
from ...options import ExportOptions
from ..plan import GraphPlan, Plan, check_length, common, single_batch
from .eager_attention import NAME, Layout, Stored, layout, misfit
from .recurrent_states import Carried

__all__ = ["HEAD_MULTIPLE", "CachePlan", "DecoderPlan", "plan"]

HEAD_MULTIPLE = 8
"""Head sizes are rounded up to this: ONNX Runtime's GroupQueryAttention takes multiples of 8 only."""

FIXED_LENGTHS = (64, 512)
"""The prompts that are compiled for where a free length is impossible, unless --prefill-lengths says otherwise."""


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
    ordinary: Layout | None
    """How the model itself caches, where its attention stays in its own, ordinary operators."""
    misfit: str
    """Why it stays there; empty where it is one operator."""

    @property
    def cache_widths(self) -> list[int]:
        return [layer.head_dim for layer in self.cache]

    @property
    def capacity(self) -> int:
        return self.lengths[0]

    @property
    def notes(self) -> dict[str, str]:
        notes = {"attention": NAME, "attention_because": self.misfit} if self.ordinary and self.cache else {}
        return notes | ({"states": "tokens are read one at a time"} if self.states else {})

    @property
    def states(self) -> list[Carried]:
        return self.ordinary.states if self.ordinary else []

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
        states = sum(state.example(1).nbytes for state in self.states)
        # What comes in and what goes out have memory of their own.
        return numbers * item_size + 2 * self.batch_size * states


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> DecoderPlan:
    """The graphs and caches. Raises UsageError for impossible shapes, CheckpointError for a state that is no cache."""
    if len(options.sequence_length) > 1:
        raise UsageError(
            f"--sequence-length {','.join(map(str, options.sequence_length))}: a decoder has one capacity. Give the "
            f"largest, {max(options.sequence_length)}; shorter requests cost no more in it."
        )
    capacity = options.sequence_length[0] if options.sequence_length else _default_capacity(checkpoint)
    check_length(checkpoint, capacity)
    if max(options.prefill_lengths, default=0) > capacity:
        raise UsageError(f"--prefill-lengths {max(options.prefill_lengths)} is more than --sequence-length {capacity}.")
    batch = single_batch(options)
    found = layout(model, task)
    if found.states:
        _check_one_by_one(options, model)
    row = get_backend(options.backend)
    is_fixed = found.is_tuples or (row.is_static and not found.states)
    prefill = tuple(sorted(options.prefill_lengths)) or (_fixed_lengths(capacity) if is_fixed else ())
    cache = tuple(_cache_plan(layer.cached) for layer in found.layers if layer.cached)
    reason = misfit(model, found, [(layer.heads, layer.head_dim) for layer in cache])
    if reason:
        _check_one_operator(options, model)
    return DecoderPlan(
        **common(checkpoint, options, task, model),
        batch_size=batch,
        lengths=(capacity,),
        prefill_lengths=prefill,
        graphs=_decoder_graphs(batch, capacity, prefill, one_by_one=bool(found.states), apart=row.decodes_apart),
        cache=cache,
        cache_dtype=options.kv_cache,
        ordinary=found if reason else None,
        misfit=reason,
    )


def _decoder_graphs(
    batch: int, capacity: int, prefill: tuple[int, ...], *, one_by_one: bool, apart: bool
) -> tuple[GraphPlan, ...]:
    step = GraphPlan("decode", "decode", batch, 1)
    if prefill or one_by_one or (apart and capacity == 1):
        return *(GraphPlan(f"prefill_{length}", "prefill", batch, length) for length in prefill), step
    if apart:
        return GraphPlan("prefill", "prefill", batch, Dim(min=2, max=capacity)), step
    return (GraphPlan("model", "decoder", batch, Dim(min=1, max=capacity)),)


def _fixed_lengths(capacity: int) -> tuple[int, ...]:
    """Code that hands tuples of tensors around looks at their sizes, so it is traced with sizes that are known."""
    return tuple(length for length in FIXED_LENGTHS if length < capacity) or (capacity,)


def _default_capacity(checkpoint: Checkpoint) -> int:
    limit = checkpoint.max_length
    if limit is None:
        raise UsageError(
            f"The config of {checkpoint.name} does not say how long its sequences may be; give --sequence-length N "
            f"(prompt and new tokens together)."
        )
    return min(limit, longrope_limit(checkpoint.text_config) or limit)


def _cache_plan(layer: tuple[Stored, ...]) -> CachePlan:
    heads, width = (max(getattr(stored, size) for stored in layer) for size in ("heads", "width"))
    return CachePlan(heads, -(-width // HEAD_MULTIPLE) * HEAD_MULTIPLE)


def _check_one_by_one(options: ExportOptions, model: nn.Module) -> None:
    if options.prefill_lengths:
        raise UsageError(
            f"--prefill-lengths {','.join(map(str, options.prefill_lengths))}: {type(model).__name__} carries states "
            f"that padding would change, so it is compiled to read one token at a time. Leave it out."
        )


def _check_one_operator(options: ExportOptions, model: nn.Module) -> None:
    if options.kv_cache != "float32":
        raise UsageError(
            f"--kv-cache {options.kv_cache} needs attention that is one operator, and {type(model).__name__} computes "
            f"its own in ordinary ones. Leave it out."
        )
