"""AWQ, as AutoAWQ's version "gemm" writes it.

A module has `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8] and `scales` [groups, outputs].
From its lowest bits up, a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight; zero points are stored as they are.

Source: `dequantize_gemm` in `awq/utils/packing_utils.py` of AutoAWQ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scheme import (
    Packing,
    SourceScheme,
    dequantize,
    make_group_index,
    read_group_size,
    require_choice,
    require_matrix,
    require_part,
    unpack_words,
)

__all__ = ["Awq"]

_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq(Packing):
    """See the module, and Packing."""

    supported = "awq (4 bits, version gemm)"
    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, settings: dict[str, Any]) -> None:
        written = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
        require_choice({"version": str(written).lower()}, "version", ("gemm",))
        self.scheme = SourceScheme(
            method="awq",
            bits=require_choice(settings, "bits", (4,)),
            group_size=read_group_size(settings),
            symmetric=settings.get("zero_point") is False,
        )

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError."""
        qweight = require_matrix(parts, "qweight", torch.int32)
        inputs, words = qweight.shape
        groups, index = make_group_index(inputs, self.scheme.group_size)
        scales = require_part(parts, "scales", (groups, words * 8))
        qzeros = require_part(parts, "qzeros", (groups, words), dtypes=(torch.int32,))
        return dequantize(_unpack_eights(qweight).T.contiguous(), scales.T, _unpack_eights(qzeros).T, index)


def _unpack_eights(words: Tensor) -> Tensor:
    """int32 [rows, n] -> uint8 [rows, 8 n]."""
    eights: Tensor = unpack_words(words, 4).unflatten(-1, (-1, 8))
    return eights[..., _ORDER].flatten(-2)
