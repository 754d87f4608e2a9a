"""The graph of one decoding step: example inputs to trace it with, and its description in the contract.

Decoders and the decoders of encoder-decoders share it. Inputs are the tokens, the lengths, the positions whose logits
are asked for, then the caches, then slots for adapters; outputs are the logits, then the updated caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from precast.runtime.artifact.lora import SLOTS, lora_inputs
from precast.runtime.artifact.schema import CacheLayer, Dim, Graph, Input, Lora, Output, State

from ..plan import GraphPlan
from .plan import CachedPlan

__all__ = ["describe_step", "example_caches", "example_slots", "example_tokens", "free_shapes", "vocabulary_size"]


def example_tokens(graph: GraphPlan, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids int64 [B, S], past_lengths int32 [B], new_lengths int32 [B] and logit_positions int64 [B, K]. Where the
    length is free, S and K are neither 1 nor equal, if the capacity allows."""
    batch = graph.batch
    length, positions = graph.length, 1
    if isinstance(length, Dim):
        length, positions = min(8, capacity), min(3, capacity)
    return (
        torch.ones(batch, length, dtype=torch.int64),
        torch.zeros(batch, dtype=torch.int32),
        torch.full((batch,), length, dtype=torch.int32),
        torch.zeros(batch, positions, dtype=torch.int64),
    )


def example_caches(plan: CachedPlan, batch: int) -> list[Tensor]:
    """Keys and values of each layer in turn, [B, heads, C, D]."""
    dtype = getattr(torch, plan.cache_dtype)
    return [
        torch.zeros(batch, layer.heads, plan.capacity, layer.head_dim, dtype=dtype)
        for layer in plan.cache
        for _ in range(2)
    ]


def example_slots(lora: Lora, batch: int) -> list[Tensor]:
    """The inputs for adapters, in their order."""
    shapes = {spec.name: [size for size in spec.shape if isinstance(size, int)] for spec in lora_inputs(lora, batch)}
    return [torch.zeros(shape, dtype=torch.int64 if name == SLOTS else torch.float32) for name, shape in shapes.items()]


def free_shapes(graph: GraphPlan, capacity: int, *rest: list[Any]) -> tuple[Any, ...] | None:
    """torch.export's `dynamic_shapes`, with `rest` for the inputs after logit_positions; None where all is static."""
    if not isinstance(graph.length, Dim):
        return None
    length = torch.export.Dim("length", min=graph.length.min, max=graph.length.max)
    positions = torch.export.Dim("positions", min=1, max=capacity)
    return ({1: length}, None, None, {1: positions}, *rest)


def vocabulary_size(exported: torch.export.ExportedProgram) -> int:
    """The last dimension of the logits, a program's first output."""
    output = next(node for node in exported.graph.nodes if node.op == "output")
    return int(output.args[0][0].meta["val"].shape[-1])


def describe_step(
    plan: CachedPlan,
    graph: GraphPlan,
    vocabulary: int,
    *,
    windows: Sequence[int | None],
    context: Sequence[Input] = (),
    states: Sequence[State] = (),
) -> Graph:
    """The contract's description of a decoding step; `file` is the backend's to fill in.

    Args:
        windows: the sliding window of each cached layer, or None.
        context: inputs before the caches, which an encoder made.
        states: states of a fixed size, after the caches.
    """
    batch, length = graph.batch, graph.length
    positions: int | Dim = Dim(min=1, max=plan.capacity) if isinstance(length, Dim) else 1
    cache = [_cache_layer(plan, index, window) for index, window in enumerate(windows)]
    shapes: dict[str, list[int | Dim]] = {
        name: [batch, layer.heads, plan.capacity, layer.head_dim]
        for layer in cache
        for name in (layer.key_in, layer.key_out, layer.value_in, layer.value_out)
    }
    caches_in = [name for layer in cache for name in (layer.key_in, layer.value_in)]
    caches_out = [name for layer in cache for name in (layer.key_out, layer.value_out)]
    return Graph(
        name=graph.name,
        role=graph.role,
        file="pending",
        batch=batch,
        length=length,
        capacity=plan.capacity,
        inputs=[
            Input(name="input_ids", dtype="int64", shape=[batch, length], pad=plan.pad_token_id),
            Input(name="past_lengths", dtype="int32", shape=[batch], pad=0),
            Input(name="new_lengths", dtype="int32", shape=[batch], pad=1),
            Input(name="logit_positions", dtype="int64", shape=[batch, positions], pad=0),
            *context,
            *(Input(name=name, dtype=plan.cache_dtype, shape=shapes[name], pad=0) for name in caches_in),
            *(Input(name=state.name_in, dtype=state.dtype, shape=[*state.shape], pad=0) for state in states),
            *(lora_inputs(plan.lora, batch) if plan.lora else []),
        ],
        outputs=[
            _logits(plan, batch, positions, vocabulary),
            *(Output(name=name, dtype=plan.cache_dtype, shape=shapes[name], slice=[None] * 4) for name in caches_out),
            *(
                Output(name=state.name_out, dtype=state.dtype, shape=[*state.shape], slice=[None] * len(state.shape))
                for state in states
            ),
        ],
        cache=cache,
        states=list(states),
    )


def _logits(plan: CachedPlan, batch: int, positions: int | Dim, vocabulary: int) -> Output:
    shape: list[int | Dim] = [batch, positions, vocabulary]
    return Output(name="logits", dtype=plan.dtype, shape=shape, slice=["batch", "positions", None])


def _cache_layer(plan: CachedPlan, index: int, window: int | None) -> CacheLayer:
    return CacheLayer(
        layer=index,
        key_in=f"past_key_values.{index}.key",
        key_out=f"present.{index}.key",
        value_in=f"past_key_values.{index}.value",
        value_out=f"present.{index}.value",
        heads=plan.cache[index].heads,
        head_dim=plan.cache[index].head_dim,
        dtype=plan.cache_dtype,
        window=window,
    )
