"""The plan of an encoder-decoder: one encode graph per source length, and one decode graph for all of them.

An encode graph's outputs are the keys and values of every layer's cross-attention; the decode graph has inputs of the
same names, so nothing of the source is computed twice. Sources are encoded one at a time: on a CPU that costs no more
than several together, and all beams share one encoding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Dim, Graph
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError, UsageError

from ...architectures.cache_names import find_cache
from ...checkpoint.checkpoint import Checkpoint
from ...options import ExportOptions
from ..decoder.plan import CachedPlan, CachePlan, round_head_size
from ..plan import (
    GraphPlan,
    TensorPlan,
    check_blocks,
    check_length,
    common_fields,
    run_skeleton,
    single_batch_size,
)

__all__ = ["CrossPlan", "Seq2SeqPlan", "cross_names", "plan"]


@dataclass(frozen=True)
class CrossPlan:
    """Cross-attention of one layer: keys [1, heads, positions, key_dim], values [1, heads, positions, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class Seq2SeqPlan(CachedPlan):
    """One encode graph per source length, and one decode graph. `positions` says how many encoder positions each of the
    source lengths becomes."""

    source: tuple[TensorPlan, ...]
    positions: tuple[int, ...]
    cross: tuple[CrossPlan, ...]

    @property
    def is_masked(self) -> bool:
        """Whether sources may be shorter than the compiled length."""
        return any(spec.name == "attention_mask" for spec in self.source)

    @property
    def reads_text(self) -> bool:
        return any(spec.name == "input_ids" for spec in self.source)

    def outline(self) -> list[Graph]:
        return [
            Graph(
                name=graph.name, role=graph.role, file="pending", batch=graph.batch, length=graph.length,
                capacity=0 if graph.role == "encode" else self.capacity,
                inputs=[spec.as_input({"batch": 1, "length": graph.length}) for spec in self.source]
                if graph.role == "encode" else [],
                outputs=[], cache=[],
            )
            for graph in self.graphs
        ]  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        own = sum(2 * layer.heads * layer.head_dim for layer in self.cache) * self.capacity
        encoded = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self.cross) * self.positions[-1]
        item_size: int = getattr(torch, self.cache_dtype).itemsize
        return (own + encoded) * self.batch_size * item_size

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "decoder_sequence_length": self.capacity}


def cross_names(layers: int) -> list[tuple[str, str]]:
    """Names of the tensors with the encoder's keys and values, by layer."""
    return [(f"encoder.{index}.key", f"encoder.{index}.value") for index in range(layers)]


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> Seq2SeqPlan:
    """Plan an encoder-decoder's graphs and caches. Raises UsageError for missing or impossible shapes, CheckpointError
    for a model that is no encoder-decoder with keys and values in its caches."""
    lengths = _lengths(checkpoint, options, task, model)
    capacity = _capacity(checkpoint, options, lengths)
    source = _plan_source(checkpoint, model)
    found = [_find_caches(checkpoint, task, model, _meta_example(source, length)) for length in lengths]
    batch = single_batch_size(options)
    return Seq2SeqPlan(
        **common_fields(checkpoint, options, task, model),
        batch_size=batch,
        lengths=lengths,
        graphs=(
            *(GraphPlan(_encode_name(lengths, length), "encode", 1, length) for length in lengths),
            _decode_graph(batch, capacity, is_apart=get_backend(options.backend).decodes_apart),
        ),
        capacity=capacity,
        source=source,
        positions=tuple(cross[0].keys.shape[2] for _, cross in found),
        cache=tuple(_cache_plan(layer) for layer in found[0][0]),
        cache_dtype=options.kv_cache,
        cross=tuple(
            CrossPlan(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in found[0][1]
        ),
    )


def _decode_graph(batch: int, capacity: int, *, is_apart: bool) -> GraphPlan:
    """One graph for any number of tokens; or, for backends that compile a single token apart, for one token only, since
    an answer begins with a few tokens at most."""
    if is_apart:
        return GraphPlan("decode", "decode", batch, 1)
    return GraphPlan("decoder", "decoder", batch, Dim(min=1, max=capacity))


def _encode_name(lengths: tuple[int, ...], length: int) -> str:
    return "encode" if len(lengths) == 1 else f"encode_{length}"


def _takes_features(model: nn.Module) -> bool:
    return "input_features" in inspect.signature(model.forward).parameters


def _lengths(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> tuple[int, ...]:
    if _takes_features(model):
        return (_frame_count(checkpoint, options, task, model),)
    options.check_sizes(checkpoint.given, task.name, ["sequence_length"], checkpoint.max_length)
    for length in options.sequence_length:
        check_length(checkpoint, length)
        check_blocks(checkpoint, length)
    return tuple(sorted(options.sequence_length))


def _frame_count(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> int:
    """The one length, in frames of the spectrogram, that Whisper's encoder takes: 30 seconds."""
    if options.sequence_length:
        raise UsageError(
            f"{type(model).__name__} takes sound of one length only, so sequence_length says nothing about it. For "
            f"its answers' length give decoder_sequence_length."
        )
    positions = getattr(checkpoint.config, "max_source_positions", None)
    if not isinstance(positions, int) or checkpoint.config.model_type != "whisper":
        raise CheckpointError(
            f"{checkpoint.name} cannot be exported for {task.name}: of the models that write down speech, "
            f"encoder-decoders of type 'whisper' can, and those with a CTC head."
        )
    return 2 * positions


def _capacity(checkpoint: Checkpoint, options: ExportOptions, lengths: tuple[int, ...]) -> int:
    """Tokens of an answer, the start token included: as asked, or as many as the model has positions for."""
    config = checkpoint.text_config
    limit = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    asked = options.decoder_sequence_length
    if asked and limit and asked > limit:
        raise UsageError(
            f"decoder_sequence_length={asked} is more than {checkpoint.name} was made for: its answers have "
            f"{limit} positions."
        )
    return asked or limit or lengths[-1]


def _plan_source(checkpoint: Checkpoint, model: nn.Module) -> tuple[TensorPlan, ...]:
    if _takes_features(model):
        return (TensorPlan("input_features", "float32", (1, checkpoint.config.num_mel_bins, "length"), 0, ("length",)),)
    return (
        TensorPlan("input_ids", "int64", (1, "length"), checkpoint.pad_token_id),
        TensorPlan("attention_mask", "int64", (1, "length"), 0),
    )


def _meta_example(source: tuple[TensorPlan, ...], length: int) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.ones(
            [length if isinstance(axis, str) else axis for axis in spec.axes],
            dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in source
    }


def _cache_plan(layer: Any) -> CachePlan:
    width = max(layer.keys.shape[-1], layer.values.shape[-1])
    return CachePlan(layer.keys.shape[1], round_head_size(width))


def _find_caches(checkpoint: Checkpoint, task: Task, model: nn.Module, example: dict[str, Any]) -> tuple[Any, Any]:
    """The layers of the caches that a model without weights fills: of self-attention, and of cross-attention."""
    example["decoder_input_ids"] = torch.ones(1, 2, dtype=torch.int64, device="meta")
    cache = find_cache(run_skeleton(model, task, example | {"use_cache": True}))
    own = getattr(getattr(cache, "self_attention_cache", None), "layers", None)
    cross = getattr(getattr(cache, "cross_attention_cache", None), "layers", None)
    if not own or not cross or any(getattr(layer, "keys", None) is None for layer in (*own, *cross)):
        raise CheckpointError(
            f"{type(model).__name__} keeps another state than keys and values of its own and of the encoder's; precast "
            f"cannot export {checkpoint.name} for {task.name}."
        )
    return own, cross
