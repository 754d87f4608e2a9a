"""Attention kernels: the operators of cpp/decode_attention.h and cpp/blocked_attention.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import KernelTemplate, cpp_type, pointer_names, realize_contiguous

__all__ = ["attention", "decode_attention", "prefill_attention"]


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
        float32 [B, S, H, Dv], zeros for padding.
    """
    raise NotImplementedError("in compiled code only")


@torch.library.custom_op("precast::attention", mutates_args=())
def attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype) -> Tensor:
    """Attention of all queries to all keys, as in an encoder, or of a decoder to an encoder.

    Args:
        q: float32 [B, H, S, D], scaled.
        keys: [B, Hkv, L, D] of any floating dtype, H a multiple of Hkv.
        values: [B, Hkv, L, Dv] of the same dtype.
        bias: float32 [B or 1, H or 1, S or 1, L], added to scores; a query that attends to nothing has -inf, or a
            number so low that no score counts beside it, for all keys.
        matmul_dtype: see `prefill_attention`.

    Returns:
        float32 [B, S, H, Dv].
    """
    raise NotImplementedError("in compiled code only")


@prefill_attention.register_fake
@attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    batch, heads, length = q.shape[:3]
    return q.new_empty(batch, length, heads, values.shape[3])


@register_lowering(torch.ops.precast.decode_attention.default, type_promotion_kind=None)
def _lower_decode(q: Any, keys: Any, values: Any, bias: Any, sinks: Any, softcap: float) -> Any:
    types, sizes = _template_arguments(q, keys, values)
    inputs = _name_inputs(q=q, k=keys, v=values, bias=bias, sinks=sinks)
    names = pointer_names(inputs)
    added = f"{names['bias']}, {_bias_strides(bias.get_size())}"
    caches = f"precast::Caches<{types}>{{{names['k']}, {names['v']}, {sizes}, {{bias:2}}, {added}, {softcap}f}}"
    call = f"precast::decode_attention({caches}, {names['q']}, {_sinks_pointer(sinks)}, y);"
    size = [*q.get_size()[:2], values.get_size()[3]]
    return KernelTemplate(inputs, size, call, ["simd.h", "decode_attention.h"]).make_node()


@register_lowering(torch.ops.precast.prefill_attention.default, type_promotion_kind=None)
def _lower_prefill(
    q: Any, keys: Any, values: Any, past_lengths: Any, new_lengths: Any, mask: str, window: int, sinks: Any,
    softcap: float, matmul_dtype: torch.dtype,
) -> Any:  # fmt: skip
    rest = f"past_lengths, new_lengths, precast::Mask::{mask}, {window}, {softcap}f, {_sinks_pointer(sinks)}"
    inputs = _name_inputs(q=q, k=keys, v=values, past_lengths=past_lengths, new_lengths=new_lengths, sinks=sinks)
    return _make_blocked(inputs, rest, matmul_dtype)


@register_lowering(torch.ops.precast.attention.default, type_promotion_kind=None)
def _lower_attention(q: Any, keys: Any, values: Any, bias: Any, matmul_dtype: torch.dtype) -> Any:
    inputs = _name_inputs(q=q, k=keys, v=values, bias=bias)
    added = "" if bias is None else f"{pointer_names(inputs)['bias']}, {_bias_strides(bias.get_size())}"
    rest = f"nullptr, nullptr, precast::Mask::none, 0, 0.0f, nullptr, {{{added}}}"
    return _make_blocked(inputs, rest, matmul_dtype)


def _make_blocked(inputs: dict[str, Any], rest: str, matmul_dtype: torch.dtype) -> Any:
    """The node of blocked_attention(), given the last members of BlockedAttention."""
    q, keys, values = (inputs[name] for name in "qkv")
    types, sizes = _template_arguments(q, keys, values)
    fma = {torch.float32: "precast::Float32Fma", torch.bfloat16: "precast::Bfloat16Fma"}[matmul_dtype]
    kind, names = f"precast::BlockedAttention<{fma}, {types}>", pointer_names(inputs)
    call = (
        f"precast::blocked_attention({kind}{{{names['k']}, {names['v']}, {sizes}, {{q:2}}, {rest}}}, {names['q']}, y);"
    )
    batch, heads, length = q.get_size()[:3]
    headers = ["simd.h", "decode_attention.h", "blocked_attention.h"]
    return KernelTemplate(inputs, [batch, length, heads, values.get_size()[3]], call, headers).make_node()


def _name_inputs(**nodes: Any) -> dict[str, Any]:
    """The inputs that there are."""
    return {name: realize_contiguous(node) for name, node in nodes.items() if node is not None}


def _sinks_pointer(sinks: Any) -> str:
    return "nullptr" if sinks is None else "sinks"


def _template_arguments(q: Any, keys: Any, values: Any) -> tuple[str, str]:
    """The template arguments of a kernel's type, and the values of its first members."""
    heads, key, shared, value = int(q.get_size()[1]), int(q.get_size()[-1]), *map(int, values.get_size()[1::2])
    return f"{cpp_type(keys)}, {heads // shared}, {key}, {value}", f"{{q:0}}, {shared}, {{k:2}}"


def _bias_strides(size: Sequence[Any]) -> str:
    """Strides of a bias along all dimensions but the last, 0 where it is broadcast."""
    inner = [" * ".join(f"{{bias:{each}}}" for each in range(index + 1, len(size))) for index in range(len(size) - 1)]
    return ", ".join("0" if each == 1 else stride for each, stride in zip(size, inner, strict=False))
