"""The GEMM kernel of quantized weights: the operator of cpp/quantized_gemm.h.

A product of matrices in float32 would write the dequantized weight, which is four to eight times as large, and read it
again.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .gemv import quantized_type
from .kernel_template import KernelTemplate, realize_contiguous

__all__ = ["quantized_gemm"]


def quantized_gemm(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor | None:
    """Multiply x float32 [M, K] with a weight as `dequantize` takes it, to float32 [M, N]; None where the kernel does
    not take such groups.

    x is rounded to integers of 16 bits, with one scale for at most 128 numbers.
    """
    groups, width = codes.shape[1:]
    group = width * 8 // bits
    # Blocks of the kernel, which lays out four bytes of codes at a time.
    block = 128 if groups == 1 else gcd(group, 128) if group > 128 else group
    return torch.ops.precast.quantized_gemm(x, codes, scales, zeros, bits) if block * bits % 32 == 0 else None


@torch.library.custom_op("precast::quantized_gemm", mutates_args=())
def _quantized_gemm(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    raise NotImplementedError("in compiled code only")


@_quantized_gemm.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@register_lowering(torch.ops.precast.quantized_gemm.default, type_promotion_kind=None)
def _lower(x: Any, codes: Any, scales: Any, zeros: Any, bits: int) -> Any:
    outputs, groups, width = (int(size) for size in codes.get_size())
    given = {"x": x, "w": codes, "s": scales} | ({} if zeros is None else {"z": zeros})
    inputs = {name: realize_contiguous(node) for name, node in given.items()}
    weight = quantized_type("QuantizedGemm", groups * width * 8 // bits, groups, bits, has_zeros=zeros is not None)
    call = f"precast::gemm(y, x, {{x:0}}, {weight}{{{{w, s, {'nullptr' if zeros is None else 'z'}, {outputs}}}}});"
    headers = ["simd.h", "gemv.h", "quantized_gemm.h"]
    return KernelTemplate(inputs, [x.get_size()[0], outputs], call, headers).make_node()
