"""An encoder-decoder as programs: one that encodes, one that decodes a step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from precast.runtime.artifact import ENCODER_MASK
from precast.runtime.artifact.schema import CacheLayer, Dim, Graph, Input, Output
from precast.runtime.errors import ExportError

from ...architectures import attention_interface, use_cached_attention
from ...architectures.cache_names import cache_argument
from ..decoder.fused_attention import logits_at
from ..plan import GraphPlan
from ..trace import Program, export_program
from .cross_caches import Both, Held, States
from .plan import Seq2SeqPlan, cross_names
from .relative_bias import bias_over_caches

__all__ = ["trace"]


def trace(model: nn.Module, plan: Seq2SeqPlan, scales: Any = None) -> Iterator[Program]:
    """One program per graph of the plan. Raises ExportError."""
    encode = [graph for graph in plan.graphs if graph.role == "encode"]
    for graph, positions in zip(encode, plan.positions, strict=True):
        yield _trace_encoder(model, plan, graph, positions)
    yield _trace_decoder(model, plan, plan.graphs[-1])


class _Encoder(nn.Module):
    """A source in, the keys and values out that the decoder's layers make of it.

    They are met by running the decoder on one token and letting its cache remember them; the rest of the decoder is
    left out of the graph, since nothing that is given back depends on it.
    """

    def __init__(self, model: nn.Module, inputs: list[str], layers: int) -> None:
        super().__init__()
        self.model, self.inputs, self.layers = model, inputs, layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers = [Held() for _ in range(self.layers)]
        cache = EncoderDecoderCache(DynamicCache(), Cache(layers=layers))
        given: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        first = torch.zeros(1, 1, dtype=torch.int64)
        given[cache_argument(self.model)] = cache
        self.model(**given, decoder_input_ids=first, use_cache=True, return_dict=True)
        return tuple(tensor for layer in layers for tensor in layer.held())


class _Decoder(nn.Module):
    """One step: tokens, caches and what was encoded in, logits at the asked positions and updated caches out."""

    def __init__(self, model: nn.Module, plan: Seq2SeqPlan) -> None:
        super().__init__()
        self.model, self.capacity, self.is_masked = model, plan.capacity, plan.is_masked
        self.positions, self.width = plan.positions[-1], model.get_encoder().config.hidden_size  # type: ignore[operator]
        self.takes_positions = "decoder_position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        new_lengths: Tensor,
        logit_positions: Tensor,
        encoded: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        mask = encoded[0] if self.is_masked else None
        cross = encoded[1:] if self.is_masked else encoded
        pairs = list(zip(cross[0::2], cross[1::2], strict=True))
        own_pairs = list(zip(past[0::2], past[1::2], strict=True))
        caches = attention_interface.Caches(own_pairs, past_lengths, new_lengths, encoded=pairs, encoded_mask=mask)
        with (
            attention_interface.use_caches(caches) as own,
            bias_over_caches(self.model, past_lengths, self.capacity),
            logits_at(self.model, logit_positions) as at,
        ):
            cache = Both(own, Cache(layers=[Held(*pair) for pair in pairs]), past_lengths[:, None].long())
            arguments = self._arguments(input_ids, past_lengths) | {cache_argument(self.model): cache}
            logits = at(self.model(**arguments).logits)
        self._check(caches)
        return logits, *(tensor for index in range(len(caches.past)) for tensor in caches.present[index])

    def _arguments(self, input_ids: Tensor, past_lengths: Tensor) -> dict[str, Any]:
        batch, length = input_ids.shape
        # The states are not looked at any more, only their shape; the mask goes straight to the operator.
        states = torch.zeros(batch, self.positions, self.width)
        arguments = {
            "encoder_outputs": States(last_hidden_state=states),
            "attention_mask": torch.zeros(batch, 1, 1, self.positions),
            "decoder_input_ids": input_ids,
            "decoder_attention_mask": torch.ones(batch, length, dtype=torch.int64),
            "use_cache": True,
            "return_dict": True,
        }
        if self.takes_positions:
            arguments["decoder_position_ids"] = past_lengths[:, None].long() + torch.arange(length)[None]
        return arguments

    def _check(self, caches: attention_interface.Caches) -> None:
        wanted = len(caches.past), len(caches.encoded or ())
        found = len(caches.present), caches.cross_calls
        if found != wanted:
            raise ExportError(
                f"{type(self.model).__name__} attends to its own tokens in {wanted[0]} layers and to the encoder in "
                f"{wanted[1]}, but {found[0]} and {found[1]} of them do so through transformers' AttentionInterface. "
                f"This architecture needs an adapter: see CONTRIBUTING.md, 'Add an architecture'."
            )


def _trace_encoder(model: nn.Module, plan: Seq2SeqPlan, graph: GraphPlan, positions: int) -> Program:
    program = _Encoder(model, [spec.name for spec in plan.source], len(plan.cross)).eval()
    inputs = [spec.as_input({"length": graph.length}) for spec in plan.source]
    example = tuple(torch.ones(_sizes(spec.shape), dtype=getattr(torch, spec.dtype)) for spec in inputs)
    exported = export_program(program, example, None)
    outputs = [
        Output(name=name, dtype=plan.dtype, shape=shape, slice=[None] * 4) for name, shape in _cross(plan, 1, positions)
    ]
    described = Graph(
        name=graph.name, role="encode", file="pending", batch=1, length=graph.length, capacity=0,
        inputs=inputs, outputs=outputs, cache=[],
    )  # fmt: skip
    return Program(described, exported)


def _trace_decoder(model: nn.Module, plan: Seq2SeqPlan, graph: GraphPlan) -> Program:
    program = _Decoder(model, plan).eval()
    context, own = _context_inputs(plan, graph.batch), 2 * len(plan.cache)
    shapes: tuple[Any, ...] | None = None
    if isinstance(graph.length, Dim):
        free = torch.export.Dim("length", min=1, max=plan.capacity)
        asked = torch.export.Dim("positions", min=1, max=plan.capacity)
        shapes = ({1: free}, None, None, {1: asked}, [None] * len(context), [None] * own)
    with use_cached_attention(model):
        exported = export_program(program, _decoder_example(plan, graph, context), shapes)
    output = next(node for node in exported.graph.nodes if node.op == "output")
    vocabulary = int(output.args[0][0].meta["val"].shape[-1])
    return Program(_decoder_graph(plan, graph, context, vocabulary), exported)


def _decoder_example(plan: Seq2SeqPlan, graph: GraphPlan, context: list[Input]) -> tuple[Any, ...]:
    is_free, batch = isinstance(graph.length, Dim), graph.batch
    length, positions = (min(8, plan.capacity), min(3, plan.capacity)) if is_free else (1, 1)
    caches = [torch.zeros(batch, layer.heads, plan.capacity, layer.head_dim) for layer in plan.cache for _ in range(2)]
    return (
        torch.ones(batch, length, dtype=torch.int64),
        torch.zeros(batch, dtype=torch.int32),
        torch.full((batch,), length, dtype=torch.int32),
        torch.zeros(batch, positions, dtype=torch.int64),
        [torch.ones(_sizes(spec.shape), dtype=getattr(torch, spec.dtype)) for spec in context],
        caches,
    )


def _context_inputs(plan: Seq2SeqPlan, batch: int) -> list[Input]:
    """What the decoder takes of the encoder, at the largest length."""
    size = plan.positions[-1]
    mask = [Input(name=ENCODER_MASK, dtype="int64", shape=[batch, size], pad=0)] if plan.is_masked else []
    named = _cross(plan, batch, size)
    return [*mask, *(Input(name=name, dtype=plan.dtype, shape=shape, pad=0) for name, shape in named)]


def _cross(plan: Seq2SeqPlan, batch: int, positions: int) -> list[tuple[str, list[int | Dim]]]:
    """Names and shapes of the encoder's keys and values."""
    return [
        (name, [batch, layer.heads, positions, width])
        for layer, names in zip(plan.cross, cross_names(len(plan.cross)), strict=True)
        for name, width in zip(names, (layer.key_dim, layer.value_dim), strict=True)
    ]


def _sizes(shape: list[int | Dim]) -> list[int]:
    return [size for size in shape if isinstance(size, int)]


def _decoder_graph(plan: Seq2SeqPlan, graph: GraphPlan, context: list[Input], vocabulary: int) -> Graph:
    batch, length = graph.batch, graph.length
    positions: int | Dim = Dim(min=1, max=plan.capacity) if isinstance(length, Dim) else 1
    cache = [_cache_layer(plan, index) for index in range(len(plan.cache))]
    shapes: dict[str, list[int | Dim]] = {
        name: [batch, layer.heads, plan.capacity, layer.head_dim]
        for layer in cache
        for name in (layer.key_in, layer.key_out, layer.value_in, layer.value_out)
    }
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
            *(
                Input(name=name, dtype=plan.cache_dtype, shape=shapes[name], pad=0)
                for layer in cache
                for name in (layer.key_in, layer.value_in)
            ),
        ],
        outputs=[
            Output(
                name="logits", dtype=plan.dtype, shape=[batch, positions, vocabulary],
                slice=["batch", "positions", None],
            ),
            *(
                Output(name=name, dtype=plan.cache_dtype, shape=shapes[name], slice=[None] * 4)
                for layer in cache
                for name in (layer.key_out, layer.value_out)
            ),
        ],
        cache=cache,
    )  # fmt: skip


def _cache_layer(plan: Seq2SeqPlan, index: int) -> CacheLayer:
    return CacheLayer(
        layer=index,
        key_in=f"past_key_values.{index}.key",
        key_out=f"present.{index}.key",
        value_in=f"past_key_values.{index}.value",
        value_out=f"present.{index}.value",
        heads=plan.cache[index].heads,
        head_dim=plan.cache[index].head_dim,
        dtype=plan.cache_dtype,
        window=None,
    )
