"""Linear layers in ATen: as sums that a compiler fuses where there is one token, as products of matrices where there
are more.

One token reads every weight once, so what counts is how few bytes a weight has and that nothing else is read or
written: codes are turned into numbers on their way into the sum, and activations stay float32. With more tokens codes
are turned into a matrix first, in the dtype of the processor's fastest product.
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

__all__ = ["Codes", "Layer", "is_few", "linear", "quantized_linear", "side_by_side"]

FEW = 8
"""So many rows are summed side by side from one reading of the weights; more are a product of matrices."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, materialize: Callable[[Tensor], Tensor]) -> Tensor:
    """`x @ weightᵀ + bias`, [..., K] -> [..., N], for few rows; `weight` may be of a narrower dtype than x."""
    return _biased(_fused(x, lambda rows: (rows * weight[:, None].to(rows.dtype)).sum(-1), materialize), bias)


def _fused(x: Tensor, times: Callable[[Tensor], Tensor], materialize: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows [R, K] of x [..., K] `times` a weight -> [N, R], as one tensor [..., N]. A known number of rows is written
    out one by one, and all share a reading of the weight."""
    rows = materialize(x.float()).reshape(-1, x.shape[-1])
    if is_few(x):
        found = torch.stack([times(row)[:, 0] for row in rows.split(1)])
    else:
        # Laid out as a product of matrices would be: what comes after may count on it.
        found = times(rows).T.clone(memory_format=torch.contiguous_format)
    return found.view(*x.shape[:-1], -1).to(x.dtype)


def is_few(x: Tensor) -> bool:
    """Whether [..., K] has a fixed, small number of rows."""
    rows = prod(x.shape[:-1])
    return isinstance(rows, int) and rows <= FEW


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


class Codes:
    """A weight on a grid, as `precast.quantized_linear` holds it: codes uint8 [N, G, group * bits / 8], scales
    float32 [N, G], zeros uint8 or None. With `extra` columns, which multiply the means of x's groups."""

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, columns: int, extra: int
    ) -> None:
        self.codes, self.scales, self.bits, self.group = codes, scales, bits, group
        self.points = zeros
        self.columns, self.extra = columns, extra

    @cached_property
    def zeros(self) -> Tensor | float:
        """float32 [N, G, 1], or one for all."""
        if self.points is None:
            return 2.0 ** (self.bits - 1)
        return unpack_codes(self.points, self.bits)[:, : self.scales.shape[1], None].float()

    def widened(self, x: Tensor) -> Tensor:
        """x [..., K] followed by the means of its groups if these count, and by zeros up to whole groups."""
        x = torch.cat([x, group_means(x, self.group)], -1) if self.extra else x
        missing = self.scales.shape[1] * self.group - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def times(self, rows: Tensor) -> Tensor:
        """float32 [R, G * group] -> [N, R], in one pass over the codes."""
        if self.scales.shape[1] > 1:
            return (self._products(rows, self.zeros) * self.scales[:, None, :, None]).sum((-1, -2))
        # The zero once per output rather than once per code.
        zero = self.zeros[..., 0] if isinstance(self.zeros, Tensor) else self.zeros
        return (self._products(rows, 0.0).sum((-1, -2)) - zero * rows.sum(-1)) * self.scales

    def _products(self, rows: Tensor, zeros: Tensor | float) -> Tensor:
        """[N, R, G, group], or half a group with the products of two codes each."""
        zeros = zeros[:, None] if isinstance(zeros, Tensor) else zeros
        if self.bits == 8:
            return rows.view(-1, self.scales.shape[1], self.group) * (self.codes[:, None].float() - zeros)
        # Two codes in a byte, the even one in its low half.
        even, odd = rows.view(-1, self.scales.shape[1], self.group // 2, 2).unbind(-1)
        both = self.codes[:, None].to(torch.int32)
        return even * ((both & 15).float() - zeros) + odd * ((both >> 4).float() - zeros)

    def matrix(self, dtype: torch.dtype, kernels: Kernels | None) -> tuple[Tensor, Tensor | None]:
        """[N, G * group], and what its products are still to be multiplied with. Codes of 8 bits fit bfloat16 as they
        are, so a row with one scale loses nothing."""
        if kernels and (self.scales.shape[1] > 1 or dtype is torch.float32):
            return kernels.matrix(self.codes, self.scales, self.points, self.bits, dtype), None
        codes = (unpack_codes(self.codes, self.bits).float() - self.zeros).to(dtype)
        if self.scales.shape[1] == 1:
            return codes.flatten(1), self.scales[:, 0]
        return (codes * self.scales[..., None].to(dtype)).flatten(1), None


def quantized_linear(
    x: Tensor,
    weight: Codes,
    bias: Tensor | None,
    materialize: Callable[[Tensor], Tensor],
    product: torch.dtype,
    kernels: Kernels | None,
    few: bool,
) -> Tensor:
    """float [..., K] -> [..., N], as sums for few rows; products of matrices are of dtype `product`."""
    if few:
        return _biased(_fused(weight.widened(x), weight.times, materialize), bias)
    matrix, scales = weight.matrix(product, kernels)
    y = (weight.widened(x).to(product) @ matrix.T).to(x.dtype)
    return _biased(y if scales is None else y * scales, bias)


class Layer(NamedTuple):
    """A linear layer and its input [..., K]."""

    x: Tensor
    weight: Tensor | Codes
    bias: Tensor | None


def side_by_side(layers: Sequence[Layer], rows: Callable[..., Tensor]) -> list[Tensor]:
    """What layers of few rows make of inputs of one shape, by one call of `rows`. They are of one kind: numbers of one
    dtype, or codes of as many bits in groups of one size, all with zeros or all without."""
    flat = [_flat(layer) for layer in layers]
    weights, *grids = _held([layer.weight for layer in layers])
    found = rows(flat, weights, *grids)
    ends = accumulate(x.shape[0] * weight.shape[0] for x, weight in zip(flat, weights, strict=True))
    parts = [found[begin:end] for begin, end in pairwise([0, *ends])] if len(layers) > 1 else [found]
    return [_shaped(part, layer) for part, layer in zip(parts, layers, strict=True)]


def _flat(layer: Layer) -> Tensor:
    """float32 [R, K]."""
    x = layer.weight.widened(layer.x) if isinstance(layer.weight, Codes) else layer.x
    return x.float().reshape(-1, x.shape[-1])


def _held(weights: Sequence[Tensor | Codes]) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """Numbers or codes, scales, zeros and bits, as `rows` takes them."""
    codes = [weight for weight in weights if isinstance(weight, Codes)]
    if not codes:
        return [weight for weight in weights if isinstance(weight, Tensor)], [], [], 0
    zeros = [each.points for each in codes if each.points is not None]
    return [each.codes for each in codes], [each.scales for each in codes], zeros, codes[0].bits


def _shaped(part: Tensor, layer: Layer) -> Tensor:
    return _biased(part.view(*layer.x.shape[:-1], -1).to(layer.x.dtype), layer.bias)
