"""The plan of a decoder: which graphs are compiled, over which caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from precast.runtime.artifact.backends import get_backend
from precast.runtime.artifact.schema import Dim, Dtype, Graph, Lora
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import UsageError

from ...adapters.prefix import after_prefix
from ...adapters.prefix_files import LayerSizes, PrefixFile, check_fits, read_prefix
from ...architectures.scaled_rotary import longrope_limit
from ...checkpoint.checkpoint import Checkpoint
from ...options import ExportOptions
from ..plan import GraphPlan, Plan, check_length, common_fields, single_batch_size
from .eager_attention import EAGER_NOTE, CacheLayout, TensorLayout, find_cache_layout, fused_blocker
from .fused_attention import takes_position_ids
from .lora_slots import plan_slots
from .recurrent_states import StateLayout

__all__ = ["HEAD_MULTIPLE", "CachePlan", "CachedPlan", "DecoderPlan", "plan", "round_head_size"]

HEAD_MULTIPLE = 8
"""Head sizes are rounded up to this: ONNX Runtime's GroupQueryAttention takes multiples of 8 only."""

FIXED_LENGTHS = (64, 512)
"""Prefill lengths where a free length is impossible, unless prefill_lengths says otherwise."""


@dataclass(frozen=True)
class CachePlan:
    """The cache of one layer."""

    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class CachedPlan(Plan):
    """The plan of a model with key/value caches of `capacity` positions, one per layer in `cache`."""

    capacity: int
    cache: tuple[CachePlan, ...]
    cache_dtype: Dtype


@dataclass(frozen=True, kw_only=True)
class DecoderPlan(CachedPlan):
    """One graph with a free query length, or static prefill graphs and a decode graph, over one set of caches."""

    eager: CacheLayout | None
    """How the model itself caches, where it keeps its eager attention; None where attention is the fused operator."""
    fused_blocker: str
    """Why attention cannot be the fused operator; empty where it is."""

    @property
    def cache_widths(self) -> list[int]:
        return [layer.head_dim for layer in self.cache]

    @property
    def notes(self) -> dict[str, str]:
        notes = {"attention": EAGER_NOTE, "attention_because": self.fused_blocker} if self.eager and self.cache else {}
        notes |= {"prefix": f"{self.prefix.length} positions ({self.prefix.method})"} if self.prefix else {}
        notes |= {"adapters": _describe_slots(self.lora)} if self.lora else {}
        return notes | ({"states": "tokens are read one at a time"} if self.states else {})

    @property
    def skipped_positions(self) -> int:
        """How many cache positions lie before the one that a model counts as its first."""
        return self.prefix.length if self.prefix and self.prefix.positions == "from-zero" else 0

    @property
    def states(self) -> list[StateLayout]:
        return self.eager.states if self.eager else []

    def outline(self) -> list[Graph]:
        graphs = [
            Graph(
                name=graph.name, role=graph.role, file="pending", batch=graph.batch, length=graph.length,
                capacity=self.capacity, inputs=[], outputs=[], cache=[],
            )
            for graph in self.graphs
        ]  # fmt: skip
        return after_prefix(graphs, self.prefix.length) if self.prefix else graphs

    @property
    def cache_bytes(self) -> int:
        numbers = sum(2 * layer.heads * layer.head_dim for layer in self.cache) * self.batch_size * self.capacity
        item_size: int = getattr(torch, self.cache_dtype).itemsize
        states = sum(state.example(1).nbytes for state in self.states)
        # A state's input and output have memory of their own.
        return numbers * item_size + 2 * self.batch_size * states


def plan(checkpoint: Checkpoint, options: ExportOptions, task: Task, model: nn.Module) -> DecoderPlan:
    """Plan a decoder's graphs and caches. Raises UsageError for impossible shapes, CheckpointError for a model whose
    cache is of an unknown form."""
    if len(options.sequence_length) > 1:
        raise UsageError(
            f"sequence_length={','.join(map(str, options.sequence_length))}: a decoder has one capacity. Give the "
            f"largest, {max(options.sequence_length)}; shorter requests cost no more in it."
        )
    capacity = options.sequence_length[0] if options.sequence_length else _default_capacity(checkpoint)
    check_length(checkpoint, capacity)
    if max(options.prefill_lengths, default=0) > capacity:
        raise UsageError(f"prefill_lengths={max(options.prefill_lengths)} is more than sequence_length={capacity}.")
    batch = single_batch_size(options)
    found = find_cache_layout(model, task)
    if found.states:
        _check_one_by_one(options, model)
    row = get_backend(options.backend)
    is_fixed = found.is_tuples or (row.is_static and not found.states)
    prefill = tuple(sorted(options.prefill_lengths)) or (_fixed_lengths(capacity) if is_fixed else ())
    cache = tuple(_cache_plan(layer.cached) for layer in found.layers if layer.cached)
    reason = fused_blocker(model, found, [(layer.heads, layer.head_dim) for layer in cache])
    if reason:
        _check_one_operator(options, model)
    sizes = tuple(_layer_sizes(layer.cached) for layer in found.layers if layer.cached)
    prefix = _read_prefix(checkpoint, options, model, found, sizes, capacity, is_fused=not reason)
    return DecoderPlan(
        **common_fields(checkpoint, options, task, model),
        batch_size=batch,
        lengths=(capacity,),
        capacity=capacity,
        prefill_lengths=prefill,
        graphs=_decoder_graphs(batch, capacity, prefill, one_by_one=bool(found.states), is_apart=row.decodes_apart),
        cache=cache,
        cache_dtype=options.kv_cache,
        eager=found if reason else None,
        fused_blocker=reason,
        prefix=prefix,
        layer_sizes=sizes,
        lora=plan_slots(options.adapter_slots, model, task),
    )


def _describe_slots(lora: Lora) -> str:
    return f"{lora.slots} slots of rank {lora.rank} for {len(lora.targets)} layers"


def _read_prefix(
    checkpoint: Checkpoint, options: ExportOptions, model: nn.Module, found: CacheLayout, sizes: tuple[LayerSizes, ...],
    capacity: int, *, is_fused: bool,
) -> PrefixFile | None:  # fmt: skip
    """The prefix that the options name, checked. Raises CheckpointError, and UsageError where the model has no place
    for it."""
    if options.prefix_tuning is None:
        return None
    if problem := _prefix_blocker(model, found, sizes):
        raise UsageError(f"prefix_tuning={options.prefix_tuning!r}: {type(model).__name__} {problem}. Leave it out.")
    prefix = read_prefix(options.prefix_tuning)
    if prefix.positions == "from-zero" and not (is_fused and takes_position_ids(model)):
        raise UsageError(
            f"prefix_tuning={options.prefix_tuning!r}: prompts after it count their positions from 0, as PaddleNLP has "
            f"them, and {type(model).__name__} counts cache positions, in code of its own. PEFT's adapters are taken."
        )
    check_fits(prefix, checkpoint.name, sizes, model.get_input_embeddings().weight.shape[1], capacity)  # type: ignore[operator]
    return prefix


def _prefix_blocker(model: nn.Module, found: CacheLayout, sizes: tuple[LayerSizes, ...]) -> str:
    """Why a model's caches cannot begin with a prefix; empty where they can."""
    if found.states:
        return "carries states from token to token, and a prefix is keys and values alone"
    if found.is_tuples:
        return "keeps its cache as tuples of tensors, in code of its own"
    if len(sizes) < len(found.layers) or len(set(sizes)) > 1 or any(len(set(each.cached)) > 1 for each in found.layers):
        return "caches keys and values of several sizes, or of some layers only, which a prefix has alike in all"
    return ""


def _decoder_graphs(
    batch: int, capacity: int, prefill: tuple[int, ...], *, one_by_one: bool, is_apart: bool
) -> tuple[GraphPlan, ...]:
    step = GraphPlan("decode", "decode", batch, 1)
    if prefill or one_by_one or (is_apart and capacity == 1):
        return *(GraphPlan(f"prefill_{length}", "prefill", batch, length) for length in prefill), step
    if is_apart:
        return GraphPlan("prefill", "prefill", batch, Dim(min=2, max=capacity)), step
    return (GraphPlan("model", "decoder", batch, Dim(min=1, max=capacity)),)


def _fixed_lengths(capacity: int) -> tuple[int, ...]:
    """Prefill lengths for code that caches in tuples of tensors, which looks at their sizes: these have to be fixed."""
    return tuple(length for length in FIXED_LENGTHS if length < capacity) or (capacity,)


def _default_capacity(checkpoint: Checkpoint) -> int:
    limit = checkpoint.max_length
    if limit is None:
        raise UsageError(
            f"The config of {checkpoint.name} does not say how long its sequences may be; give sequence_length=N "
            f"(prompt and new tokens together)."
        )
    return min(limit, longrope_limit(checkpoint.text_config) or limit)


def _cache_plan(layer: tuple[TensorLayout, ...]) -> CachePlan:
    heads, width = (max(getattr(stored, size) for stored in layer) for size in ("heads", "width"))
    return CachePlan(heads, round_head_size(width))


def _layer_sizes(layer: tuple[TensorLayout, ...]) -> LayerSizes:
    return layer[0].heads, layer[0].width


def round_head_size(width: int) -> int:
    """The smallest multiple of HEAD_MULTIPLE that is no less than `width`."""
    return -(-width // HEAD_MULTIPLE) * HEAD_MULTIPLE


def _check_one_by_one(options: ExportOptions, model: nn.Module) -> None:
    if options.prefill_lengths:
        raise UsageError(
            f"prefill_lengths={','.join(map(str, options.prefill_lengths))}: {type(model).__name__} carries states "
            f"that padding would change, so it is compiled to read one token at a time. Leave it out."
        )


def _check_one_operator(options: ExportOptions, model: nn.Module) -> None:
    if options.kv_cache != "float32":
        raise UsageError(
            f"kv_cache={options.kv_cache!r} needs attention that is one operator, and {type(model).__name__} computes "
            f"its own in ordinary ones. Leave it out."
        )
