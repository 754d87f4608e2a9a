"""Numbers on a grid: codes, and what turns them back into weights.

A row of weights is cut into groups of neighbours along the input dimension; within a group
`w = scale * (code - zero) + offset`, with whole `code` and `zero` in 0 .. 2**bits - 1. `offset` is what a whole zero
point cannot hold: formats like GGUF's Q4_1 put a group's minimum anywhere. Everything here is plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Ends", "Grid", "choose", "encode", "find_grid", "grouped", "stacked"]

Ends: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Scales, zero points and offsets, each [N, G]."""

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
        channel_scales: float32 [K], what each column was multiplied by before it was put on the grid, or None for 1.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    offsets: Tensor | None
    columns: int
    channel_scales: Tensor | None = None

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
        weight = values.flatten(1)[:, : self.columns]
        return weight if self.channel_scales is None else weight / self.channel_scales


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


def stacked(parts: Sequence[Grid]) -> Grid:
    """One grid of the rows of several, whose columns were stretched alike."""
    first, has_offsets = parts[0], any(part.offsets is not None for part in parts)
    offsets = [torch.zeros_like(part.scales) if part.offsets is None else part.offsets for part in parts]
    return Grid(
        first.bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        torch.cat(offsets) if has_offsets else None,
        first.columns,
        first.channel_scales,
    )


def find_grid(weight: Tensor, group: int, bits: int) -> Grid | None:
    """The grid that `weight` [N, K] already lies on, or None.

    Weights that come out of a quantized file take at most 2**bits equally spaced values in each group. Symmetric grids
    (GGUF's Q8_0 and Q4_0, most of GPTQ's) are tried first; for 4 bits and fewer then those with a whole zero point
    (AWQ), then any (Q4_1, Q4_K): the spacing is the group's range divided by the number of steps in it, tried from the
    largest, as a group need not use its ends.
    """
    groups = grouped(weight, group)
    for candidates in (_symmetric, _whole, _free) if bits <= 4 else (_symmetric,):
        # A few rows show that most weights are on no such grid.
        if _fitting(groups[:SAMPLE], candidates, bits) and (ends := _fitting(groups, candidates, bits)):
            return encode(groups, *ends, bits, weight.shape[1])
    return None


SAMPLE = 64
"""Rows."""


def _symmetric(groups: Tensor, bits: int) -> Iterator[Ends]:
    """The largest weight is the largest code, on the side that has one more or on the other."""
    ends = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    for steps in (2 ** (bits - 1) - 1, -(2 ** (bits - 1))):
        yield ends / steps, torch.full_like(ends, 2 ** (bits - 1)), None


def _whole(groups: Tensor, bits: int) -> Iterator[Ends]:
    """Zero is a code, so it belongs to the range even where no weight is zero."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    for steps in range(2**bits - 1, 0, -1):
        scales = (high - low) / steps
        yield scales, _zero_points(low, scales, bits), None


def _free(groups: Tensor, bits: int) -> Iterator[Ends]:
    """Each group's minimum is a code: a whole zero point and the offset that is left."""
    low, high = groups.amin(-1), groups.amax(-1)
    for steps in range(2**bits - 1, 0, -1):
        scales = (high - low) / steps
        zeros = _zero_points(low, scales, bits)
        yield scales, zeros, low + scales * zeros


def _zero_points(low: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (-low / torch.where(scales == 0, 1.0, scales)).round().clamp(0, 2**bits - 1)


def _fitting(groups: Tensor, candidates: Callable[[Tensor, int], Iterator[Ends]], bits: int) -> Ends | None:
    """For each group the first of the candidates that gives it back, or None where one has none."""
    best, is_found = None, torch.zeros(groups.shape[:-1], dtype=torch.bool)
    for ends in candidates(groups, bits):
        best = ends if best is None else choose(is_found, best, ends)
        is_found = is_found | _fits(groups, ends, bits)
        if bool(is_found.all()):
            return best
    return None


def _fits(groups: Tensor, ends: Ends, bits: int) -> Tensor:
    """Which groups come back as they were."""
    found = encode(groups, *ends, bits, groups[0].numel()).dequantize().view_as(groups)
    return (groups - found).abs().amax(-1) <= EXACT * groups.abs().amax(-1)


def choose(is_first: Tensor, first: Ends, second: Ends) -> Ends:
    """Per group the ends of one or of the other."""
    scales, zeros = (torch.where(is_first, *pair) for pair in zip(first[:2], second[:2], strict=True))
    if first[2] is None or second[2] is None:
        return scales, zeros, None
    return scales, zeros, torch.where(is_first, first[2], second[2])
