"""Quantized weights: codes, and the parameters that turn them back into numbers.

A row of weights is cut into groups of neighbours along the input dimension; within a group `w = scale * (code - zero) +
offset`, where `code` and `zero` are integers in 0 .. 2**bits - 1. `offset` is the part of a group's minimum that an
integer zero point cannot represent: formats like GGUF's Q4_1 store a float minimum. Everything here is plain
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "QuantParams",
    "QuantizedWeight",
    "apply_by_rows",
    "detect_quantization",
    "encode",
    "select_params",
    "split_groups",
    "stack_rows",
]

EXACT = 2e-6
"""The largest error, relative to a group's largest weight, for weights to count as already quantized: it allows for the
float32 arithmetic of whoever dequantized them."""
CHUNK = 2**18
"""Weights that are quantized at a time: a megabyte, so that what is made of them stays in a core's cache, and the
allocator need not map it anew."""
SAMPLE = 64
"""Rows that are tried first: most weights turn out not to be quantized within a few."""


class QuantParams(NamedTuple):
    """Scales, zero points (integers held as floats) and offsets (None for zero everywhere), each [N, G]."""

    scales: Tensor
    zeros: Tensor
    offsets: Tensor | None


@dataclass(frozen=True)
class QuantizedWeight:
    """Quantized weights [N, K] in G = ceil(K / group) groups per row.

    Attributes:
        codes: uint8 [N, G, group].
        scales: float32 [N, G].
        zeros: uint8 [N, G].
        offsets: float32 [N, G], or None for zero everywhere.
        columns: K; codes beyond it are padding.
        channel_scales: float32 [K], the factor of each column before quantization, or None for 1.
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
        """Whether every zero point is the middle code, in which case zero points need not be stored."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The weights, float32 [N, K]."""
        values = (self.codes.float() - self.zeros.float()[..., None]) * self.scales[..., None]
        if self.offsets is not None:
            values = values + self.offsets[..., None]
        weight = values.flatten(1)[:, : self.columns]
        return weight if self.channel_scales is None else weight / self.channel_scales


def split_groups(weight: Tensor, group: int) -> Tensor:
    """[N, K] -> float32 [N, G, group]; the last group is padded with the row's last weight, which widens no range."""
    missing = -weight.shape[1] % group
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.float().reshape(weight.shape[0], -1, group)


def encode(groups: Tensor, params: QuantParams, bits: int, columns: int) -> QuantizedWeight:
    """Round `groups` [N, G, group] to the nearest codes."""
    scales, zeros, offsets = params
    scales = torch.where(scales == 0, 1.0, scales)
    shifted = groups if offsets is None else groups - offsets[..., None]
    codes = (shifted / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return QuantizedWeight(bits, codes.to(torch.uint8), scales, zeros.to(torch.uint8), offsets, columns)


def stack_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Join parts that hold consecutive rows of one weight, with the same channel scales."""
    first, has_offsets = parts[0], any(part.offsets is not None for part in parts)
    offsets = [torch.zeros_like(part.scales) if part.offsets is None else part.offsets for part in parts]
    return QuantizedWeight(
        first.bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        torch.cat(offsets) if has_offsets else None,
        first.columns,
        first.channel_scales,
    )


def apply_by_rows(weight: Tensor, function: Callable[[Tensor], QuantizedWeight | None]) -> QuantizedWeight | None:
    """Quantize a chunk of rows at a time and join the results; None if a chunk has none.

    A method needs many times the memory of its input, and an embedding can be most of a model.
    """
    parts = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        if (part := function(rows)) is None:
            return None
        parts.append(part)
    return stack_rows(parts)


def detect_quantization(weight: Tensor, group: int, bits: int) -> QuantizedWeight | None:
    """Recover codes and parameters of `weight` [N, K] if it was dequantized from such, else None.

    Weights that come out of a quantized file take at most 2**bits equally spaced values in each group. Symmetric zero
    points (GGUF's Q8_0 and Q4_0, most of GPTQ's) are tried first; for 4 bits and fewer then integer ones (AWQ), then
    float ones (Q4_1, Q4_K): the scale is the group's range divided by the number of steps in it, tried from the
    largest, as a group need not use its first and last codes.
    """
    groups = split_groups(weight, group)
    kinds = (_symmetric_candidates, _integer_candidates, _float_candidates) if bits <= 4 else (_symmetric_candidates,)
    for candidates in kinds:
        if _find_params(groups[:SAMPLE], candidates, bits) and (params := _find_params(groups, candidates, bits)):
            return encode(groups, params, bits, weight.shape[1])
    return None


def _symmetric_candidates(groups: Tensor, bits: int) -> Iterator[QuantParams]:
    """The largest weight has the largest code, on the side that has one more or on the other."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    for steps in (2 ** (bits - 1) - 1, -(2 ** (bits - 1))):
        yield QuantParams(largest / steps, torch.full_like(largest, 2 ** (bits - 1)), None)


def _integer_candidates(groups: Tensor, bits: int) -> Iterator[QuantParams]:
    """Zero has a code, so it belongs to the range even where no weight is zero."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    for steps in range(2**bits - 1, 0, -1):
        scales = (high - low) / steps
        yield QuantParams(scales, _zero_points(low, scales, bits), None)


def _float_candidates(groups: Tensor, bits: int) -> Iterator[QuantParams]:
    """Each group's minimum has a code: an integer zero point, and the remainder as the offset."""
    low, high = groups.amin(-1), groups.amax(-1)
    for steps in range(2**bits - 1, 0, -1):
        scales = (high - low) / steps
        zeros = _zero_points(low, scales, bits)
        yield QuantParams(scales, zeros, low + scales * zeros)


def _zero_points(low: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (-low / torch.where(scales == 0, 1.0, scales)).round().clamp(0, 2**bits - 1)


Candidates = Callable[[Tensor, int], Iterator[QuantParams]]


def _find_params(groups: Tensor, candidates: Candidates, bits: int) -> QuantParams | None:
    """Take for each group the first candidate that reproduces it; None if a group has no such candidate."""
    best, is_found = None, torch.zeros(groups.shape[:-1], dtype=torch.bool)
    for params in candidates(groups, bits):
        best = params if best is None else select_params(is_found, best, params)
        is_found = is_found | _is_exact(groups, params, bits)
        if bool(is_found.all()):
            return best
    return None


def _is_exact(groups: Tensor, params: QuantParams, bits: int) -> Tensor:
    """bool [N, G]: which groups these parameters reproduce."""
    found = encode(groups, params, bits, groups[0].numel()).dequantize().view_as(groups)
    return (groups - found).abs().amax(-1) <= EXACT * groups.abs().amax(-1)


def select_params(is_first: Tensor, first: QuantParams, second: QuantParams) -> QuantParams:
    """Take each group's parameters from `first` where `is_first` [N, G], else from `second`."""
    scales, zeros = (torch.where(is_first, *pair) for pair in zip(first[:2], second[:2], strict=True))
    if first.offsets is None or second.offsets is None:
        return QuantParams(scales, zeros, None)
    return QuantParams(scales, zeros, torch.where(is_first, first.offsets, second.offsets))
