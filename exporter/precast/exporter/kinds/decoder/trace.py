"""A decoder as one step: tokens and caches in, logits at the asked positions and updated caches out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from precast.runtime.artifact.schema import CacheLayer, Dim, Graph, Input, Output, State

from ...architectures import make_traceable, use_cached_attention
from ...operators.attention import Scales
from ..plan import GraphPlan
from ..trace import Program, export_program
from .eager_attention import OrdinaryDecoder
from .fused_attention import OperatorDecoder
from .plan import DecoderPlan
from .recurrent_states import Carried

__all__ = ["trace"]


def trace(model: nn.Module, plan: DecoderPlan, scales: Scales | None = None) -> Iterator[Program]:
    """One program per graph of the plan; `scales` are those of caches in int8. Raises ExportError."""
    return (_trace(model, plan, graph, scales) for graph in plan.graphs)


def _trace(model: nn.Module, plan: DecoderPlan, graph: GraphPlan, scales: Scales | None) -> Program:
    program = _program(model, plan, scales)
    length, positions = graph.length, 1
    shapes: tuple[Any, ...] | None = None
    if isinstance(length, Dim):
        free = torch.export.Dim("length", min=length.min, max=length.max)
        length, positions = min(8, plan.capacity), min(3, plan.capacity)
        asked = torch.export.Dim("positions", min=1, max=plan.capacity)
        shapes = ({1: free}, None, None, {1: asked}, [None] * (2 * len(plan.cache)), *([[]] if plan.ordinary else []))
    example = _decoder_example(plan, graph.batch, length, positions)
    with make_traceable(model) if plan.ordinary else use_cached_attention(model):
        exported = export_program(program, example, shapes)
    windows: list[int | None] = [None] * len(plan.cache) if plan.ordinary else _windows(exported)
    return Program(_decoder_graph(plan, graph, windows, _vocabulary(exported)), exported)


def _program(model: nn.Module, plan: DecoderPlan, scales: Scales | None) -> nn.Module:
    if not plan.ordinary:
        return OperatorDecoder(model, len(plan.cache), scales).eval()
    with torch.no_grad():
        # What code of a checkpoint's own prepares on its first call must be done before it is traced.
        model(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    return OrdinaryDecoder(model, plan.ordinary, plan.capacity).eval()


def _windows(exported: torch.export.ExportedProgram) -> list[int | None]:
    """The sliding window of each layer, read off the operators; a layer is known by the cache that it takes."""
    windows = {
        node.args[3]: node.args[9] if node.args[8] == "window" else None
        for node in exported.graph.nodes
        if node.target is torch.ops.precast.cached_attention.default
    }
    return [windows[node] for node in exported.graph.nodes if node.op == "placeholder" and node in windows]


def _vocabulary(exported: torch.export.ExportedProgram) -> int:
    output = next(node for node in exported.graph.nodes if node.op == "output")
    return int(output.args[0][0].meta["val"].shape[-1])


def _decoder_example(plan: DecoderPlan, batch: int, length: int, positions: int) -> tuple[Any, ...]:
    caches = [
        torch.zeros(batch, layer.heads, plan.capacity, layer.head_dim, dtype=getattr(torch, plan.cache_dtype))
        for layer in plan.cache
        for _ in range(2)
    ]
    return (
        torch.ones(batch, length, dtype=torch.int64),
        torch.zeros(batch, dtype=torch.int32),
        torch.full((batch,), length, dtype=torch.int32),
        torch.zeros(batch, positions, dtype=torch.int64),
        caches,
        *([[state.example(batch) for state in plan.states]] if plan.ordinary else []),
    )


def _decoder_graph(plan: DecoderPlan, graph: GraphPlan, windows: list[int | None], vocabulary: int) -> Graph:
    batch, length = graph.batch, graph.length
    positions: int | Dim = Dim(min=1, max=plan.capacity) if isinstance(length, Dim) else 1
    cache = [_cache_layer(plan, index, windows[index]) for index in range(len(plan.cache))]
    shapes: dict[str, list[int | Dim]] = {
        name: [batch, layer.heads, plan.capacity, layer.head_dim]
        for layer in cache
        for name in (layer.key_in, layer.key_out, layer.value_in, layer.value_out)
    }
    states = [_state(carried, batch) for carried in plan.states]
    pad = plan.pad_token_id
    return Graph(
        name=graph.name,
        role=graph.role,
        file="pending",
        batch=batch,
        length=length,
        capacity=plan.capacity,
        inputs=[
            Input(name="input_ids", dtype="int64", shape=[batch, length], pad=pad),
            Input(name="past_lengths", dtype="int32", shape=[batch], pad=0),
            Input(name="new_lengths", dtype="int32", shape=[batch], pad=1),
            Input(name="logit_positions", dtype="int64", shape=[batch, positions], pad=0),
            *(
                Input(name=name, dtype=plan.cache_dtype, shape=shapes[name], pad=0)
                for layer in cache
                for name in (layer.key_in, layer.value_in)
            ),
            *(Input(name=state.name_in, dtype=state.dtype, shape=[*state.shape], pad=0) for state in states),
        ],
        outputs=[
            Output(
                name="logits",
                dtype=plan.dtype,
                shape=[batch, positions, vocabulary],
                slice=["batch", "positions", None],
            ),
            *(
                Output(name=name, dtype=plan.cache_dtype, shape=shapes[name], slice=[None] * 4)
                for layer in cache
                for name in (layer.key_out, layer.value_out)
            ),
            *(
                Output(name=state.name_out, dtype=state.dtype, shape=[*state.shape], slice=[None] * len(state.shape))
                for state in states
            ),
        ],
        cache=cache,
        states=states,
    )


def _cache_layer(plan: DecoderPlan, index: int, window: int | None) -> CacheLayer:
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


def _state(carried: Carried, batch: int) -> State:
    return State(
        name_in=f"past_states.{carried.name}",
        name_out=f"present_states.{carried.name}",
        shape=[batch, *carried.shape],
        dtype=carried.dtype,
    )
