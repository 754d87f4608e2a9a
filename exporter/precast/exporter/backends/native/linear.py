"""Linear layers in ATen: as sums that a compiler fuses where there is one token, as products of matrices where there
are more.

One token reads every weight once, so what counts is how few bytes a weight has and that nothing else is read or
written: codes are turned into numbers on their way into the sum, and activations stay float32. With more tokens codes
are turned into a bfloat16 matrix first, for the processor's fastest product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from math import prod

import torch
from torch import Tensor

from ...quantize.linear import codes_of, means

__all__ = ["Codes", "is_few", "linear", "quantized_linear"]

FEW = 8
"""So many rows are summed side by side from one reading of the weights; more are a product of matrices."""

SIDES = 4
"""So many outputs are summed at a time: a sum of its own waits for each addition before the next, and a processor has
several adders."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, settle: Callable[[Tensor], Tensor]) -> Tensor:
    """`x @ weightᵀ + bias`, [..., K] -> [..., N], for few rows; `weight` may be of a narrower dtype than x."""

    def times(row: Tensor) -> Tensor:
        return torch.cat([(row * part.to(row.dtype)).sum(-1) for part in _sides(weight)])

    return _biased(_fused(x, times, settle), bias)


def _sides(weight: Tensor) -> Sequence[Tensor]:
    """The rows of [N, ...] in parts as long as each other, whose sums inductor puts into one loop, and what is left."""
    size = weight.shape[0] // SIDES
    return weight.split(size) if size else [weight]


def _fused(x: Tensor, times: Callable[[Tensor], Tensor], settle: Callable[[Tensor], Tensor]) -> Tensor:
    """`times` each row [1, K] of x [..., K] -> [N], as one tensor [..., N]."""
    rows = settle(x.float()).reshape(-1, x.shape[-1])
    parts = [times(rows[index][None]) for index in range(rows.shape[0])]
    return torch.stack(parts).view(*x.shape[:-1], -1).to(x.dtype)


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
        self.columns, self.extra = columns, extra
        self.zeros = 2.0 ** (bits - 1) if zeros is None else codes_of(zeros, bits)[:, : scales.shape[1], None].float()

    def widened(self, x: Tensor) -> Tensor:
        """x [..., K] followed by the means of its groups if these count, and by zeros up to whole groups."""
        x = torch.cat([x, means(x, self.group)], -1) if self.extra else x
        missing = self.scales.shape[1] * self.group - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def times(self, row: Tensor) -> Tensor:
        """float32 [1, G * group] -> [N], in one pass over the codes."""
        zeros: Iterable[Tensor | float]
        zeros = _sides(self.zeros) if isinstance(self.zeros, Tensor) else repeat(self.zeros)
        sides = zip(_sides(self.codes), _sides(self.scales), zeros, strict=False)
        return torch.cat([self._sums(row, *side) for side in sides])

    def _sums(self, row: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | float) -> Tensor:
        if scales.shape[1] > 1:
            return (self._products(row, codes, zeros) * scales[..., None]).sum((-1, -2))
        # The zero once per output rather than once per code.
        zero = zeros.flatten() if isinstance(zeros, Tensor) else zeros
        return (self._products(row, codes, 0.0).sum((-1, -2)) - zero * row.sum()) * scales[:, 0]

    def _products(self, row: Tensor, codes: Tensor, zeros: Tensor | float) -> Tensor:
        if self.bits == 8:
            return row.view(1, -1, self.group) * (codes.float() - zeros)
        # Two codes in a byte, the even one in its low half.
        even, odd = row.view(1, -1, self.group // 2, 2).unbind(-1)
        both = codes.to(torch.int32)
        return even * ((both & 15).float() - zeros) + odd * ((both >> 4).float() - zeros)

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """[N, G * group], and what its products are still to be multiplied with. Codes of 8 bits fit bfloat16 as they
        are, so a row with one scale loses nothing."""
        codes = (codes_of(self.codes, self.bits).float() - self.zeros).to(dtype)
        if self.scales.shape[1] == 1:
            return codes.flatten(1), self.scales[:, 0]
        return (codes * self.scales[..., None].to(dtype)).flatten(1), None


def quantized_linear(
    x: Tensor, weight: Codes, bias: Tensor | None, settle: Callable[[Tensor], Tensor], product: torch.dtype
) -> Tensor:
    """float [..., K] -> [..., N]; products of matrices are of dtype `product`."""
    if is_few(x):
        return _biased(_fused(weight.widened(x), weight.times, settle), bias)
    matrix, scales = weight.matrix(product)
    y = (weight.widened(x).to(product) @ matrix.T).to(x.dtype)
    return _biased(y if scales is None else y * scales, bias)
