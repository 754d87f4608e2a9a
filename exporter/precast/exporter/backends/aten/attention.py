"""Cached attention in ATen, with the caches updated in place.

The meaning is that of `precast.cached_attention`, written as Inductor compiles it best. Attention reads the first `n`
positions of the caches, however long these are, so its cost grows with the tokens in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .kernel_set import Kernels
from .linear import has_few_rows

__all__ = ["AttentionContext", "cached_attention", "cross_attention"]

LOWEST = -1e30
"""Stands for minus infinity: finite, so that a row in which all is masked is no NaN."""


@dataclass
class AttentionContext:
    """Shared by the attention of all layers of a program: the cache positions that they read, and their masks.

    Attributes:
        positions: int64 [n], 0, 1, …
        materialize: marks a value that the compiler is to compute once, not inside every loop that reads it.
        always_matmul: matrix products for one token per slot, too, rather than elementwise products and sums.
        kernels: the backend's own, if it has any.
        matmul_dtype: the dtype of these kernels' matrix products in prefill.
    """

    positions: Tensor
    materialize: Callable[[Tensor], Tensor]
    always_matmul: bool = False
    kernels: Kernels | None = None
    matmul_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._masks: dict[tuple[str, int], Tensor] = {}
        self._biases: dict[tuple[str, int], Tensor] = {}

    def mask_bias(self, past: Tensor, mask: str, window: int) -> Tensor:
        """float32 [B, 1, n], for one token per slot: 0 for visible positions, else LOWEST. Layers of one kind share
        it."""
        key = (mask, window if mask != "causal" else 0)
        if key not in self._biases:
            self._biases[key] = self.materialize(torch.where(self.visible_mask(past, 1, mask, window), 0.0, LOWEST))
        return self._biases[key]

    def visible_mask(self, past: Tensor, length: int, mask: str, window: int) -> Tensor:
        """bool [B, S, n]: the positions that each query attends to. Layers of one kind share it."""
        key = (mask, window if mask != "causal" else 0)
        if key not in self._masks:
            self._masks[key] = self._compute_mask(past, length, mask, window)
        return self._masks[key]

    def _compute_mask(self, past: Tensor, length: int, mask: str, window: int) -> Tensor:
        keys, queries = self.positions[None, None], self.query_positions(past, length)[:, :, None]
        visible = keys <= queries
        if mask == "window":
            return visible & (keys > queries - window)
        if mask == "chunk":
            return visible & (keys // window == queries // window)
        assert mask == "causal", f"unknown mask {mask!r}"
        return visible

    @staticmethod
    def query_positions(past: Tensor, length: int) -> Tensor:
        """int64 [B, S]: the position of each new token."""
        return past[:, None].long() + torch.arange(length, device=past.device)[None]


def cached_attention(
    context: AttentionContext,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past: Tensor,
    new: Tensor,
    scale: float,
    mask: str,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `precast.exporter.operators.attention.cached_attention`; the caches [B, Hkv, C + 1, D] are updated in place,
    and the output [B, H, S, D] alone is returned."""
    length, count = q.shape[2], context.positions.shape[0]
    q = context.materialize(q)
    _write_cache(k_cache, context.materialize(_quantize(k, k_scales)), past, new)
    _write_cache(v_cache, _quantize(v, v_scales), past, new)
    score_bias = _score_bias(context, past, length, slopes, bias)
    is_one = isinstance(length, int) and length == 1
    if context.kernels and (is_one or score_bias is None):
        queries = _scale_channels(q.float() * scale, k_scales)
        sinks = None if sinks is None else sinks.float()
        if is_one:
            added = _decode_bias(context, past, mask, window, score_bias)
            output = context.kernels.decode_attention(queries[:, :, 0], k_cache, v_cache, added, sinks, softcap)
            output = output[:, :, None]
        else:
            dtype = torch.float32 if has_few_rows(q[:, 0]) else context.matmul_dtype
            output = context.kernels.prefill_attention(
                queries, k_cache, v_cache, past, new, mask, window, sinks, softcap, dtype
            ).transpose(1, 2)
        return _scale_channels(output, v_scales).to(q.dtype)
    visible = context.visible_mask(past, length, mask, window)
    keys, values = _dequantize(k_cache[:, :, :count], k_scales), _dequantize(v_cache[:, :, :count], v_scales)
    if is_one and not context.always_matmul:
        return _attend_one_query(q, keys, values, visible, scale, softcap, score_bias, sinks, context.materialize)
    if softcap or sinks is not None:
        return _attend_by_matmul(q, keys, values, visible, scale, softcap, score_bias, sinks)
    if context.kernels and score_bias is not None:
        bias = torch.where(visible, 0.0, LOWEST)[:, None] + score_bias.float()
        found = context.kernels.attention(q.float() * scale, keys, values, bias, context.matmul_dtype)
        return found.transpose(1, 2).to(q.dtype)
    return _attend_by_sdpa(q, keys, values, visible, scale, score_bias)


def cross_attention(
    context: AttentionContext, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """See `precast.exporter.operators.attention.cross_attention`."""
    if context.kernels:
        return _cross_attend_by_kernels(context.kernels, context.matmul_dtype, q.float() * scale, k, v, mask).to(
            q.dtype
        )
    bias = None if mask is None else torch.where(mask == 0, LOWEST, 0.0).to(q.dtype)[:, None, None]
    return scaled_dot_product_attention(q, k, v, bias, scale=scale)


def _cross_attend_by_kernels(
    kernels: Kernels, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """float32 [B, H, S, D], of queries in float32 that are scaled."""
    bias = None if mask is None else torch.where(mask == 0, LOWEST, 0.0)[:, None]
    if isinstance(q.shape[2], int) and q.shape[2] == 1:
        added = torch.zeros(1, 1, k.shape[2]) if bias is None else bias
        return kernels.decode_attention(q[:, :, 0], k, v, added, None, 0.0)[:, :, None]
    return kernels.attention(q, k, v, None if bias is None else bias[:, None], dtype).transpose(1, 2)


def _write_cache(cache: Tensor, x: Tensor, past: Tensor, new: Tensor) -> None:
    """Write x [B, Hkv, S, D] to positions past, past + 1, …; padded tokens rewrite the last one at its own position."""
    batch, heads, length, width = x.shape
    offset = torch.minimum(torch.arange(length, device=x.device)[None], new[:, None].long() - 1)
    if not (isinstance(length, int) and length == 1):
        x = x.gather(2, offset[:, None, :, None].expand(-1, heads, -1, width))
    slot = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[None, :, None]
    cache.index_put_((slot, head, (past[:, None].long() + offset)[:, None]), x.to(cache.dtype))


def _quantize(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else (x / scales[None, :, None]).round().clamp(-128, 127)


def _dequantize(cache: Tensor, scales: Tensor | None) -> Tensor:
    return cache if scales is None else cache.to(scales.dtype) * scales[None, :, None]


def _score_bias(
    context: AttentionContext, past: Tensor, length: int, slopes: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """[B or 1, H or 1, S, n]: ALiBi and relative bias, without the mask; None where there is neither."""
    # With a spare position, as the caches have one: what is read is then never the whole, whose size would be fixed.
    found = None if bias is None else pad(bias, (0, 1))[..., : context.positions.shape[0]]
    if slopes is None:
        return found
    distance = context.positions[None, None] - context.query_positions(past, length)[:, :, None]
    alibi = slopes.view(1, -1, 1, 1) * distance[:, None]
    return alibi if found is None else alibi + found


def _attend_one_query(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float,
    bias: Tensor | None, sinks: Tensor | None, materialize: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """One new token per slot: elementwise products and sums that read each cache position once for all heads that share
    it."""
    batch, heads, _, width = q.shape
    shared = keys.shape[1]
    group = heads // shared
    queries = q.view(batch, shared, group, 1, width).float()
    scores = _map_group(group, lambda g: (queries[:, :, g] * keys.float()).sum(-1)).reshape(batch, heads, -1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias[:, :, 0]
    weights, total = _unnormalized_softmax(scores.masked_fill(~visible, LOWEST), sinks)
    weights = materialize(weights).view(batch, shared, group, -1, 1)
    output = _map_group(group, lambda g: (weights[:, :, g] * values.float()).sum(-2))
    output = output / total.view(batch, shared, group, 1)
    return output.to(q.dtype).view(batch, heads, 1, values.shape[-1])


def _decode_bias(context: AttentionContext, past: Tensor, mask: str, window: int, score_bias: Tensor | None) -> Tensor:
    """float32 [B, H or 1, n]: the mask and all biases of one token's scores."""
    masked = context.mask_bias(past, mask, window)
    return masked if score_bias is None else masked + score_bias[:, :, 0].float()


def _scale_channels(x: Tensor, scales: Tensor | None) -> Tensor:
    """x [B, H, S, D] times scales [Hkv, D]: queries and outputs are scaled in place of int8 keys and values."""
    if scales is None:
        return x
    by_cache: Tensor = x.unflatten(1, (scales.shape[0], -1))
    return (by_cache * scales[None, :, None, None]).flatten(1, 2)


def _unnormalized_softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The numerators of a softmax over [B, H, n], and its denominator [B, H, 1]: dividing the weighted sum of values is
    cheaper than dividing every weight."""
    highest = scores.amax(-1, keepdim=True)
    if sinks is None:
        weights = (scores - highest).exp()
        return weights, weights.sum(-1, keepdim=True)
    sinks = sinks.float()[None, :, None]
    highest = highest.maximum(sinks)
    weights = (scores - highest).exp()
    return weights, weights.sum(-1, keepdim=True) + (sinks - highest).exp()


def _map_group(count: int, function: Callable[[int | slice], Tensor]) -> Tensor:
    """Apply `function` to each query head of a group, to [B, Hkv, group, …]."""
    return torch.stack([function(index) for index in range(count)], 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension of [B, H, …, n], with a column that has no value where there are sinks [H]."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().view(1, -1, *[1] * (scores.ndim - 2)).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _attend_by_matmul(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float,
    bias: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Matrix products with a softmax in between, for what PyTorch's own operator does not have: softcap and sinks."""
    batch, heads, length, width = q.shape
    shared = keys.shape[1]
    grouped = q.reshape(batch, shared, -1, width)
    scores = (grouped @ keys.to(q.dtype).transpose(2, 3)).float().view(batch, heads, length, -1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    weights = _softmax(scores.masked_fill(~visible[:, None], LOWEST), sinks).to(q.dtype)
    return (weights.view(batch, shared, -1, weights.shape[-1]) @ values.to(q.dtype)).view(batch, heads, length, -1)


def _attend_by_sdpa(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """PyTorch's own operator; the query heads that share a key head are concatenated along the length."""
    batch, heads, length, width = q.shape
    shared = keys.shape[1]
    masked = torch.where(visible, 0.0, LOWEST).to(q.dtype)[:, None]
    if bias is None:
        mask = masked.repeat(1, 1, heads // shared, 1)
    else:
        mask = (masked + bias.to(q.dtype)).expand(-1, heads, -1, -1).reshape(batch, shared, -1, visible.shape[-1])
    grouped = q.reshape(batch, shared, -1, width)
    output = scaled_dot_product_attention(grouped, keys.to(q.dtype), values.to(q.dtype), mask, scale=scale)
    return output.view(batch, heads, length, -1)
