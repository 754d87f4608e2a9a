"""A decoder that keeps transformers' eager attention, for models that one fused operator cannot compute.

Some cache latents and expand them afterwards (DeepSeek), some change keys behind the cache, some are code that came
with the checkpoint. Of such a model only the cache layers are replaced. It always sees `capacity` cache positions: each
row's past moved directly before its new tokens, and the positions left of that masked, as if the prompt had been padded
on the left. So windows, chunks, ALiBi and relative positions mean what they mean in transformers, and keys and values
have static shapes.

The cache input is read by one gather and the cache output is a gather of its result, so an engine may give both the
same memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from precast.runtime.artifact.schema import Lora
from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError, PrecastError

from ...architectures import make_traceable, use_cached_attention
from ...architectures.attention_interface import use_past_lengths
from ...architectures.cache_names import cache_argument, find_cache
from ..plan import run_skeleton, shapes_only
from .fused_attention import FusedDecoder, pick_logits, takes_position_ids
from .lora_slots import adding_adapters
from .recurrent_states import StateLayer, StateLayout, find_states

__all__ = [
    "EAGER_NOTE",
    "LayerLayout",
    "CacheLayout",
    "EagerDecoder",
    "TensorLayout",
    "find_cache_layout",
    "fused_blocker",
]

EAGER_NOTE = "ordinary operators"
"""The words for it in artifacts and in `precast export`'s output."""

_MODEL_ERRORS = (PrecastError, TypeError, AttributeError, RuntimeError, ValueError, LookupError, AssertionError)
"""Errors that modelling code raises at a mask or a cache that it does not expect; warnings are not among them."""


@dataclass(frozen=True)
class TensorLayout:
    """One tensor that the model caches: its sizes, and which of its axes are batch, heads, length and width."""

    heads: int
    width: int
    order: tuple[int, ...]

    def crop(self, cache: Tensor) -> Tensor:
        """Cut a cache [B, heads, C, D] to the heads and the width that the model has."""
        return cache[:, : self.heads, :, : self.width]

    def to_cache(self, tensor: Tensor) -> Tensor:
        """From the model's order of axes to [B, heads, S, width]."""
        return tensor.permute(self.order)

    def to_model(self, tensor: Tensor) -> Tensor:
        """From [B, heads, S, width] to the model's order of axes."""
        return tensor.permute([self.order.index(axis) for axis in range(4)])


@dataclass(frozen=True)
class LayerLayout:
    """The keys and values, and the states of a fixed size, that one layer caches; both may be none."""

    cached: tuple[TensorLayout, ...]
    states: tuple[StateLayout, ...]


@dataclass(frozen=True)
class CacheLayout:
    """What the model caches per layer, as tuples of tensors or in a `Cache`, passed as the argument `argument`."""

    layers: tuple[LayerLayout, ...]
    is_tuples: bool
    argument: str

    @property
    def tensors(self) -> list[TensorLayout]:
        return [stored for layer in self.layers for stored in layer.cached]

    @property
    def states(self) -> list[StateLayout]:
        return [state for layer in self.layers for state in layer.states]


def find_cache_layout(model: nn.Module, task: Task) -> CacheLayout:
    """Find what a model without weights caches, by two runs of different sizes. Raises CheckpointError for anything but
    keys and values of four dimensions and states of a fixed size."""
    with make_traceable(model):
        caches = [_cache(model, task, *sizes) for sizes in (_SMALL, _LARGE)]
    if caches[0] is None:
        raise CheckpointError(
            f"{type(model).__name__} cannot do {task.name}: as its config.json sets it up, it is no decoder and "
            f"returns no key/value cache."
        )
    pairs = list(zip(*map(_layers, caches), strict=True))
    layers = [LayerLayout(_layer_tensors(*pair), find_states(pair[0], index)) for index, pair in enumerate(pairs)]
    is_known = [
        each.cached or each.states or isinstance(one, DummyLayer) for each, (one, _) in zip(layers, pairs, strict=True)
    ]
    if not all(is_known) or not any(each.cached or each.states for each in layers):
        raise CheckpointError(
            f"{type(model).__name__} keeps something other than keys and values or states of a fixed size in a layer; "
            f"precast cannot export it for {task.name} yet."
        )
    return CacheLayout(tuple(layers), _is_tuples(caches[0]), cache_argument(model))


def fused_blocker(model: nn.Module, found: CacheLayout, sizes: Sequence[tuple[int, int]]) -> str:
    """Why a model without weights cannot attend by the fused operator, with caches of these heads and widths; empty
    where it can."""
    if found.is_tuples:
        return "its code keeps its cache as tuples of tensors"
    if found.states:
        return "it carries states beside keys and values, or instead of them"
    with shapes_only():
        past = [torch.empty(1, heads, 2, width) for heads, width in sizes for _ in range(2)]
        ids, lengths, positions = torch.ones(1, 2).long(), torch.ones(1).int(), torch.zeros(1, 1).long()
        try:
            with use_cached_attention(model):
                FusedDecoder(model, len(sizes), None)(ids, lengths, lengths, positions, past)
        except _MODEL_ERRORS as error:
            return _describe_blocker(error)
    return ""


def _describe_blocker(error: Exception) -> str:
    """The error's first line, without addresses of objects: the same in every run."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = re.sub(r" at 0x[0-9a-f]+", "", first)
    return text if isinstance(error, PrecastError) else f"{type(error).__name__}: {text}"


_SMALL, _LARGE = (2, 3), (3, 4)
"""Batch and length of the two runs."""


def _cache(model: nn.Module, task: Task, batch: int, length: int) -> Any:
    ids = torch.ones(batch, length, dtype=torch.int64, device="meta")
    return find_cache(run_skeleton(model, task, {"input_ids": ids, "use_cache": True}))


def _is_tuples(cache: Any) -> bool:
    return isinstance(cache, (tuple, list))


def _layers(cache: Any) -> list[Any]:
    return list(cache) if _is_tuples(cache) else getattr(getattr(cache, "self_attention_cache", cache), "layers", [])


def _keys_and_values(layer: Any) -> list[Any]:
    """The layer's keys and values; None for those that it does not have."""
    return list(layer[:2]) if _is_tuples(layer) else [getattr(layer, name, None) for name in ("keys", "values")]


def _layer_tensors(small: Any, large: Any) -> tuple[TensorLayout, ...]:
    pairs = list(zip(_keys_and_values(small), _keys_and_values(large), strict=True))
    if any(one is None or one.ndim != 4 or not _grows(one.shape, other.shape) for one, other in pairs):
        return ()
    return tuple(_tensor_layout(one.shape, other.shape) for one, other in pairs)


def _grows(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether one axis has the batch sizes of the two runs, and another one their lengths."""
    return set(zip(_SMALL, _LARGE, strict=True)) <= set(zip(small, large, strict=True))


def _tensor_layout(small: Sequence[int], large: Sequence[int]) -> TensorLayout:
    sizes = list(zip(small, large, strict=True))
    batch, length = (sizes.index(pair) for pair in zip(_SMALL, _LARGE, strict=True))
    heads, width = (axis for axis in range(4) if axis not in (batch, length))
    return TensorLayout(small[heads], small[width], (batch, heads, length, width))


class EagerDecoder(nn.Module):
    """One step of the model, with the inputs and outputs of every decoder program: tokens, caches and states in, logits
    at `logit_positions`, updated caches and states out."""

    def __init__(self, model: nn.Module, plan: CacheLayout, capacity: int, lora: Lora | None = None) -> None:
        super().__init__()
        self.model, self.layout, self.capacity, self.lora = model, plan, capacity, lora
        self.takes_position_ids = takes_position_ids(model)

    def forward(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        new_lengths: Tensor,
        logit_positions: Tensor,
        past: list[Tensor],
        states: list[Tensor],
        adapters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        view = _CacheView(past_lengths.long(), new_lengths, self.capacity, input_ids.shape[1])
        cache = self._make_tuples(view, past) if self.layout.is_tuples else self._make_cache(view, past, states)
        arguments = {"input_ids": input_ids, "use_cache": True, "return_dict": True, self.layout.argument: cache}
        if past:
            # Without keys there is nothing to mask.
            arguments["attention_mask"] = view.mask
        if self.takes_position_ids:
            arguments["position_ids"] = view.positions
        with (
            pick_logits(self.model, logit_positions) as pick,
            adding_adapters(self.model, self.lora, adapters),
            _AssumePadding(),
            use_past_lengths(past_lengths),
        ):
            result = self.model(**arguments)
            logits = pick(result.logits)
        layers = _layers(find_cache(result) if self.layout.is_tuples else cache)
        return logits, *self._updated_caches(view, layers, past), *self._updated_states(layers)

    def _make_tuples(self, view: _CacheView, past: list[Tensor]) -> Any:
        tensors = self.layout.tensors
        seen = [each.to_model(view.past_of(each.crop(cache))) for each, cache in zip(tensors, past, strict=True)]
        return tuple(zip(seen[0::2], seen[1::2], strict=True))

    def _make_cache(self, view: _CacheView, past: list[Tensor], states: list[Tensor]) -> Cache:
        caches, remaining = iter(past), iter(states)
        layers = []
        for layout in self.layout.layers:
            cached = [each.crop(next(caches)) for each in layout.cached]
            layers.append(_make_layer(view, layout, cached, [next(remaining) for _ in layout.states]))
        return Cache(layers=layers)

    def _updated_caches(self, view: _CacheView, layers: list[Any], past: list[Tensor]) -> Iterator[Tensor]:
        """The caches with the new tokens, in the shapes in which they came in."""
        seen = [
            tensor_layout.to_cache(tensor)
            for layout, layer in zip(self.layout.layers, layers, strict=True)
            for tensor_layout, tensor in zip(layout.cached, _keys_and_values(layer), strict=False)
        ]
        return (_pad_to(view.to_cache(each), cache) for each, cache in zip(seen, past, strict=True))

    def _updated_states(self, layers: list[Any]) -> list[Tensor]:
        return [state for layer in layers if isinstance(layer, StateLayer) for state in layer.updated_states()]


def _make_layer(view: _CacheView, layout: LayerLayout, cached: list[Tensor], states: list[Tensor]) -> Any:
    if not layout.states:
        return _Layer(view, *cached) if cached else DummyLayer()
    return _MixedLayer(view, layout, cached, states) if cached else StateLayer(layout.states, states)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that returns past and new keys and values, and then holds them as `keys` and `values`."""

    def __init__(self, view: _CacheView, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.view, self.keys, self.values, self.is_initialized = view, keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.view.append(self.keys, key_states), self.view.append(self.values, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.before + query_length, 0

    def get_seq_length(self) -> int:
        return self.view.before

    def get_max_length(self) -> int:
        return -1


class _MixedLayer(StateLayer, _Layer):
    """Keys, values and states of one layer."""

    def __init__(self, view: _CacheView, layout: LayerLayout, cached: list[Tensor], states: list[Tensor]) -> None:
        _Layer.__init__(self, view, *cached)
        StateLayer.__init__(self, layout.states, states)


class _CacheView:
    """The `capacity` cache positions as the model sees them: the `length` new tokens last, padding included, and each
    row's past directly before them; an engine always leaves room for both."""

    def __init__(self, past: Tensor, new: Tensor, capacity: int, length: int) -> None:
        self.before = capacity - length
        seen, empty = torch.arange(capacity)[None], (self.before - past)[:, None]
        self.positions = past[:, None] + torch.arange(length)[None]
        self.mask = ((seen >= empty) & (seen < self.before + new[:, None])).long()
        self._of_past = (seen - empty).clamp(min=0)
        # Positions in the cache followed by the new tokens.
        self._of_both = torch.where(seen >= self.before, seen + length, self._of_past)
        self._of_seen = (seen + empty).clamp(max=capacity - 1)

    def past_of(self, cache: Tensor) -> Tensor:
        """The past of a left-aligned cache [B, heads, C, D], right-aligned: [B, heads, C - S, D]."""
        return _gather_positions(cache, self._of_past[:, : self.before])

    def append(self, cache: Tensor, new: Tensor) -> Tensor:
        """The past of a left-aligned cache [B, heads, C, D], then `new` [B, heads, S, D]: [B, heads, C, D]."""
        return _gather_positions(torch.cat([cache, new], dim=2), self._of_both)

    def to_cache(self, seen: Tensor) -> Tensor:
        """Past and new as the model sees them, left-aligned again: [B, heads, C, D]."""
        return _gather_positions(seen, self._of_seen)


def _gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """`x[b, h, positions[b, n]]`, [B, heads, N, D], as one gather of whole vectors."""
    batch, heads, count, width = x.shape
    first = torch.arange(batch * heads).view(batch, heads, 1) * count
    index = (first + positions[:, None]).flatten()
    return x.reshape(-1, width).index_select(0, index).view(batch, heads, positions.shape[1], width)


def _pad_to(x: Tensor, cache: Tensor) -> Tensor:
    """Pad heads and width with zeros to the cache's."""
    missing = [have - got for have, got in zip(cache.shape, x.shape, strict=True)]
    return nn.functional.pad(x, (0, missing[3], 0, 0, 0, missing[1])) if missing[1] or missing[3] else x


class _AssumePadding(TorchFunctionMode):
    """Makes `mask.all()` False while tracing, so that the graph is not specialised to "no padding"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.all, Tensor.all) and len(args) == 1 and not kwargs:
            return False
        return func(*args, **(kwargs or {}))
