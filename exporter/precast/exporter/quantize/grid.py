"""Numbers on a grid: codes, and what turns them back into weights.

A row of weights is cut into groups of neighbours along the input dimension; within a group
`w = scale * (code - zero) + offset`, with whole `code` and `zero` in 0 .. 2**bits - 1. `offset` is what a whole zero
point cannot hold: formats like GGUF's Q4_1 put a group's minimum anywhere. Everything here is plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "encode", "find_grid", "grouped"]

EXACT = 2e-6
"""What may be lost, relative to a group's largest weight, for weights to count as lying on a grid: the float32
arithmetic of whoever took them off it."""


@dataclass(frozen=True)
class Grid:
    """Quantized weights [N, K] in G = ceil(K / group) groups per row.

    Attributes:
        codes: uint8 [N, G, group].
        scales: float32 [N, G].
        zeros: uint8 [N, G].
        offsets: float32 [N, G], or None for zero everywhere.
        columns: K; codes beyond it are padding.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    offsets: Tensor | None
    columns: int

    @property
    def group(self) -> int:
        return self.codes.shape[-1]

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle, which is then not stored."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The weights, float32 [N, K]."""
        values = (self.codes.float() - self.zeros.float()[..., None]) * self.scales[..., None]
        if self.offsets is not None:
            values = values + self.offsets[..., None]
        return values.flatten(1)[:, : self.columns]


def grouped(weight: Tensor, group: int) -> Tensor:
    """[N, K] -> float32 [N, G, group]; the last group repeats the row's last weight, which widens no range."""
    missing = -weight.shape[1] % group
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.float().reshape(weight.shape[0], -1, group)


def encode(groups: Tensor, scales: Tensor, zeros: Tensor, offsets: Tensor | None, bits: int, columns: int) -> Grid:
    """The nearest codes of `groups` [N, G, group]; `scales`, whole `zeros` and `offsets` are [N, G]."""
    scales = torch.where(scales == 0, 1.0, scales)
    shifted = groups if offsets is None else groups - offsets[..., None]
    codes = (shifted / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return Grid(bits, codes.to(torch.uint8), scales, zeros.to(torch.uint8), offsets, columns)


def find_grid(weight: Tensor, group: int, bits: int) -> Grid | None:
    """The grid that `weight` [N, K] already lies on, or None.

    Weights that come out of a quantized file take at most 2**bits equally spaced values in each group. Symmetric grids
    (GGUF's Q8_0 and Q4_0, most of GPTQ's) are tried first; for 4 bits and fewer then any (Q4_1, Q4_K, AWQ): its spacing
    is the group's range divided by the number of steps in it, tried from the largest, as a group need not use its ends.
    """
    groups = grouped(weight, group)
    for scales in _symmetric(groups, bits):
        if bool(_fits(groups, torch.zeros_like(scales), scales).all()):
            zeros = torch.full_like(scales, 2 ** (bits - 1))
            return encode(groups, scales, zeros, None, bits, weight.shape[1])
    return _find_affine(groups, bits, weight.shape[1]) if bits <= 4 else None


def _symmetric(groups: Tensor, bits: int) -> Iterator[Tensor]:
    """Scales under which the largest weight is the largest code, on the side that has one more or on the other."""
    ends = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    for steps in (2 ** (bits - 1) - 1, -(2 ** (bits - 1))):
        yield ends / steps


def _find_affine(groups: Tensor, bits: int, columns: int) -> Grid | None:
    low, high = groups.amin(-1), groups.amax(-1)
    scales, is_found = torch.zeros_like(low), high == low
    for steps in range(2**bits - 1, 0, -1):
        if bool(is_found.all()):
            return _anchor(groups, scales, low, bits, columns)
        fits = ~is_found & _fits(groups, low, (high - low) / steps)
        scales, is_found = torch.where(fits, (high - low) / steps, scales), is_found | fits
    return _anchor(groups, scales, low, bits, columns) if bool(is_found.all()) else None


def _fits(groups: Tensor, minima: Tensor, scales: Tensor) -> Tensor:
    """Which groups lie on `minimum + scale * whole`."""
    scales = torch.where(scales == 0, 1.0, scales)[..., None]
    steps = (groups - minima[..., None]) / scales
    error = ((steps - steps.round()) * scales).abs().amax(-1)
    return error <= EXACT * groups.abs().amax(-1)


def _anchor(groups: Tensor, scales: Tensor, low: Tensor, bits: int, columns: int) -> Grid:
    """Split each group's minimum into a whole zero point and the offset that is left. A group of one value has no
    spacing of its own: it is that offset."""
    scales = torch.where(scales == 0, 1.0, scales)
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    offsets = low + scales * zeros
    negligible = offsets.abs() <= EXACT * groups.abs().amax(-1)
    return encode(groups, scales, zeros, None if bool(negligible.all()) else offsets, bits, columns)
