"""Cached attention in ATen, with the caches updated in place.

The meaning is that of `precast.cached_attention`; the forms are those that inductor compiles best. Attention looks at
the first `n` rows of the caches, however long these are, so its cost goes with the tokens that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .kernel_set import Kernels
from .linear import is_few

__all__ = ["Step", "cached_attention", "cross_attention"]

LOWEST = -1e30
"""What stands for minus infinity: finite, so that a row that sees nothing is no NaN."""
HEADS_APART = 8
"""So many query heads to a key head are computed side by side from one reading of the cache."""


@dataclass
class Step:
    """What all layers of one program have in common: which cache rows they look at.

    Attributes:
        rows: int64 [n], 0, 1, …
        materialize: marks what a compiler is to compute once and not inside every loop that reads it.
        multiplies: products of matrices for one token per row, too, rather than products and sums.
        kernels: the compiler's own, if it has any.
        product: the dtype of these kernels' products for prompts.
    """

    rows: Tensor
    materialize: Callable[[Tensor], Tensor]
    multiplies: bool = False
    kernels: Kernels | None = None
    product: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._masks: dict[tuple[str, int], Tensor] = {}
        self._hidden: dict[tuple[str, int], Tensor] = {}

    def hidden(self, past: Tensor, mask: str, window: int) -> Tensor:
        """float32 [B, 1, n], for one token per row: what is added to the scores of rows that it does not see. The same
        tensor for all layers of a kind."""
        key = (mask, window if mask != "causal" else 0)
        if key not in self._hidden:
            self._hidden[key] = self.materialize(torch.where(self.visible(past, 1, mask, window), 0.0, LOWEST))
        return self._hidden[key]

    def visible(self, past: Tensor, length: int, mask: str, window: int) -> Tensor:
        """bool [B, S, n]: which rows each query sees. The same tensor for all layers of a kind."""
        key = (mask, window if mask != "causal" else 0)
        if key not in self._masks:
            self._masks[key] = self._visible(past, length, mask, window)
        return self._masks[key]

    def _visible(self, past: Tensor, length: int, mask: str, window: int) -> Tensor:
        rows, position = self.rows[None, None], self.positions(past, length)[:, :, None]
        seen = rows <= position
        if mask == "window":
            return seen & (rows > position - window)
        if mask == "chunk":
            return seen & (rows // window == position // window)
        assert mask == "causal", f"unknown mask {mask!r}"
        return seen

    @staticmethod
    def positions(past: Tensor, length: int) -> Tensor:
        """int64 [B, S]: where each new token stands."""
        return past[:, None].long() + torch.arange(length, device=past.device)[None]


def cached_attention(
    step: Step,
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
    """See `precast.exporter.operators.attention.cached_attention`; the caches [B, Hkv, C + 1, D] are changed, and the
    output [B, H, S, D] alone is returned."""
    length, count = q.shape[2], step.rows.shape[0]
    q = step.materialize(q)
    _write(k_cache, step.materialize(_rounded(k, k_scales)), past, new)
    _write(v_cache, _rounded(v, v_scales), past, new)
    added = _added(step, past, length, slopes, bias)
    is_one = isinstance(length, int) and length == 1
    if step.kernels and (is_one or added is None):
        queries = _times(q.float() * scale, k_scales)
        sinks = None if sinks is None else sinks.float()
        if is_one:
            more = _more(step, past, mask, window, added)
            output = step.kernels.attend(queries[:, :, 0], k_cache, v_cache, more, sinks, softcap)[:, :, None]
        else:
            product = torch.float32 if is_few(q[:, 0]) else step.product
            output = step.kernels.attend_prompt(
                queries, k_cache, v_cache, past, new, mask, window, sinks, softcap, product
            )
        return _times(output, v_scales).to(q.dtype)
    seen = step.visible(past, length, mask, window)
    keys, values = _restored(k_cache[:, :, :count], k_scales), _restored(v_cache[:, :, :count], v_scales)
    if is_one and not step.multiplies:
        return _one_query(q, keys, values, seen, scale, softcap, added, sinks, step.materialize)
    if softcap or sinks is not None:
        return _written_out(q, keys, values, seen, scale, softcap, added, sinks)
    return _at_once(q, keys, values, seen, scale, added)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `precast.exporter.operators.attention.cross_attention`."""
    added = None if mask is None else torch.where(mask == 0, LOWEST, 0.0).to(q.dtype)[:, None, None]
    return scaled_dot_product_attention(q, k, v, added, scale=scale)


def _write(cache: Tensor, x: Tensor, past: Tensor, new: Tensor) -> None:
    """Put x [B, Hkv, S, D] at rows past, past + 1, …; what is padding is the last token once more, in its place."""
    batch, heads, length, width = x.shape
    at = torch.minimum(torch.arange(length, device=x.device)[None], new[:, None].long() - 1)
    if not (isinstance(length, int) and length == 1):
        x = x.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
    row = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[None, :, None]
    cache.index_put_((row, head, (past[:, None].long() + at)[:, None]), x.to(cache.dtype))


def _rounded(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else (x / scales[None, :, None]).round().clamp(-128, 127)


def _restored(cache: Tensor, scales: Tensor | None) -> Tensor:
    return cache if scales is None else cache.to(scales.dtype) * scales[None, :, None]


def _added(step: Step, past: Tensor, length: int, slopes: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """[B or 1, H or 1, S, n]: what is added to scores besides the mask."""
    found = None if bias is None else bias[..., : step.rows.shape[0]]
    if slopes is None:
        return found
    distance = step.rows[None, None] - step.positions(past, length)[:, :, None]
    sloped = slopes.view(1, -1, 1, 1) * distance[:, None]
    return sloped if found is None else sloped + found


def _one_query(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float,
    added: Tensor | None, sinks: Tensor | None, materialize: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """One new token per row: products and sums that read each cache row once for all heads that share it."""
    batch, heads, _, width = q.shape
    shared = keys.shape[1]
    group = heads // shared
    queries = q.view(batch, shared, group, 1, width).float()
    scores = _each(group, lambda g: (queries[:, :, g] * keys.float()).sum(-1)).reshape(batch, heads, -1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if added is None else scores + added[:, :, 0]
    shares, total = _shares(scores.masked_fill(~seen, LOWEST), sinks)
    shares = materialize(shares).view(batch, shared, group, -1, 1)
    output = _each(group, lambda g: (shares[:, :, g] * values.float()).sum(-2)) / total.view(batch, shared, group, 1)
    return output.to(q.dtype).view(batch, heads, 1, values.shape[-1])


def _more(step: Step, past: Tensor, mask: str, window: int, added: Tensor | None) -> Tensor:
    """float32 [B, H or 1, n]: what is added to the scores of one token."""
    hidden = step.hidden(past, mask, window)
    return hidden if added is None else hidden + added[:, :, 0].float()


def _times(x: Tensor, scales: Tensor | None) -> Tensor:
    """x [B, H, S, D] by scales [Hkv, D]: a channel's scale in the caches goes to queries and to what comes out."""
    if scales is None:
        return x
    by_cache: Tensor = x.unflatten(1, (scales.shape[0], -1))
    return (by_cache * scales[None, :, None, None]).flatten(1, 2)


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A softmax of [B, H, n] before its division, and what to divide by, [B, H, 1]: a sum over rows is divided once,
    its rows would each be."""
    highest = scores.amax(-1, keepdim=True)
    if sinks is None:
        shares = (scores - highest).exp()
        return shares, shares.sum(-1, keepdim=True)
    sinks = sinks.float()[None, :, None]
    highest = highest.maximum(sinks)
    shares = (scores - highest).exp()
    return shares, shares.sum(-1, keepdim=True) + (sinks - highest).exp()


def _each(count: int, of: Callable[[int | slice], Tensor]) -> Tensor:
    """`of` each query head of a group, [B, Hkv, group, …]."""
    return torch.stack([of(index) for index in range(count)], 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension of [B, H, …, n], with a column that has no value where there are sinks [H]."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().view(1, -1, *[1] * (scores.ndim - 2)).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _written_out(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float,
    added: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, heads, length, width = q.shape
    shared = keys.shape[1]
    grouped = q.reshape(batch, shared, -1, width)
    scores = (grouped @ keys.to(q.dtype).transpose(2, 3)).float().view(batch, heads, length, -1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if added is None else scores + added
    weights = _softmax(scores.masked_fill(~seen[:, None], LOWEST), sinks).to(q.dtype)
    return (weights.view(batch, shared, -1, weights.shape[-1]) @ values.to(q.dtype)).view(batch, heads, length, -1)


def _at_once(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, added: Tensor | None) -> Tensor:
    """PyTorch's own operator, the query heads that share a key head laid one behind the other."""
    batch, heads, length, width = q.shape
    shared = keys.shape[1]
    blocked = torch.where(seen, 0.0, LOWEST).to(q.dtype)[:, None]
    if added is None:
        mask = blocked.repeat(1, 1, heads // shared, 1)
    else:
        mask = (blocked + added.to(q.dtype)).expand(-1, heads, -1, -1).reshape(batch, shared, -1, seen.shape[-1])
    grouped = q.reshape(batch, shared, -1, width)
    output = scaled_dot_product_attention(grouped, keys.to(q.dtype), values.to(q.dtype), mask, scale=scale)
    return output.view(batch, heads, length, -1)
