"""AWQ, as AutoAWQ's version "gemm" writes it.

A module has `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8] and `scales` [groups, outputs].
From its lowest bits up, a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight; zero points are stored as they are.

Source: `dequantize_gemm` in `awq/utils/packing_utils.py` of AutoAWQ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scheme import Grid, Packing, choice, dequantized, group_size, groups_of, matrix, part, unpack_words

__all__ = ["Awq"]

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq(Packing):
    """See the module; and Packing."""

    supported = "awq (4 bits, version gemm)"
    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, settings: dict[str, Any]) -> None:
        written = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
        choice({"version": str(written).lower()}, "version", ("gemm",))
        self.grid = Grid(
            method="awq",
            bits=choice(settings, "bits", (4,)),
            group_size=group_size(settings),
            symmetric=settings.get("zero_point") is False,
        )

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError."""
        qweight = matrix(parts, "qweight", torch.int32)
        inputs, words = qweight.shape
        groups, index = groups_of(inputs, self.grid.group_size)
        scales = part(parts, "scales", (groups, words * 8))
        qzeros = part(parts, "qzeros", (groups, words), dtypes=(torch.int32,))
        return dequantized(_codes(qweight).T.contiguous(), scales.T, _codes(qzeros).T, index)


def _codes(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 8 n]."""
    eights: Tensor = unpack_words(words, 4).unflatten(-1, (-1, 8))
    return eights[..., _PLACES].flatten(-2)
