"""Attention to caches: the operators that cpp/attend.h and cpp/prompt.h compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import Calling, type_of, whole

__all__ = ["attend", "attend_prompt"]


@torch.library.custom_op("precast::attend", mutates_args=())
def attend(q: Tensor, keys: Tensor, values: Tensor, added: Tensor, sinks: Tensor | None, softcap: float) -> Tensor:
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


@torch.library.custom_op("precast::attend_prompt", mutates_args=())
def attend_prompt(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    new: Tensor,
    mask: str,
    window: int,
    sinks: Tensor | None,
    softcap: float,
    product: torch.dtype,
) -> Tensor:
    """Attention of S new tokens per row, which are in the caches already.

    Args:
        q: float32 [B, H, S, D], scaled.
        keys, values, sinks, softcap: see `attend`.
        past, new: int32 [B], tokens in the caches before these, and how many of these are no padding.
        mask, window: see `precast.cached_attention`.
        product: float32, or bfloat16: what scores and outputs are products of, where the processor multiplies such;
            they are summed, and the softmax is taken, in float32.

    Returns:
        float32 [B, H, S, Dv], zeros for padding.
    """
    raise NotImplementedError("in compiled code only")


@attend_prompt.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[3])


@register_lowering(torch.ops.precast.attend.default, type_promotion_kind=None)
def _lower_one(q: Any, keys: Any, values: Any, added: Any, sinks: Any, softcap: float) -> Any:
    kind, sizes = _sizes(q, keys, values)
    caches = f"precast::Caches<{kind}>{{k, v, {sizes}, {{count}}, more, {_strides(added.get_size())}, {softcap}f}}"
    call = f"precast::attend({caches}, q, {_pointer(sinks)}, y);"
    inputs = _inputs(sinks, q=q, k=keys, v=values, more=added)
    size = [*q.get_size()[:2], values.get_size()[3]]
    return Calling(inputs, size, call, ["dot.h", "attend.h"], count=("more", 2)).output()


@register_lowering(torch.ops.precast.attend_prompt.default, type_promotion_kind=None)
def _lower_prompt(
    q: Any, keys: Any, values: Any, past: Any, new: Any, mask: str, window: int, sinks: Any, softcap: float,
    product: torch.dtype,
) -> Any:  # fmt: skip
    kind, sizes = _sizes(q, keys, values)
    how = {torch.float32: "precast::InFloat32", torch.bfloat16: "precast::InBfloat16"}[product]
    rest = f"past, fresh, precast::Mask::{mask}, {window}, {softcap}f, {_pointer(sinks)}"
    call = f"precast::attend(precast::Prompt<{how}, {kind}>{{k, v, {sizes}, {{count}}, {rest}}}, q, y);"
    inputs = _inputs(sinks, q=q, k=keys, v=values, past=past, fresh=new)
    size = [*q.get_size()[:3], values.get_size()[3]]
    return Calling(inputs, size, call, ["dot.h", "attend.h", "prompt.h"], count=("q", 2)).output()


def _inputs(sinks: Any, **nodes: Any) -> dict[str, Any]:
    return {name: whole(node) for name, node in nodes.items()} | ({"sinks": whole(sinks)} if sinks is not None else {})


def _pointer(sinks: Any) -> str:
    return "nullptr" if sinks is None else "sinks"


def _sizes(q: Any, keys: Any, values: Any) -> tuple[str, str]:
    """What is known when a kernel is compiled, for its type and for its first members."""
    batch, heads, *_, key = (q.get_size()[index] for index in (0, 1, -1))
    _, shared, capacity, value = (int(size) for size in values.get_size())
    return f"{type_of(keys)}, {int(heads) // shared}, {int(key)}, {value}", f"{int(batch)}, {shared}, {capacity}"


def _strides(size: list[Any]) -> str:
    """Of a row and a head of [B or 1, H or 1, n], 0 for one that all share."""
    rows, heads = int(size[0]), int(size[1])
    return f"{heads if rows > 1 else 0} * {{count}}, {1 if heads > 1 else 0} * {{count}}"
