"""Cached attention as one operator.

A decoder's attention, cache included, is a single node `precast::cached_attention` in every traced program. The
eager code here defines its meaning and is the oracle of its tests; each backend lowers the node its own way. The
operator is functional (it returns the updated caches) because `torch.onnx` drops mutations of inputs silently; backends
update the caches in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MASKS", "Scales", "cached_attention", "cross_attention"]

MASKS = ("causal", "window", "chunk")
Scales = list[Tensor]
"""Scales of int8 caches: for each layer those of keys, then those of values, each float32 [Hkv, D]."""


@torch.library.custom_op("precast::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    scale: float,
    mask: str,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the new keys and values into the caches, then attend to what the caches hold.

    Row `b` has `past_lengths[b]` tokens in its cache and brings `new_lengths[b]` more, right-padded to S. Query `s`
    of row `b` stands at position `p = past_lengths[b] + s` and sees the cache rows `c <= p`, of these with
    `mask="window"` only `c > p - window`, with `mask="chunk"` only those of its own chunk,
    `c // window == p // window`. Scores are `q·k * scale`, then, in this order: `softcap * tanh(scores / softcap)`
    where softcap is not 0 (Gemma 2), `+ slopes[h] * (c - p)` (ALiBi, Press et al. 2022), `+ bias[b, h, s, c]`
    (T5), and `sinks[h]` as one more column of the softmax that has no value (gpt-oss).

    Args:
        q: [B, H, S, D], any float dtype. Softmax is taken in float32.
        k, v: [B, Hkv, S, D], H a multiple of Hkv.
        k_cache, v_cache: [B, Hkv, C, D]; of a narrower dtype than k and v, they hold what these are rounded to.
        past_lengths, new_lengths: int32 [B], `past + new <= C`.
        sinks, slopes: [H] or None.
        k_scales, v_scales: float32 [Hkv, D] where the caches are int8, else None: a cache row holds
            `round(value / scale)`, and what attention reads is that times the scale.
        bias: [B or 1, H or 1, S, C] or None.

    Returns:
        The output [B, H, S, D], undefined at padded queries, and both caches [B, Hkv, C, D], undefined at rows
        `>= past + new`.
    """
    k_cache = _append_to_cache(k_cache, _quantize(k, k_scales), past_lengths, new_lengths)
    v_cache = _append_to_cache(v_cache, _quantize(v, v_scales), past_lengths, new_lengths)
    keys, values = _dequantize(k_cache, k_scales).to(q.dtype), _dequantize(v_cache, v_scales).to(v.dtype)
    scores = _compute_scores(q, keys, scale, softcap)
    distance = _key_distances(past_lengths, q.shape[2], k_cache.shape[2])
    if slopes is not None:
        scores = scores + slopes.view(1, -1, 1, 1) * distance[:, None]
    if bias is not None:
        scores = scores + bias
    visible = _visible_mask(distance, past_lengths, mask, window)
    scores = scores.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    probabilities = _softmax(scores, sinks).to(v.dtype)
    return probabilities @ _repeat_heads(values, q.shape[1]), k_cache, v_cache


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@torch.library.custom_op("precast::cross_attention", mutates_args=())
def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend to an encoder's keys and values, `softmax(q·k * scale)·v`; an operator, so that no backend copies `k` and
    `v`, which stay the same from step to step.

    Args:
        q: [B, H, S, D].
        k, v: [B, H, L, D].
        mask: [B, L], 0 where there is padding, or None where there is none.

    Returns:
        [B, H, S, D]; undefined for rows that are all padding.
    """
    scores = (q @ k.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    return scores.softmax(-1).to(v.dtype) @ v


@cross_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _quantize(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else (x / scales[None, :, None]).round().clamp(-128, 127).to(torch.int8)


def _dequantize(cache: Tensor, scales: Tensor | None) -> Tensor:
    return cache if scales is None else cache * scales[None, :, None]


def _append_to_cache(cache: Tensor, new: Tensor, past: Tensor, count: Tensor) -> Tensor:
    """The cache with `new` at positions past..past+count. By a gather, so that padding is never written."""
    offset = torch.arange(cache.shape[2])[None] - past[:, None]
    index = offset.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    is_new = ((offset >= 0) & (offset < count[:, None]))[:, None, :, None]
    return torch.where(is_new, new.gather(2, index.long()).to(cache.dtype), cache)


def _repeat_heads(cache: Tensor, heads: int) -> Tensor:
    return cache.repeat_interleave(heads // cache.shape[1], dim=1)


def _compute_scores(q: Tensor, k_cache: Tensor, scale: float, softcap: float) -> Tensor:
    scores = (q @ _repeat_heads(k_cache, q.shape[1]).transpose(2, 3)).float() * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _key_distances(past: Tensor, length: int, capacity: int) -> Tensor:
    """[B, S, C]: cache position minus query position, 0 for a token and itself, negative for earlier tokens."""
    position = past[:, None] + torch.arange(length)[None]
    return torch.arange(capacity)[None, None] - position[:, :, None]


def _visible_mask(distance: Tensor, past: Tensor, mask: str, window: int) -> Tensor:
    visible = distance <= 0
    if mask == "window":
        return visible & (distance > -window)
    if mask == "chunk":
        position = past[:, None] + torch.arange(distance.shape[1])[None]
        return visible & ((distance + position[:, :, None]) // window == (position // window)[:, :, None])
    assert mask == "causal", f"unknown mask {mask!r}"
    return visible


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
