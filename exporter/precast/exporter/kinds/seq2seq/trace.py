"""Trace an encoder-decoder: a program per source length that encodes, and one for a decoding step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from precast.runtime.artifact import ENCODER_MASK
from precast.runtime.artifact.schema import Dim, Graph, Input, Output
from precast.runtime.errors import ExportError

from ...architectures import attention_interface, use_cached_attention
from ...architectures.cache_names import cache_argument
from ..decoder.fused_attention import pick_logits
from ..decoder.graph import describe_step, example_caches, example_tokens, free_shapes, vocabulary_size
from ..plan import GraphPlan
from ..trace import Program, export_program
from .cross_caches import CrossLayer, EncoderStates, PairedCache
from .plan import Seq2SeqPlan, cross_names
from .relative_bias import use_relative_bias

__all__ = ["trace"]


def trace(model: nn.Module, plan: Seq2SeqPlan, scales: Any = None) -> Iterator[Program]:
    """Trace one program per graph of the plan. Raises ExportError."""
    encode = [graph for graph in plan.graphs if graph.role == "encode"]
    for graph, positions in zip(encode, plan.positions, strict=True):
        yield _trace_encoder(model, plan, graph, positions)
    yield _trace_decoder(model, plan, plan.graphs[-1])


class _Encoder(nn.Module):
    """The encoder and the projections of cross-attention: a source in, keys and values of every decoder layer out.

    The decoder is run on one token, and its cache notes them; the rest of the decoder stays out of the graph, since no
    output depends on it.
    """

    def __init__(self, model: nn.Module, inputs: list[str], layers: int) -> None:
        super().__init__()
        self.model, self.inputs, self.layers = model, inputs, layers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        layers = [CrossLayer() for _ in range(self.layers)]
        cache = EncoderDecoderCache(DynamicCache(), Cache(layers=layers))
        given: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        first = torch.zeros(1, 1, dtype=torch.int64)
        given[cache_argument(self.model)] = cache
        self.model(**given, decoder_input_ids=first, use_cache=True, return_dict=True)
        return tuple(tensor for layer in layers for tensor in layer.keys_and_values())


class _Decoder(nn.Module):
    """One step: tokens, encoded keys and values, and caches in, logits at `logit_positions` and updated caches out."""

    def __init__(self, model: nn.Module, plan: Seq2SeqPlan) -> None:
        super().__init__()
        self.model, self.capacity, self.is_masked = model, plan.capacity, plan.is_masked
        self.positions, self.width = plan.positions[-1], model.get_encoder().config.hidden_size  # type: ignore[operator]
        self.takes_position_ids = "decoder_position_ids" in inspect.signature(model.forward).parameters

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
            use_relative_bias(self.model, past_lengths, self.capacity),
            pick_logits(self.model, logit_positions) as pick,
        ):
            cache = PairedCache(own, Cache(layers=[CrossLayer(*pair) for pair in pairs]), past_lengths[:, None].long())
            arguments = self._arguments(input_ids, past_lengths) | {cache_argument(self.model): cache}
            logits = pick(self.model(**arguments).logits)
        self._check(caches)
        return logits, *(tensor for index in range(len(caches.past)) for tensor in caches.present[index])

    def _arguments(self, input_ids: Tensor, past_lengths: Tensor) -> dict[str, Any]:
        batch, length = input_ids.shape
        # Of the states only the shape is used from here on; the mask goes straight to the operator.
        states = torch.zeros(batch, self.positions, self.width)
        arguments = {
            "encoder_outputs": EncoderStates(last_hidden_state=states),
            "attention_mask": torch.zeros(batch, 1, 1, self.positions),
            "decoder_input_ids": input_ids,
            "decoder_attention_mask": torch.ones(batch, length, dtype=torch.int64),
            "use_cache": True,
            "return_dict": True,
        }
        if self.takes_position_ids:
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
    exported = export_program(program, tuple(map(_ones, inputs)), None)
    shapes = _cross_shapes(plan, 1, positions)
    outputs = [Output(name=name, dtype=plan.dtype, shape=shape, slice=[None] * 4) for name, shape in shapes]
    described = Graph(
        name=graph.name, role="encode", file="pending", batch=1, length=graph.length, capacity=0,
        inputs=inputs, outputs=outputs, cache=[],
    )  # fmt: skip
    return Program(described, exported)


def _trace_decoder(model: nn.Module, plan: Seq2SeqPlan, graph: GraphPlan) -> Program:
    program = _Decoder(model, plan).eval()
    context, caches = _context_inputs(plan, graph.batch), example_caches(plan, graph.batch)
    example = (*example_tokens(graph, plan.capacity), [_ones(spec) for spec in context], caches)
    free = free_shapes(graph, plan.capacity, [None] * len(context), [None] * len(caches))
    with use_cached_attention(model):
        exported = export_program(program, example, free)
    windows = [None] * len(plan.cache)
    return Program(describe_step(plan, graph, vocabulary_size(exported), windows=windows, context=context), exported)


def _context_inputs(plan: Seq2SeqPlan, batch: int) -> list[Input]:
    """The decoder's inputs that the encoder made, at the largest source length."""
    size = plan.positions[-1]
    mask = [Input(name=ENCODER_MASK, dtype="int64", shape=[batch, size], pad=0)] if plan.is_masked else []
    named = _cross_shapes(plan, batch, size)
    return [*mask, *(Input(name=name, dtype=plan.dtype, shape=shape, pad=0) for name, shape in named)]


def _cross_shapes(plan: Seq2SeqPlan, batch: int, positions: int) -> list[tuple[str, list[int | Dim]]]:
    """Names and shapes of the encoder's keys and values."""
    return [
        (name, [batch, layer.heads, positions, width])
        for layer, names in zip(plan.cross, cross_names(len(plan.cross)), strict=True)
        for name, width in zip(names, (layer.key_dim, layer.value_dim), strict=True)
    ]


def _ones(spec: Input) -> Tensor:
    return torch.ones([size for size in spec.shape if isinstance(size, int)], dtype=getattr(torch, spec.dtype))
