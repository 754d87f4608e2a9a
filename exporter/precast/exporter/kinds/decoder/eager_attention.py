"""Attention in ordinary operators, for decoders that do with their caches what one operator cannot.

Some cache latents and expand them afterwards (DeepSeek), some change keys behind the cache, some are code that came
with the checkpoint. Such a model keeps its own eager attention; only what it takes for its cache is ours. It is always
shown `capacity` rows: the row's past moved to lie directly before the new tokens, and what is left of that masked, as
if the prompt had been padded on the left. So whatever is counted in distances or told by an attention mask (windows,
chunks, ALiBi, relative positions) is as transformers means it, and keys and values have static shapes.

The cache input is read by one gather and the cache output made of what that gathered, so an engine may give both the
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

from precast.runtime.artifact.tasks import Task
from precast.runtime.errors import CheckpointError, PrecastError

from ...architectures import make_traceable, use_cached_attention
from ...architectures.attention_interface import use_past_lengths
from ...architectures.cache_names import cache_argument, find_cache
from ..plan import run_skeleton, without_values
from .fused_attention import OperatorDecoder, logits_at, takes_positions
from .recurrent_states import Carried, StateLayer, carried

__all__ = ["NAME", "LayerLayout", "Layout", "OrdinaryDecoder", "Stored", "layout", "misfit"]

NAME = "ordinary operators"
"""What artifacts and announcements call this."""

_MISFITS = (PrecastError, TypeError, AttributeError, RuntimeError, ValueError, LookupError, AssertionError)
"""How modelling code fails that is shown a mask or a cache other than it expects; a warning is none of them."""


@dataclass(frozen=True)
class Stored:
    """One tensor that the model caches: its sizes, and where in it batch, heads, length and width lie."""

    heads: int
    width: int
    order: tuple[int, ...]

    def part_of(self, cache: Tensor) -> Tensor:
        """Of a cache [B, heads, C, D] that may be larger, as much as the model has."""
        return cache[:, : self.heads, :, : self.width]

    def as_ours(self, tensor: Tensor) -> Tensor:
        """The model's layout -> [B, heads, S, width]."""
        return tensor.permute(self.order)

    def as_theirs(self, tensor: Tensor) -> Tensor:
        """[B, heads, S, width] -> the model's layout."""
        return tensor.permute([self.order.index(axis) for axis in range(4)])


@dataclass(frozen=True)
class LayerLayout:
    """What one layer keeps: keys and values, and states of a fixed size; or nothing."""

    cached: tuple[Stored, ...]
    states: tuple[Carried, ...]


@dataclass(frozen=True)
class Layout:
    """What the model keeps, per layer; as tuples of tensors or in a `Cache`, which is the argument `argument`."""

    layers: tuple[LayerLayout, ...]
    is_tuples: bool
    argument: str

    @property
    def tensors(self) -> list[Stored]:
        return [stored for layer in self.layers for stored in layer.cached]

    @property
    def states(self) -> list[Carried]:
        return [state for layer in self.layers for state in layer.states]


def layout(model: nn.Module, task: Task) -> Layout:
    """Find what a model without weights keeps, by two runs of different sizes. Raises CheckpointError where that is
    neither keys and values of four dimensions nor a state of a fixed size."""
    with make_traceable(model):
        caches = [_cache(model, task, *sizes) for sizes in (_SMALL, _LARGE)]
    if caches[0] is None:
        raise CheckpointError(
            f"{type(model).__name__} cannot do {task.name}: as its config.json sets it up, it is no decoder and "
            f"returns no key/value cache."
        )
    pairs = list(zip(*map(_layers, caches), strict=True))
    layers = [LayerLayout(_both_stored(*pair), carried(pair[0], index)) for index, pair in enumerate(pairs)]
    is_known = [
        each.cached or each.states or isinstance(one, DummyLayer) for each, (one, _) in zip(layers, pairs, strict=True)
    ]
    if not all(is_known) or not any(each.cached or each.states for each in layers):
        raise CheckpointError(
            f"{type(model).__name__} keeps something other than keys and values or states of a fixed size in a layer; "
            f"precast cannot export it for {task.name} yet."
        )
    return Layout(tuple(layers), _is_tuples(caches[0]), cache_argument(model))


def misfit(model: nn.Module, found: Layout, sizes: Sequence[tuple[int, int]]) -> str:
    """Why the attention of a model without weights, with caches of these heads and widths, cannot be the operator;
    empty where it can."""
    if found.is_tuples:
        return "its code keeps its cache as tuples of tensors"
    if found.states:
        return "it carries states beside keys and values, or instead of them"
    with without_values():
        past = [torch.empty(1, heads, 2, width) for heads, width in sizes for _ in range(2)]
        ids, lengths, positions = torch.ones(1, 2).long(), torch.ones(1).int(), torch.zeros(1, 1).long()
        try:
            with use_cached_attention(model):
                OperatorDecoder(model, len(sizes), None)(ids, lengths, lengths, positions, past)
        except _MISFITS as error:
            return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    """One line, the same in every run: no address of an object is in it."""
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
    """None for what the layer does not have."""
    return list(layer[:2]) if _is_tuples(layer) else [getattr(layer, name, None) for name in ("keys", "values")]


def _both_stored(small: Any, large: Any) -> tuple[Stored, ...]:
    pairs = list(zip(_keys_and_values(small), _keys_and_values(large), strict=True))
    if any(one is None or one.ndim != 4 or not _grows(one.shape, other.shape) for one, other in pairs):
        return ()
    return tuple(_stored(one.shape, other.shape) for one, other in pairs)


def _grows(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether there is a row for every token of the two runs, and no others."""
    return set(zip(_SMALL, _LARGE, strict=True)) <= set(zip(small, large, strict=True))


def _stored(small: Sequence[int], large: Sequence[int]) -> Stored:
    sizes = list(zip(small, large, strict=True))
    batch, length = (sizes.index(pair) for pair in zip(_SMALL, _LARGE, strict=True))
    heads, width = (axis for axis in range(4) if axis not in (batch, length))
    return Stored(small[heads], small[width], (batch, heads, length, width))


class OrdinaryDecoder(nn.Module):
    """The model as one step, with the inputs and outputs of every decoder program: tokens, caches and states in, logits
    at the asked positions, updated caches and states out."""

    def __init__(self, model: nn.Module, plan: Layout, capacity: int) -> None:
        super().__init__()
        self.model, self.layout, self.capacity = model, plan, capacity
        self.takes_positions = takes_positions(model)

    def forward(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        new_lengths: Tensor,
        logit_positions: Tensor,
        past: list[Tensor],
        states: list[Tensor],
    ) -> tuple[Tensor, ...]:
        rows = _Rows(past_lengths.long(), new_lengths, self.capacity, input_ids.shape[1])
        given = self._as_tuples(rows, past) if self.layout.is_tuples else self._as_cache(rows, past, states)
        arguments = {"input_ids": input_ids, "use_cache": True, "return_dict": True, self.layout.argument: given}
        if past:
            # Without keys there is nothing to mask.
            arguments["attention_mask"] = rows.mask
        if self.takes_positions:
            arguments["position_ids"] = rows.positions
        with logits_at(self.model, logit_positions) as at, _UnknownMask(), use_past_lengths(past_lengths):
            result = self.model(**arguments)
            logits = at(result.logits)
        layers = _layers(find_cache(result) if self.layout.is_tuples else given)
        return logits, *self._present(rows, layers, past), *self._states(layers)

    def _as_tuples(self, rows: _Rows, past: list[Tensor]) -> Any:
        stored = self.layout.tensors
        theirs = [each.as_theirs(rows.shown(each.part_of(cache))) for each, cache in zip(stored, past, strict=True)]
        return tuple(zip(theirs[0::2], theirs[1::2], strict=True))

    def _as_cache(self, rows: _Rows, past: list[Tensor], states: list[Tensor]) -> Cache:
        caches, carried = iter(past), iter(states)
        layers = []
        for plan in self.layout.layers:
            cached = [each.part_of(next(caches)) for each in plan.cached]
            kept = [next(carried) for _ in plan.states]
            layers.append(_layer(rows, plan, cached, kept))
        return Cache(layers=layers)

    def _present(self, rows: _Rows, layers: list[Any], past: list[Tensor]) -> Iterator[Tensor]:
        """The caches with what was new, as wide as they came."""
        held = [
            stored.as_ours(tensor)
            for plan, layer in zip(self.layout.layers, layers, strict=True)
            for stored, tensor in zip(plan.cached, _keys_and_values(layer), strict=False)
        ]
        return (_like(rows.kept(each), cache) for each, cache in zip(held, past, strict=True))

    def _states(self, layers: list[Any]) -> list[Tensor]:
        return [state for layer in layers if isinstance(layer, StateLayer) for state in layer.after()]


def _layer(rows: _Rows, plan: LayerLayout, cached: list[Tensor], states: list[Tensor]) -> Any:
    if not plan.states:
        return _Layer(rows, *cached) if cached else DummyLayer()
    return _MixedLayer(rows, plan, cached, states) if cached else StateLayer(plan.states, states)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that gives the past and what comes; then `keys` and `values` are what it gave."""

    def __init__(self, rows: _Rows, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.rows, self.keys, self.values, self.is_initialized = rows, keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.rows.joined(self.keys, key_states), self.rows.joined(self.values, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.before + query_length, 0

    def get_seq_length(self) -> int:
        return self.rows.before

    def get_max_length(self) -> int:
        return -1


class _MixedLayer(StateLayer, _Layer):
    """Keys, values and states of one layer."""

    def __init__(self, rows: _Rows, plan: LayerLayout, cached: list[Tensor], states: list[Tensor]) -> None:
        _Layer.__init__(self, rows, *cached)
        StateLayer.__init__(self, plan.states, states)


class _Rows:
    """Where the `capacity` rows are that a model is shown: `length` new ones last, padding included, and the past
    directly before them, for which an engine always leaves room."""

    def __init__(self, past: Tensor, new: Tensor, capacity: int, length: int) -> None:
        self.before = capacity - length
        slots, empty = torch.arange(capacity)[None], (self.before - past)[:, None]
        self.positions = past[:, None] + torch.arange(length)[None]
        self.mask = ((slots >= empty) & (slots < self.before + new[:, None])).long()
        self._shown = (slots - empty).clamp(min=0)
        # In the cache followed by the new rows.
        self._joined = torch.where(slots >= self.before, slots + length, self._shown)
        self._kept = (slots + empty).clamp(max=capacity - 1)

    def shown(self, cache: Tensor) -> Tensor:
        """[B, heads, C, D], rows from the left -> the past, [B, heads, C - S, D], at the end."""
        return _take(cache, self._shown[:, : self.before])

    def joined(self, cache: Tensor, new: Tensor) -> Tensor:
        """[B, heads, C, D], rows from the left, and [B, heads, S, D] -> past and new, [B, heads, C, D]."""
        return _take(torch.cat([cache, new], dim=2), self._joined)

    def kept(self, full: Tensor) -> Tensor:
        """Past and new -> [B, heads, C, D], rows from the left."""
        return _take(full, self._kept)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """`x[b, h, rows[b, n]]`, [B, heads, N, D], as one gather of whole rows."""
    batch, heads, count, width = x.shape
    first = torch.arange(batch * heads).view(batch, heads, 1) * count
    index = (first + rows[:, None]).flatten()
    return x.reshape(-1, width).index_select(0, index).view(batch, heads, rows.shape[1], width)


def _like(x: Tensor, cache: Tensor) -> Tensor:
    """Zeros behind heads and width, up to the cache's."""
    missing = [have - got for have, got in zip(cache.shape, x.shape, strict=True)]
    return nn.functional.pad(x, (0, missing[3], 0, 0, 0, missing[1])) if missing[1] or missing[3] else x


class _UnknownMask(TorchFunctionMode):
    """Code that leaves out a mask where all of it is 1 cannot know that of every request: not all of it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.all, Tensor.all) and len(args) == 1 and not kwargs:
            return False
        return func(*args, **(kwargs or {}))
