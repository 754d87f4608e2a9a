"""GPTQ, as AutoGPTQ and GPTQModel write it.

A module has `qweight` int32 [inputs / n, outputs], where a word holds n = 32 / bits consecutive inputs; `qzeros` int32
[groups, outputs / n], where it holds n outputs; `scales` [groups, outputs]; `g_idx` int32 [inputs], the group of each
input. In checkpoint_format "gptq" a stored zero point is one too small, modulo 2**bits; in "gptq_v2" it is itself.

Source: `TorchQuantLinear` of GPTQModel and `convert_gptq_v1_to_v2_format` there.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from .scheme import (
    Packing,
    SchemeError,
    SourceScheme,
    dequantize,
    get_section,
    make_group_index,
    read_group_index,
    read_group_size,
    require_choice,
    require_matrix,
    require_part,
    unpack_words,
)

__all__ = ["Gptq"]

_OFFSETS = {"gptq": 1, "gptq_v2": 0}


class Gptq(Packing):
    """See the module, and Packing."""

    supported = "gptq (4 or 8 bits, checkpoint_format gptq or gptq_v2)"
    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, settings: dict[str, Any]) -> None:
        _refuse_extras(settings)
        # GPTQModel has renamed the setting and writes both.
        written = {"checkpoint_format": settings.get("checkpoint_format") or settings.get("format") or "gptq"}
        self._offset = _OFFSETS[require_choice(written, "checkpoint_format", tuple(_OFFSETS))]
        self.scheme = SourceScheme(
            method="gptq",
            bits=require_choice(settings, "bits", (4, 8)),
            group_size=read_group_size(settings),
            symmetric=settings.get("sym") is True,
            contiguous=not settings.get("desc_act") or settings.get("static_groups") is True,
        )

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The float32 weight [outputs, inputs]. Raises SchemeError."""
        qweight = require_matrix(parts, "qweight", torch.int32)
        per_word, outputs = 32 // self.scheme.bits, qweight.shape[1]
        groups, index = make_group_index(qweight.shape[0] * per_word, self.scheme.group_size)
        scales = require_part(parts, "scales", (groups, outputs))
        qzeros = require_part(parts, "qzeros", (groups, ceil(outputs / per_word)), dtypes=(torch.int32,))
        if "g_idx" in parts:
            index = read_group_index(parts, "g_idx", len(index), groups)
        zeros = self._zeros(qzeros, outputs)
        return dequantize(unpack_words(qweight.T, self.scheme.bits), scales.T, zeros.T, index)

    def _zeros(self, qzeros: Tensor, outputs: int) -> Tensor:
        """uint8 [groups, outputs]."""
        zeros: Tensor = (unpack_words(qzeros, self.scheme.bits)[:, :outputs] + self._offset) & (2**self.scheme.bits - 1)
        middle = 2 ** (self.scheme.bits - 1)
        # Then checkpoint_format is not what the file is in, and every weight would be off by a step.
        if self.scheme.symmetric and (zeros != middle).any():
            raise SchemeError(f"has zero points other than {middle}, though its quantization_config says sym: true")
        return zeros


def _refuse_extras(settings: dict[str, Any]) -> None:
    if settings.get("is_marlin_format"):
        raise SchemeError("is_marlin_format")
    if settings.get("rotation"):
        raise SchemeError(f"rotation {settings['rotation']!r}")
    # "-:PATTERN" leaves modules as they are, which shows in their tensors; other rules quantize some otherwise.
    if rules := [pattern for pattern in get_section(settings, "dynamic") if not pattern.startswith("-:")]:
        raise SchemeError(f"dynamic rules for {', '.join(map(repr, rules))}")
