"""Quantized layers: what takes the place of `nn.Linear` and `nn.Embedding` in a model that is exported quantized.

Each is one operator with an eager meaning, so that the quantized program can be run and compared before any backend
sees it; a backend lowers the operators its own way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .scheme import Grid

__all__ = [
    "Packed",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "codes_of",
    "look_up",
    "means",
    "multiply",
    "quantized_embedding",
    "quantized_linear",
    "unpack",
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
    """`x @ wᵀ + bias` with w on a grid, w = scale * (code - zero).

    Codes lie along the input dimension in bytes, low bits first, as ONNX Runtime's MatMulNBits has them. The last
    `extra` columns of w do not multiply x but the mean of each group of x: that is how offsets are held, in codes like
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
    """Rows of a table on a grid: ids int64 [...] -> float32 [..., K].

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
    weight = unpack(codes, scales, zeros, bits)
    result: Tensor = x @ weight[:, :columns].to(x.dtype).T
    if extra:
        result = result + means(x, group) @ weight[:, columns : columns + extra].to(x.dtype).T
    return result if bias is None else result + bias


def look_up(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> Tensor:
    """`quantized_embedding` in PyTorch's own operators."""
    rows = codes[ids.flatten()].unflatten(1, (-1, group * bits // 8))
    picked = None if zeros is None else zeros[ids.flatten()]
    return unpack(rows, scales[ids.flatten()], picked, bits).view(*ids.shape, -1)


def means(x: Tensor, group: int) -> Tensor:
    """The mean of each group of the last dimension."""
    result: Tensor = x.unflatten(-1, (-1, group)).mean(-1)
    return result


def unpack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The weights, float32 [N, G * group]."""
    middle = torch.full_like(scales, 2 ** (bits - 1))
    points = middle if zeros is None else codes_of(zeros, bits)[:, : scales.shape[1]].float()
    return ((codes_of(codes, bits).float() - points[..., None]) * scales[..., None]).flatten(1)


def codes_of(packed: Tensor, bits: int) -> Tensor:
    """Bytes -> codes, along the last dimension."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Codes -> bytes, along the last dimension, of even length for 4 bits."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


# ---------------------------------------------------------------- modules


class Packed(nn.Module):
    """A grid as buffers in the operators' layout. `extra` columns hold offsets; see `quantized_linear`. What columns
    were stretched by is taken back by `balance` [K], which inputs are multiplied by, and rows that are looked up."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    balance: Tensor | None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("balance", None if grid.channel_scales is None else 1 / grid.channel_scales)
        self.bits, self.group, self.columns, self.extra = grid.bits, grid.group, grid.columns, 0
        if grid.offsets is not None:
            self.extra, grid = grid.offsets.shape[1], _with_offsets(grid)
        self.register_buffer("codes", _join(grid.codes, grid.bits).contiguous())
        self.register_buffer("scales", grid.scales.contiguous())
        self.register_buffer("zeros", None if grid.is_symmetric else _zero_points(grid))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and balance."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))


def _with_offsets(grid: Grid) -> Grid:
    """Offsets as more columns: codes of their own, in symmetric groups, over the means of the groups before."""
    assert grid.offsets is not None
    # An offset is added to each of a group's weights, and the mean is the sum over `group`.
    values = grid.offsets * grid.group
    missing = -values.shape[1] % grid.group
    groups = torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, grid.group))
    middle = 2 ** (grid.bits - 1)
    scales = groups.abs().amax(-1) / (middle - 1)
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (groups / scales[..., None]).round().add(middle).to(torch.uint8)
    return replace(
        grid,
        codes=torch.cat([grid.codes, codes], 1),
        scales=torch.cat([grid.scales, scales], 1),
        zeros=torch.cat([grid.zeros, torch.full_like(scales, middle, dtype=torch.uint8)], 1),
        offsets=None,
    )


def _zero_points(grid: Grid) -> Tensor:
    """In bytes, each row from a byte of its own."""
    missing = grid.zeros.shape[1] % 2 if grid.bits == 4 else 0
    return _join(torch.nn.functional.pad(grid.zeros, (0, missing)), grid.bits).contiguous()


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weight on a grid; the bias, if any, stays as it is."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N]."""
        return self._times(x, self.bias)

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], for modelling code that multiplies by it itself, as Mamba's does."""
        return self._times(torch.eye(self.packed.columns), None).T

    def _times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        it = self.packed
        x = x if it.balance is None else x * it.balance.to(x.dtype)
        result: Tensor = quantized_linear(
            x, it.codes, it.scales, it.zeros, bias, it.bits, it.group, it.columns, it.extra
        )
        return result


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` with its table on a grid, which an output embedding may share."""

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
