"""Trace a decoder: one program per graph, each one step with caches as inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from precast.runtime.artifact.schema import State

from ...architectures import make_traceable, use_cached_attention
from ...operators.attention import Scales
from ..plan import GraphPlan
from ..trace import Program, export_program
from .eager_attention import EagerDecoder
from .fused_attention import FusedDecoder
from .graph import describe_step, example_caches, example_slots, example_tokens, free_shapes, vocabulary_size
from .plan import DecoderPlan
from .recurrent_states import StateLayout

__all__ = ["trace"]


def trace(model: nn.Module, plan: DecoderPlan, scales: Scales | None = None) -> Iterator[Program]:
    """Trace one program per graph of the plan; `scales` are those of caches in int8. Raises ExportError."""
    return (_trace_step(model, plan, graph, scales) for graph in plan.graphs)


def _trace_step(model: nn.Module, plan: DecoderPlan, graph: GraphPlan, scales: Scales | None) -> Program:
    program = _make_step(model, plan, scales)
    rest = [example_caches(plan, graph.batch)]
    if plan.eager:
        rest.append([state.example(graph.batch) for state in plan.states])
    if plan.lora:
        rest.append(example_slots(plan.lora, graph.batch))
    example = (*example_tokens(graph, plan.capacity), *rest)
    free = free_shapes(graph, plan.capacity, *([None] * len(tensors) for tensors in rest))
    with make_traceable(model) if plan.eager else use_cached_attention(model):
        exported = export_program(program, example, free)
    windows = [None] * len(plan.cache) if plan.eager else _find_windows(exported)
    states = [_describe_state(state, graph.batch) for state in plan.states]
    return Program(describe_step(plan, graph, vocabulary_size(exported), windows=windows, states=states), exported)


def _make_step(model: nn.Module, plan: DecoderPlan, scales: Scales | None) -> nn.Module:
    if not plan.eager:
        return FusedDecoder(model, len(plan.cache), scales, plan.skipped_positions, plan.lora).eval()
    with torch.no_grad():
        # Code of a checkpoint's own may prepare things on its first call, which must not happen while it is traced.
        model(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    return EagerDecoder(model, plan.eager, plan.capacity, plan.lora).eval()


def _find_windows(exported: torch.export.ExportedProgram) -> list[int | None]:
    """The sliding window of each layer, read off the operators; a layer is known by its cache input."""
    windows = {
        node.args[3]: node.args[9] if node.args[8] == "window" else None
        for node in exported.graph.nodes
        if node.target is torch.ops.precast.cached_attention.default
    }
    return [windows[node] for node in exported.graph.nodes if node.op == "placeholder" and node in windows]


def _describe_state(state: StateLayout, batch: int) -> State:
    return State(
        name_in=f"past_states.{state.name}",
        name_out=f"present_states.{state.name}",
        shape=[batch, *state.shape],
        dtype=state.dtype,
    )
