"""A decoder as one step: tokens and caches in, logits at the asked positions and updated caches out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.artifact.schema import CacheLayer, Dim, Graph, Input, Output
from precast.runtime.errors import ExportError

from ..architectures import adapted
from ..plan import GraphPlan
from ..trace import Program, export_program
from . import hooks
from .kv_cache import Scales
from .plan import DecoderPlan

__all__ = ["logits_at", "trace"]


def trace(model: nn.Module, plan: DecoderPlan, scales: Scales | None = None) -> Iterator[Program]:
    """One program per graph of the plan; `scales` are those of caches in int8. Raises ExportError."""
    return (_trace(model, plan, graph, scales) for graph in plan.graphs)


class _Decoder(nn.Module):
    """The model as one step: tokens and caches in, logits at the asked positions and updated caches out."""

    def __init__(self, model: nn.Module, layers: int, scales: Scales | None) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.scales = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in scales or [])
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, new_lengths: Tensor, logit_positions: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        flat = list(self.scales)
        scales = list(zip(flat[0::2], flat[1::2], strict=True)) or None
        caches = hooks.Caches(list(zip(past[0::2], past[1::2], strict=True)), past_lengths, new_lengths, scales)
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": True, "return_dict": True}
        if self.takes_positions:
            arguments["position_ids"] = past_lengths[:, None].long() + torch.arange(input_ids.shape[1])[None]
        with hooks.tracing(caches) as cache, logits_at(self.model, logit_positions) as at:
            logits = at(self.model(past_key_values=cache, **arguments).logits)
        self._check(caches)
        return logits, *(tensor for index in range(self.layers) for tensor in caches.present[index])

    def _check(self, caches: hooks.Caches) -> None:
        if len(caches.present) != self.layers:
            raise ExportError(
                f"{type(self.model).__name__} has {self.layers} cached layers but {len(caches.present)} of them call "
                f"attention through transformers' AttentionInterface. This architecture needs an adapter: see "
                f"CONTRIBUTING.md, 'Add an architecture'."
            )


@contextmanager
def logits_at(model: nn.Module, positions: Tensor) -> Iterator[Any]:
    """Compute logits for `positions` [B, K] only, by picking hidden states before the output embedding.

    Yields what maps the model's logits to [B, K, V]: nothing where the hook picked already, else the picking.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        yield lambda logits: _pick(logits, positions)
        return
    handle = head.register_forward_pre_hook(lambda _, args: (_pick(args[0], positions), *args[1:]))
    try:
        yield lambda logits: logits
    finally:
        handle.remove()


def _pick(states: Tensor, positions: Tensor) -> Tensor:
    """[B, S, X] at [B, K] -> [B, K, X]."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[-1]))


def _trace(model: nn.Module, plan: DecoderPlan, graph: GraphPlan, scales: Scales | None) -> Program:
    program = _Decoder(model, len(plan.cache), scales).eval()
    length, positions, shapes = graph.length, 1, None
    if isinstance(length, Dim):
        length, positions = min(8, plan.capacity), min(3, plan.capacity)
        free = torch.export.Dim("length", min=1, max=plan.capacity)
        asked = torch.export.Dim("positions", min=1, max=plan.capacity)
        shapes = ({1: free}, None, None, {1: asked}, [None] * (2 * len(plan.cache)))
    example = _decoder_example(plan, graph.batch, length, positions)
    with adapted(model):
        exported = export_program(program, example, shapes)
    return Program(_decoder_graph(plan, graph, _windows(exported), _vocabulary(exported)), exported)


def _windows(exported: torch.export.ExportedProgram) -> list[int | None]:
    """The sliding window of each layer, read off the operators; a layer is known by the cache that it takes."""
    caches = [node for node in exported.graph.nodes if node.op == "placeholder"][-2 * _count(exported) :: 2]
    windows = {
        node.args[3]: node.args[9] if node.args[8] == "window" else None
        for node in exported.graph.nodes
        if node.target is torch.ops.precast.cached_attention.default
    }
    return [windows[cache] for cache in caches]


def _count(exported: torch.export.ExportedProgram) -> int:
    return sum(node.target is torch.ops.precast.cached_attention.default for node in exported.graph.nodes)


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
        ],
        cache=cache,
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
