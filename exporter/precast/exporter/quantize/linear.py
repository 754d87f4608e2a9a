"""Quantized layers that replace `nn.Linear` and `nn.Embedding` in a model that is exported quantized.

Each is one operator with an eager meaning, so that the quantized program can be run and compared before any backend
sees it; a backend lowers the operators its own way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .scheme import QuantizedWeight

__all__ = [
    "Packed",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "unpack_codes",
    "look_up",
    "group_means",
    "multiply",
    "quantized_embedding",
    "quantized_linear",
    "dequantize",
]


@torch.library.custom_op("precast::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    extra: int,
) -> Tensor:
    """`x @ wᵀ + bias` with quantized w = scale * (code - zero).

    Codes lie along the input dimension in bytes, low bits first, as ONNX Runtime's MatMulNBits has them. The last
    `extra` columns of w do not multiply x but the mean of each group of x: they hold the offsets, in codes like
    everything else.

    Args:
        x: float [..., K], K = `columns`.
        codes: uint8 [N, G, group * bits / 8], with G groups for K + extra columns.
        scales: float32 [N, G].
        zeros: uint8 [N, ceil(G * bits / 8)], or None for the middle, 2**(bits - 1).
        bias: float [N] or None.

    Returns:
        float [..., N].
    """
    return multiply(x, codes, scales, zeros, bias, bits, group, columns, extra)


@quantized_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("precast::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int
) -> Tensor:
    """Rows of a quantized table: ids int64 [...] -> float32 [..., K].

    `codes` is uint8 [V, K * bits / 8], K a multiple of `group`, padding included; the rest is as for
    `quantized_linear`.
    """
    return look_up(ids, codes, scales, zeros, bits, group)


@quantized_embedding.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor:
    return scales.new_empty(*ids.shape, codes.shape[1] * 8 // bits)


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    extra: int,
) -> Tensor:
    """`quantized_linear` in PyTorch's own operators."""
    weight = dequantize(codes, scales, zeros, bits)
    result: Tensor = x @ weight[:, :columns].to(x.dtype).T
    if extra:
        result = result + group_means(x, group) @ weight[:, columns : columns + extra].to(x.dtype).T
    return result if bias is None else result + bias


def look_up(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor:
    """`quantized_embedding` in PyTorch's own operators."""
    rows = codes[ids.flatten()].unflatten(1, (-1, group * bits // 8))
    picked = None if zeros is None else zeros[ids.flatten()]
    return dequantize(rows, scales[ids.flatten()], picked, bits).view(*ids.shape, -1)


def group_means(x: Tensor, group: int) -> Tensor:
    """The mean of each group of the last dimension."""
    result: Tensor = x.unflatten(-1, (-1, group)).mean(-1)
    return result


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The weights, float32 [N, G * group]."""
    middle = torch.full_like(scales, 2 ** (bits - 1))
    points = middle if zeros is None else unpack_codes(zeros, bits)[:, : scales.shape[1]].float()
    return ((unpack_codes(codes, bits).float() - points[..., None]) * scales[..., None]).flatten(1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Bytes -> codes, along the last dimension."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes -> bytes, along the last dimension, which is of even length for 4 bits."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


# ---------------------------------------------------------------- modules


class Packed(nn.Module):
    """A quantized weight as buffers in the operators' layout. `extra` columns hold offsets; see `quantized_linear`.
    Channel scales are undone by `balance` [K], their reciprocals, which multiplies inputs and embedding rows."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    balance: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("balance", None if weight.channel_scales is None else 1 / weight.channel_scales)
        self.bits, self.group, self.columns, self.extra = weight.bits, weight.group, weight.columns, 0
        if weight.offsets is not None:
            self.extra, weight = weight.offsets.shape[1], _offsets_as_columns(weight)
        self.register_buffer("codes", _pack_codes(weight.codes, weight.bits).contiguous())
        self.register_buffer("scales", weight.scales.contiguous())
        self.register_buffer("zeros", None if weight.is_symmetric else _pack_zero_points(weight))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and balance."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))


def _offsets_as_columns(weight: QuantizedWeight) -> QuantizedWeight:
    """Move offsets into extra columns, quantized symmetrically, which multiply the means of x's groups."""
    assert weight.offsets is not None
    # An offset is added to each of a group's weights, and the mean is the sum over `group`.
    values = weight.offsets * weight.group
    missing = -values.shape[1] % weight.group
    groups = torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, weight.group))
    middle = 2 ** (weight.bits - 1)
    scales = groups.abs().amax(-1) / (middle - 1)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales[..., None]).round().add(middle).to(torch.uint8)
    return replace(
        weight,
        codes=torch.cat([weight.codes, codes], 1),
        scales=torch.cat([weight.scales, scales], 1),
        zeros=torch.cat([weight.zeros, torch.full_like(scales, middle, dtype=torch.uint8)], 1),
        offsets=None,
    )


def _pack_zero_points(weight: QuantizedWeight) -> Tensor:
    """uint8 [N, ceil(G * bits / 8)]: each row begins with a byte of its own."""
    missing = weight.zeros.shape[1] % 2 if weight.bits == 4 else 0
    return _pack_codes(torch.nn.functional.pad(weight.zeros, (0, missing)), weight.bits).contiguous()


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a quantized weight; the bias, if any, stays as it is."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N]."""
        return self.multiply(x, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], for modelling code that multiplies by it itself, as Mamba's does."""
        return self.multiply(torch.eye(self.packed.columns), None).T

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none."""
        it = self.packed
        x = x if it.balance is None else x * it.balance.to(x.dtype)
        result: Tensor = quantized_linear(
            x, it.codes, it.scales, it.zeros, bias, it.bits, it.group, it.columns, it.extra
        )
        return result


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` with a quantized table, which an output embedding may share."""

    table: Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        # The same bytes under another shape.
        self.register_buffer("table", packed.codes.flatten(1))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., K]."""
        it = self.packed
        result: Tensor = quantized_embedding(ids, self.table, it.scales, it.zeros, it.bits, it.group)
        result = result if result.shape[-1] == it.columns else result[..., : it.columns]
        return result if it.balance is None else result * it.balance
