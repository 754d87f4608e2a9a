"""Attention of one new token per row to its caches: the operator that cpp/attend.h computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .template import Calling, type_of, whole

__all__ = ["attend"]


@torch.library.custom_op("precast::attend", mutates_args=())
def attend(
    q: Tensor, keys: Tensor, values: Tensor, added: Tensor, sinks: Tensor | None, softcap: float
) -> Tensor:
    """Attention to the first n rows of caches.

    Args:
        q: float32 [B, H, D], scaled.
        keys: [B, Hkv, C, D] of any floating dtype or int8, H a multiple of Hkv.
        values: [B, Hkv, C, Dv] of the same dtype.
        added: float32 [B or 1, H or 1, n], to scores; what is not seen has -1e30.
        sinks: float32 [H]: scores without a value.
        softcap: scores are softcap * tanh(score / softcap) before `added`; 0 for none.

    Returns:
        float32 [B, H, Dv].
    """
    raise NotImplementedError("in compiled code only")


@attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[3])


@register_lowering(torch.ops.precast.attend.default, type_promotion_kind=None)
def _lower(q: Any, keys: Any, values: Any, added: Any, sinks: Any, softcap: float) -> Any:
    inputs = {"q": whole(q), "k": whole(keys), "v": whole(values), "more": whole(added)}
    inputs |= {"sinks": whole(sinks)} if sinks is not None else {}
    batch, heads, key = (int(size) for size in q.get_size())
    _, shared, capacity, value = (int(size) for size in values.get_size())
    strides = _strides(added.get_size())
    kind = f"precast::Caches<{type_of(inputs['k'])}, {heads // shared}, {key}, {value}>"
    caches = f"{kind}{{k, v, {batch}, {shared}, {{count}}, {capacity}, more, {strides}, {softcap}f}}"
    call = f"precast::attend({caches}, q, {'sinks' if sinks is not None else 'nullptr'}, y);"
    return Calling(inputs, [batch, heads, value], call, ["dot.h", "attend.h"], count=("more", 2)).output()


def _strides(size: list[Any]) -> str:
    """Of a row and a head of [B or 1, H or 1, n], 0 for one that all share."""
    rows, heads = int(size[0]), int(size[1])
    return f"{heads if rows > 1 else 0} * {{count}}, {1 if heads > 1 else 0} * {{count}}"
