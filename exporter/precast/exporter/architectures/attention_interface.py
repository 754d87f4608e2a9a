"""Put the `cached_attention` operator into Hugging Face's modelling code, which itself stays as it is.

transformers looks up attention and mask functions by name (`AttentionInterface`, `AttentionMaskInterface`); ours are
called "precast". The cache layer returns new keys and values unchanged, the mask function names the mask instead of
building it, and the attention function combines them into one `cached_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from precast.runtime.errors import ExportError

from ..operators.attention import MASKS, cached_attention, cross_attention

__all__ = [
    "Caches",
    "Mask",
    "attend",
    "cache_capacity",
    "new_positions",
    "own_slopes",
    "use_attention_interface",
    "use_caches",
    "use_past_lengths",
]

_IMPLEMENTATION = "precast"

_CAUSAL = frozenset({"causal_mask_function"})
_BIDIRECTIONAL = frozenset({"bidirectional_mask_function"})
# Lets the tokens of an image attend to each other; a compiled decoder is given text only.
_IMAGES = frozenset({"blockwise_overlay.<locals>.inner_mask", "or_masks"})
_OVERLAYS = {"sliding_window_overlay.<locals>.inner_mask": "window", "chunked_overlay.<locals>.inner_mask": "chunk"}
# Arguments that transformers passes along and that do not change the result of a decoder's attention.
_NEUTRAL = frozenset(
    [
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "layer_idx",
        "position_embeddings",
        "cache",
        "past_key_values",
    ]
)


@dataclass(frozen=True)
class Mask:
    """The kind of an attention mask and the size of its window or chunk; passed through the model as `attention_mask`
    in the place of the mask itself."""

    kind: str
    window: int

    def to(self, *_: Any, **__: Any) -> Mask:
        return self


@dataclass
class Caches:
    """The caches of one traced call.

    Attributes:
        past: keys and values that come in, per layer, [B, heads, C, D] each.
        past_lengths, new_lengths: tokens in the cache and new ones of each row, int32 [B].
        scales: of caches in int8, per layer.
        present: keys and values that go out, by layer.
        new: the new keys and values of each layer so far.
        encoded: the encoder's keys and values, per layer that attends to it.
        encoded_mask: which of the encoder's positions are real; None means all.
        cross_calls: how many layers attended to the encoder so far.
    """

    past: list[tuple[Tensor, Tensor]]
    past_lengths: Tensor
    new_lengths: Tensor
    scales: list[tuple[Tensor, Tensor]] | None = None
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    new: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    encoded: list[tuple[Tensor, Tensor]] | None = None
    encoded_mask: Tensor | None = None
    cross_calls: int = 0

    def as_cache(self) -> Cache:
        return Cache(layers=[_Layer(self, index) for index in range(len(self.past))])


_CURRENT: ContextVar[Caches] = ContextVar("precast_caches")
_PAST: ContextVar[Tensor | None] = ContextVar("precast_past_lengths", default=None)


@contextmanager
def use_attention_interface(model: Any) -> Iterator[None]:
    """Within this block `model` calls our attention and mask functions: all that most architectures need."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def use_caches(caches: Caches) -> Iterator[Cache]:
    """Within this block attention reads and writes `caches`; yields the cache to hand to the model."""
    token = _CURRENT.set(caches)
    try:
        with use_past_lengths(caches.past_lengths):
            yield caches.as_cache()
    finally:
        _CURRENT.reset(token)


def cache_capacity() -> int:
    """The capacity, in positions, of the caches of the call being traced."""
    return int(_CURRENT.get().past[0][0].shape[2])


def new_positions(length: Any) -> Tensor | None:
    """Positions of the new tokens of the call being traced, int64 [B, length]: each row's begin at its own past length.
    None where no call is being traced."""
    past = _PAST.get()
    return None if past is None else past[:, None].long() + torch.arange(length, device=past.device)[None]


@contextmanager
def use_past_lengths(past_lengths: Tensor) -> Iterator[None]:
    """Within this block `new_positions` counts from `past_lengths` [B]."""
    token = _PAST.set(past_lengths)
    try:
        yield
    finally:
        _PAST.reset(token)


class _Layer(CacheLayerMixin):
    """A cache layer that notes the new keys and values and returns the same objects, by which `attend` knows them."""

    def __init__(self, caches: Caches, index: int) -> None:
        super().__init__()
        self.caches, self.index, self.is_initialized = caches, index, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.caches.new[self.index] = (key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def own_slopes(slopes: Tensor, heads: int, projection: Any, like: Tensor) -> Tensor:
    """ALiBi's slopes [heads], on the device of `like`: of `slopes` those of the heads that a rank has, by its part of
    the layer that makes its queries."""
    if len(slopes) == heads:
        return slopes
    return slopes.view(-1, heads).index_select(0, projection.part_number(like))[0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Mask | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Emit `cached_attention` for the layer whose cache was just updated. Tensors are [B, heads, S, D].

    Raises ExportError where the model changed keys or values after they went into the cache, since the cache would then
    not hold what attention reads.
    """
    mask = mask or Mask("causal", 0)
    if mask.kind not in MASKS:
        raise ExportError(f"This architecture attends with a {mask.kind} mask, which is no decoder's.")
    caches = _CURRENT.get()
    index = _find_layer(caches, key, value)
    # A layer that shares another's keys finds them in the cache already; writing them again changes nothing.
    k_cache, v_cache = caches.present.get(index, caches.past[index])
    k_scales, v_scales = caches.scales[index] if caches.scales else (None, None)
    value_width = value.shape[-1]
    output: Tensor
    output, k_cache, v_cache = cached_attention(
        _pad_width(query, k_cache), _pad_width(key, k_cache), _pad_width(value, v_cache), k_cache, v_cache,
        caches.past_lengths, caches.new_lengths, float(scale), mask.kind, mask.window, float(softcap or 0.0),
        sinks, slopes, k_scales, v_scales, bias,
    )  # fmt: skip
    caches.present[index] = (k_cache, v_cache)
    return output[..., :value_width] if value_width < output.shape[-1] else output


def _find_layer(caches: Caches, key: Tensor, value: Tensor) -> int:
    """The layer that put these very keys and values into its cache; later layers may share them (Gemma 3n)."""
    for index, (new_key, new_value) in reversed(caches.new.items()):
        if new_key is key and new_value is value:
            return index
    raise ExportError(
        "This architecture changes keys or values between the cache and attention, so its cache cannot be "
        "compiled as a plain key/value cache."
    )


def _pad_width(x: Tensor, cache: Tensor) -> Tensor:
    """Pad the head dimension with zeros to the cache's, which leaves every dot product as it is."""
    return torch.nn.functional.pad(x, (0, cache.shape[-1] - x.shape[-1])) if x.shape[-1] < cache.shape[-1] else x


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, heads, S, D] in, [B, S, heads, D] out."""
    if unknown := sorted(name for name, given in kwargs.items() if given is not None and name not in _NEUTRAL):
        raise ExportError(f"{type(module).__name__} passes {', '.join(unknown)} to attention, which precast lacks.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if any(key is keys for keys, _ in _CURRENT.get().encoded or ()):
        return _attend_to_encoder(query, key, value, scale, softcap).transpose(1, 2).contiguous(), None
    mask = attention_mask
    if mask is None:
        mask = Mask("window", sliding_window) if sliding_window else Mask("causal", 0)
    output = attend(query, key, value, scale=scale, mask=mask, softcap=softcap, sinks=s_aux, bias=position_bias)
    return output.transpose(1, 2).contiguous(), None


def _attend_to_encoder(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Cross-attention: queries [B, heads, S, D], the encoder's keys and values [B, kv_heads, L, D]. Raises ExportError
    for a model that caps its scores."""
    caches = _CURRENT.get()
    caches.cross_calls += 1
    if softcap:
        raise ExportError(
            f"This architecture caps scores of attention to its encoder at {softcap}, which precast lacks."
        )
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output: Tensor = cross_attention(query, key, value, caches.encoded_mask, float(scale))
    return output


def _mask_function(*, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Mask:
    """transformers' mask function: name the mask instead of building it. Raises ExportError for an unknown one."""
    parts = _mask_parts(mask_function)
    if parts >= _IMAGES:
        parts -= _IMAGES
    if parts == _CAUSAL:
        return Mask("causal", 0)
    for overlay, kind in _OVERLAYS.items():
        if parts == _CAUSAL | {overlay} and local_size:
            return Mask(kind, local_size)
    if parts == _BIDIRECTIONAL:
        # Decoders of encoder-decoders ask for it with an encoder and without.
        return Mask("bidirectional", 0)
    raise ExportError(f"This architecture masks attention by {', '.join(sorted(parts))}, which precast lacks.")


def _mask_parts(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the mask functions that `function` combines; a union of masks counts as a part of its own."""
    name = function.__qualname__
    if name not in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        return frozenset({name})
    combined = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = frozenset[str]().union(*(_mask_parts(part) for group in combined for part in group))
    return parts if name.startswith("and_masks") else parts | {"or_masks"}


AttentionInterface.register(_IMPLEMENTATION, _attention_function)
AttentionMaskInterface.register(_IMPLEMENTATION, _mask_function)
