"""Linear layers in ATen: GEMV as products and sums that a compiler fuses, GEMM as matrix products.

A GEMV reads every weight once, so its speed is that of memory: codes are dequantized on their way into the sum, nothing
else is read or written, and activations stay float32. For a GEMM codes are dequantized to a matrix first, in the dtype
of the processor's fastest matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...quantize.linear import group_means, unpack_codes
from .kernel_set import Kernels

__all__ = ["Layer", "PackedWeight", "compute_together", "gemv", "has_few_rows", "quantized_linear"]

FEW = 8
"""The most rows for a GEMV, which takes all of them in one pass over the weights; more are a GEMM."""


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, materialize: Callable[[Tensor], Tensor]) -> Tensor:
    """`x @ weightᵀ + bias`, [..., K] -> [..., N], for few rows; `weight` may be of a narrower dtype than x."""
    return _add_bias(_multiply_rows(x, lambda rows: (rows * weight[:, None].to(rows.dtype)).sum(-1), materialize), bias)


def _multiply_rows(x: Tensor, times: Callable[[Tensor], Tensor], materialize: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `times`, [R, K] -> [N, R], to the rows of x [..., K], for a result [..., N]. Few rows are unrolled, and the
    compiler fuses them into one pass over the weight."""
    rows = materialize(x.float()).reshape(-1, x.shape[-1])
    if has_few_rows(x):
        found = torch.stack([times(row)[:, 0] for row in rows.split(1)])
    else:
        # Contiguous, as the result of a matrix product is: later operators may rely on it.
        found = times(rows).T.clone(memory_format=torch.contiguous_format)
    return found.view(*x.shape[:-1], -1).to(x.dtype)


def has_few_rows(x: Tensor) -> bool:
    """Whether [..., K] has a fixed, small number of rows."""
    rows = prod(x.shape[:-1])
    return isinstance(rows, int) and rows <= FEW


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


class PackedWeight:
    """A quantized weight as `precast.quantized_linear` takes it: codes uint8 [N, G, group * bits / 8], scales float32
    [N, G], packed zeros uint8 or None; the last `extra` columns multiply the means of x's groups."""

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, columns: int, extra: int
    ) -> None:
        self.codes, self.scales, self.bits, self.group = codes, scales, bits, group
        self.packed_zeros = zeros
        self.columns, self.extra = columns, extra

    @cached_property
    def zeros(self) -> Tensor | float:
        """Zero points, float32 [N, G, 1], or one number for all."""
        if self.packed_zeros is None:
            return 2.0 ** (self.bits - 1)
        return unpack_codes(self.packed_zeros, self.bits)[:, : self.scales.shape[1], None].float()

    def extend_input(self, x: Tensor) -> Tensor:
        """Append to x [..., K] the means of its groups where there are extra columns, and zeros up to whole groups."""
        x = torch.cat([x, group_means(x, self.group)], -1) if self.extra else x
        missing = self.scales.shape[1] * self.group - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """float32 [R, G * group] -> [N, R], in one pass over the codes."""
        if self.scales.shape[1] > 1:
            return (self._code_products(rows, self.zeros) * self.scales[:, None, :, None]).sum((-1, -2))
        # The zero point once per output rather than once per code.
        zero = self.zeros[..., 0] if isinstance(self.zeros, Tensor) else self.zeros
        return (self._code_products(rows, 0.0).sum((-1, -2)) - zero * rows.sum(-1)) * self.scales

    def _code_products(self, rows: Tensor, zeros: Tensor | float) -> Tensor:
        """[N, R, G, group]; for 4 bits [N, R, G, group / 2], the sums of two neighbours."""
        zeros = zeros[:, None] if isinstance(zeros, Tensor) else zeros
        if self.bits == 8:
            return rows.view(-1, self.scales.shape[1], self.group) * (self.codes[:, None].float() - zeros)
        # A byte holds two codes, the even one in its low half.
        even, odd = rows.view(-1, self.scales.shape[1], self.group // 2, 2).unbind(-1)
        both = self.codes[:, None].to(torch.int32)
        return even * ((both & 15).float() - zeros) + odd * ((both >> 4).float() - zeros)

    def dequantize(self, dtype: torch.dtype, kernels: Kernels | None) -> tuple[Tensor, Tensor | None]:
        """The matrix [N, G * group], and scales [N] that its products are still to be multiplied with, if any.
        PackedWeight of 8 bits are exact in bfloat16, so a row with one scale loses nothing."""
        if kernels and (self.scales.shape[1] > 1 or dtype is torch.float32):
            return kernels.dequantize(self.codes, self.scales, self.packed_zeros, self.bits, dtype), None
        codes = (unpack_codes(self.codes, self.bits).float() - self.zeros).to(dtype)
        if self.scales.shape[1] == 1:
            return codes.flatten(1), self.scales[:, 0]
        return (codes * self.scales[..., None].to(dtype)).flatten(1), None


def quantized_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    materialize: Callable[[Tensor], Tensor],
    matmul_dtype: torch.dtype,
    kernels: Kernels | None,
    few_rows: bool,
) -> Tensor:
    """float [..., K] -> [..., N]: a GEMV for few rows, else a GEMM in `matmul_dtype`, or by a kernel of the same
    precision, which is float32's but for the rounding of x to 16 bits."""
    if few_rows:
        return _add_bias(_multiply_rows(weight.extend_input(x), weight.multiply_rows, materialize), bias)
    if kernels and matmul_dtype is torch.float32:
        rows = weight.extend_input(x).float().flatten(0, -2)
        y = kernels.quantized_gemm(rows, weight.codes, weight.scales, weight.packed_zeros, weight.bits)
        if y is not None:
            return _add_bias(y.view(*x.shape[:-1], -1).to(x.dtype), bias)
    matrix, scales = weight.dequantize(matmul_dtype, kernels)
    y = (weight.extend_input(x).to(matmul_dtype) @ matrix.T).to(x.dtype)
    return _add_bias(y if scales is None else y * scales, bias)


class Layer(NamedTuple):
    """A linear layer and its input [..., K]."""

    x: Tensor
    weight: Tensor | PackedWeight
    bias: Tensor | None


def compute_together(layers: Sequence[Layer], gemv_kernel: Callable[..., Tensor]) -> list[Tensor]:
    """Compute layers of few rows, on inputs of one shape, by one call of the kernel. They have one format: numbers of
    one dtype, or codes with the same bits and group size, all with zero points or all without."""
    flat = [_flatten_input(layer) for layer in layers]
    weights, *params = _split_weights([layer.weight for layer in layers])
    found = gemv_kernel(flat, weights, *params)
    ends = accumulate(x.shape[0] * weight.shape[0] for x, weight in zip(flat, weights, strict=True))
    parts = [found[begin:end] for begin, end in pairwise([0, *ends])] if len(layers) > 1 else [found]
    return [_restore_shape(part, layer) for part, layer in zip(parts, layers, strict=True)]


def _flatten_input(layer: Layer) -> Tensor:
    """float32 [R, K]."""
    x = layer.weight.extend_input(layer.x) if isinstance(layer.weight, PackedWeight) else layer.x
    return x.float().reshape(-1, x.shape[-1])


def _split_weights(weights: Sequence[Tensor | PackedWeight]) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """Weights, scales, zeros and bits, as the kernel takes them."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    if not packed:
        return [weight for weight in weights if isinstance(weight, Tensor)], [], [], 0
    zeros = [each.packed_zeros for each in packed if each.packed_zeros is not None]
    return [each.codes for each in packed], [each.scales for each in packed], zeros, packed[0].bits


def _restore_shape(part: Tensor, layer: Layer) -> Tensor:
    return _add_bias(part.view(*layer.x.shape[:-1], -1).to(layer.x.dtype), layer.bias)
