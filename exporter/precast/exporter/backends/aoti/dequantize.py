"""The kernel that dequantizes a weight to a matrix for GEMM: the operator of cpp/dequantize.h.

Inductor would unpack the two codes of a byte one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .gemv import quantized_type
from .kernel_template import KernelTemplate, realize_contiguous

__all__ = ["dequantize"]


@torch.library.custom_op("precast::dequantize", mutates_args=())
def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Dequantize to [N, K] of `dtype`, bfloat16 or float32: codes uint8 [N, G, group * bits / 8], scales float32 [N, G]
    and zeros uint8 [N, ceil(G * bits / 8)], or None for symmetric zero points."""
    raise NotImplementedError("in compiled code only")


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] * codes.shape[2] * 8 // bits, dtype=dtype)


@register_lowering(torch.ops.precast.dequantize.default, type_promotion_kind=None)
def _lower(codes: Any, scales: Any, zeros: Any, bits: int, dtype: torch.dtype) -> Any:
    outputs, groups, width = (int(size) for size in codes.get_size())
    columns = groups * width * 8 // bits
    given = {"w": codes, "s": scales} | ({} if zeros is None else {"z": zeros})
    inputs = {name: realize_contiguous(node) for name, node in given.items()}
    weight = quantized_type("QuantizedWeight", columns, groups, bits, has_zeros=zeros is not None)
    call = f"precast::dequantize(y, {weight}{{w, s, {'nullptr' if zeros is None else 'z'}, {{w:0}}}});"
    headers = ["simd.h", "gemv.h", "dequantize.h"]
    return KernelTemplate(inputs, [outputs, columns], call, headers, dtype=dtype).make_node()
