"""How the operator gets into Hugging Face's own modelling code, which is not touched.

transformers looks up attention and mask functions by name (`AttentionInterface`, `AttentionMaskInterface`); ours are
called "precast". The cache layer hands new keys and values back as they came, the mask function describes the mask
instead of building it, and the attention function puts all three together into one `cached_attention`.
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

__all__ = ["IMPLEMENTATION", "Caches", "Mask", "after", "attend", "capacity", "positions", "tracing"]

IMPLEMENTATION = "precast"

_CAUSAL = frozenset({"causal_mask_function"})
_BIDIRECTIONAL = frozenset({"bidirectional_mask_function"})
# Tokens of an image see each other; a compiled decoder is given text, where there are none.
_IMAGES = frozenset({"blockwise_overlay.<locals>.inner_mask", "or_masks"})
_OVERLAYS = {"sliding_window_overlay.<locals>.inner_mask": "window", "chunked_overlay.<locals>.inner_mask": "chunk"}
# What transformers passes along that does not change the result of a decoder's attention.
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
    """What the mask builder would have drawn; it travels through the model as `attention_mask`."""

    kind: str
    window: int

    def to(self, *_: Any, **__: Any) -> Mask:
        return self


@dataclass
class Caches:
    """The caches of one traced call: per layer `(keys, values)`, the lengths, the scales of caches in int8, and what
    the layers returned. With an encoder, what its layers look at there, and how many of them did."""

    past: list[tuple[Tensor, Tensor]]
    past_lengths: Tensor
    new_lengths: Tensor
    scales: list[tuple[Tensor, Tensor]] | None = None
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The new keys and values of each layer so far."""
    encoded: list[tuple[Tensor, Tensor]] | None = None
    encoded_mask: Tensor | None = None
    looked: int = 0

    def as_cache(self) -> Cache:
        return Cache(layers=[_Layer(self, index) for index in range(len(self.past))])


_CURRENT: ContextVar[Caches] = ContextVar("precast_caches")
_PAST: ContextVar[Tensor | None] = ContextVar("precast_past_lengths", default=None)


@contextmanager
def tracing(caches: Caches) -> Iterator[Cache]:
    """Within this block the attention function works on `caches`; yields what goes in as the model's cache."""
    token = _CURRENT.set(caches)
    try:
        with after(caches.past_lengths):
            yield caches.as_cache()
    finally:
        _CURRENT.reset(token)


def capacity() -> int:
    """How many rows the caches of the call being traced have."""
    return int(_CURRENT.get().past[0][0].shape[2])


def positions(length: Any) -> Tensor | None:
    """int64 [B, length]: where the new tokens of the call being traced stand, each row after its own past; None where
    no call is being traced."""
    past = _PAST.get()
    return None if past is None else past[:, None].long() + torch.arange(length, device=past.device)[None]


@contextmanager
def after(past_lengths: Tensor) -> Iterator[None]:
    """Within this block new tokens stand after `past_lengths` [B]."""
    token = _PAST.set(past_lengths)
    try:
        yield
    finally:
        _PAST.reset(token)


class _Layer(CacheLayerMixin):
    """A cache layer that remembers the new keys and values and returns the very same objects."""

    def __init__(self, caches: Caches, index: int) -> None:
        super().__init__()
        self.caches, self.index, self.is_initialized = caches, index, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.caches.given[self.index] = (key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


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
    """Emit the operator for the layer whose cache was just updated. Tensors are [B, heads, S, D].

    Raises ExportError where the model changed keys or values after the cache saw them, since the cache would then
    not hold what attention reads.
    """
    mask = mask or Mask("causal", 0)
    if mask.kind not in MASKS:
        raise ExportError(f"This architecture attends with a {mask.kind} mask, which is no decoder's.")
    caches = _CURRENT.get()
    index = _owner(caches, key, value)
    # A layer that shares keys sees them in the cache already, and writing them again changes nothing.
    k_cache, v_cache = caches.present.get(index, caches.past[index])
    k_scales, v_scales = caches.scales[index] if caches.scales else (None, None)
    value_width = value.shape[-1]
    output: Tensor
    output, k_cache, v_cache = cached_attention(
        _widen(query, k_cache), _widen(key, k_cache), _widen(value, v_cache), k_cache, v_cache,
        caches.past_lengths, caches.new_lengths, float(scale), mask.kind, mask.window, float(softcap or 0.0),
        sinks, slopes, k_scales, v_scales, bias,
    )  # fmt: skip
    caches.present[index] = (k_cache, v_cache)
    return output[..., :value_width] if value_width < output.shape[-1] else output


def _owner(caches: Caches, key: Tensor, value: Tensor) -> int:
    """The layer that gave these very keys and values to its cache; later layers may share them (Gemma 3n)."""
    for index, given in reversed(caches.given.items()):
        if given[0] is key and given[1] is value:
            return index
    raise ExportError(
        "This architecture changes keys or values between the cache and attention, so its cache cannot be "
        "compiled as a plain key/value cache."
    )


def _widen(x: Tensor, cache: Tensor) -> Tensor:
    """Zeros behind the head dimension leave every dot product as it is."""
    return torch.nn.functional.pad(x, (0, cache.shape[-1] - x.shape[-1])) if x.shape[-1] < cache.shape[-1] else x


def _attention(
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
        return _look(query, key, value, scale, softcap).transpose(1, 2).contiguous(), None
    mask = attention_mask
    if mask is None:
        mask = Mask("window", sliding_window) if sliding_window else Mask("causal", 0)
    output = attend(query, key, value, scale=scale, mask=mask, softcap=softcap, sinks=s_aux, bias=position_bias)
    return output.transpose(1, 2).contiguous(), None


def _look(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention to what an encoder made: [B, heads, S, D] and keys [B, kv_heads, L, D]. Raises ExportError."""
    caches = _CURRENT.get()
    caches.looked += 1
    if softcap:
        raise ExportError(
            f"This architecture caps scores of attention to its encoder at {softcap}, which precast lacks."
        )
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output: Tensor = cross_attention(query, key, value, caches.encoded_mask, float(scale))
    return output


def _mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Mask:
    """transformers' mask function: names the mask it is asked to build. Raises ExportError for one it cannot name."""
    parts = _parts(mask_function)
    if parts >= _IMAGES:
        parts -= _IMAGES
    if parts == _CAUSAL:
        return Mask("causal", 0)
    for overlay, kind in _OVERLAYS.items():
        if parts == _CAUSAL | {overlay} and local_size:
            return Mask(kind, local_size)
    if parts == _BIDIRECTIONAL:
        # Decoders of encoder-decoders ask for it whether or not they have an encoder to look at.
        return Mask("bidirectional", 0)
    raise ExportError(f"This architecture masks attention by {', '.join(sorted(parts))}, which precast lacks.")


def _parts(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the mask functions that `function` combines; a union of masks counts as a part of its own."""
    name = function.__qualname__
    if name not in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        return frozenset({name})
    combined = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = frozenset[str]().union(*(_parts(part) for group in combined for part in group))
    return parts if name.startswith("and_masks") else parts | {"or_masks"}


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
