"""Weights that are codes as a matrix: the operator that cpp/matrix.h computes.

Inductor takes two codes out of a byte one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .gemv import codes_kind
from .kernel_template import Calling, whole

__all__ = ["matrix"]


@torch.library.custom_op("precast::matrix", mutates_args=())
def matrix(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """[N, K] of `dtype`, bfloat16 or float32, of codes uint8 [N, G, group * bits / 8], scales float32 [N, G] and zeros
    uint8 [N, ceil(G * bits / 8)], or none where the zero is the middle of the codes."""
    raise NotImplementedError("in compiled code only")


@matrix.register_fake
def _(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] * codes.shape[2] * 8 // bits, dtype=dtype)


@register_lowering(torch.ops.precast.matrix.default, type_promotion_kind=None)
def _lower(codes: Any, scales: Any, zeros: Any, bits: int, dtype: torch.dtype) -> Any:
    outputs, groups, width = (int(size) for size in codes.get_size())
    columns = groups * width * 8 // bits
    inputs = {"w": whole(codes), "s": whole(scales)} | ({} if zeros is None else {"z": whole(zeros)})
    kind = codes_kind("Grid", columns, groups, bits, has_zeros=zeros is not None)
    call = f"precast::matrix(y, {kind}{{w, s, {'nullptr' if zeros is None else 'z'}, {{count}}}});"
    headers = ["dot.h", "rows.h", "matrix.h"]
    return Calling(inputs, [outputs, columns], call, headers, count=("w", 0), dtype=dtype).output()
