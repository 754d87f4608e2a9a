"""Attention kernels: the operators of cpp/decode_attention.h and cpp/prefill_attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import KernelTemplate, cpp_type, realize_contiguous

__all__ = ["decode_attention", "prefill_attention"]


@torch.library.custom_op("precast::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, sinks: Tensor | None, softcap: float
) -> Tensor:
    """Attention of one token per slot to the first n positions of its caches.

    Args:
        q: float32 [B, H, D], scaled.
        keys: [B, Hkv, C, D] of any floating dtype or int8, H a multiple of Hkv.
        values: [B, Hkv, C, Dv] of the same dtype.
        bias: float32 [B or 1, H or 1, n], added to scores; masked positions have -1e30.
        sinks: float32 [H]: scores without a value.
        softcap: scores are softcap * tanh(score / softcap) before `bias`; 0 for none.

    Returns:
        float32 [B, H, Dv].
    """
    raise NotImplementedError("in compiled code only")


@decode_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[3])


@torch.library.custom_op("precast::prefill_attention", mutates_args=())
def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    mask: str,
    window: int,
    sinks: Tensor | None,
    softcap: float,
    matmul_dtype: torch.dtype,
) -> Tensor:
    """Attention of S new tokens per slot, whose keys and values are in the caches already.

    Args:
        q: float32 [B, H, S, D], scaled.
        keys, values, sinks, softcap: see `decode_attention`.
        past_lengths: int32 [B], tokens in the caches before the new ones.
        new_lengths: int32 [B], new tokens without padding.
        mask, window: see `precast.cached_attention`.
        matmul_dtype: float32 or bfloat16, the dtype of the factors of both matrix products where the processor
            multiplies it; sums and softmax are in float32.

    Returns:
        float32 [B, H, S, Dv], zeros for padding.
    """
    raise NotImplementedError("in compiled code only")


@prefill_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[3])


@register_lowering(torch.ops.precast.decode_attention.default, type_promotion_kind=None)
def _lower_decode(q: Any, keys: Any, values: Any, bias: Any, sinks: Any, softcap: float) -> Any:
    types, sizes = _template_arguments(q, keys, values)
    caches = (
        f"precast::Caches<{types}>{{k, v, {sizes}, {{bias:2}}, bias, {_bias_strides(bias.get_size())}, {softcap}f}}"
    )
    call = f"precast::decode_attention({caches}, q, {_sinks_pointer(sinks)}, y);"
    inputs = _name_inputs(sinks, q=q, k=keys, v=values, bias=bias)
    size = [*q.get_size()[:2], values.get_size()[3]]
    return KernelTemplate(inputs, size, call, ["simd.h", "decode_attention.h"]).make_node()


@register_lowering(torch.ops.precast.prefill_attention.default, type_promotion_kind=None)
def _lower_prefill(
    q: Any, keys: Any, values: Any, past_lengths: Any, new_lengths: Any, mask: str, window: int, sinks: Any,
    softcap: float, matmul_dtype: torch.dtype,
) -> Any:  # fmt: skip
    types, sizes = _template_arguments(q, keys, values)
    fma = {torch.float32: "precast::Float32Fma", torch.bfloat16: "precast::Bfloat16Fma"}[matmul_dtype]
    rest = f"past_lengths, new_lengths, precast::Mask::{mask}, {window}, {softcap}f, {_sinks_pointer(sinks)}"
    prefill = f"precast::Prefill<{fma}, {types}>{{k, v, {sizes}, {{q:2}}, {rest}}}"
    call = f"precast::prefill_attention({prefill}, q, y);"
    inputs = _name_inputs(sinks, q=q, k=keys, v=values, past_lengths=past_lengths, new_lengths=new_lengths)
    size = [*q.get_size()[:3], values.get_size()[3]]
    headers = ["simd.h", "decode_attention.h", "prefill_attention.h"]
    return KernelTemplate(inputs, size, call, headers).make_node()


def _name_inputs(sinks: Any, **nodes: Any) -> dict[str, Any]:
    given = nodes if sinks is None else {**nodes, "sinks": sinks}
    return {name: realize_contiguous(node) for name, node in given.items()}


def _sinks_pointer(sinks: Any) -> str:
    return "nullptr" if sinks is None else "sinks"


def _template_arguments(q: Any, keys: Any, values: Any) -> tuple[str, str]:
    """The template arguments of a kernel's type, and the values of its first members."""
    batch, heads, *_, key = (q.get_size()[index] for index in (0, 1, -1))
    _, shared, capacity, value = (int(size) for size in values.get_size())
    return f"{cpp_type(keys)}, {int(heads) // shared}, {int(key)}, {value}", f"{int(batch)}, {shared}, {capacity}"


def _bias_strides(size: list[Any]) -> str:
    """Strides of [B or 1, H or 1, n] along batch and heads, 0 where it is broadcast."""
    batch, heads = int(size[0]), int(size[1])
    return f"{heads if batch > 1 else 0} * {{bias:2}}, {1 if heads > 1 else 0} * {{bias:2}}"
