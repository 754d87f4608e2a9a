"""The kernel of products with weights and activations of 8 bits: the operator of cpp/int8_gemm.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import KernelTemplate, pointer_names, realize_contiguous

__all__ = ["PANEL", "int8_gemm", "pack_panels"]

PANEL = 64
"""Outputs of a panel."""


def pack_panels(codes: Tensor) -> Tensor:
    """Lay codes int8 [K, N] out as the kernel reads them: [P, Q + 1, PANEL, 4] for P panels of outputs and Q runs of
    four codes along K, padded with zeros; the last bytes of a panel are the sums of each output's codes, int32."""
    columns, outputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -outputs % PANEL, 0, -columns % 4))
    quads = padded.unflatten(0, (-1, 4)).unflatten(2, (-1, PANEL)).permute(2, 0, 3, 1)
    sums = padded.sum(0, dtype=torch.int32).view(torch.int8).view(-1, 1, PANEL, 4)
    return torch.cat([quads, sums], 1)


@torch.library.custom_op("precast::int8_gemm", mutates_args=())
def int8_gemm(
    x: Tensor,
    panels: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    balance: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
) -> Tensor:
    """Multiply x float32 [M, K] as `precast.int8_linear` does, to float32 [M, N]; `panels` are of `pack_panels`."""
    raise NotImplementedError("in compiled code only")


@int8_gemm.register_fake
def _(x: Tensor, panels: Tensor, scales: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


@register_lowering(torch.ops.precast.int8_gemm.default, type_promotion_kind=None)
def _lower(x: Any, panels: Any, scales: Any, bias: Any, balance: Any, x_scale: Any, x_zero: Any) -> Any:
    given = {"x": x, "w": panels, "s": scales, "bias": bias, "balance": balance, "scale": x_scale, "zero": x_zero}
    inputs = {name: realize_contiguous(node) for name, node in given.items() if node is not None}
    pointers = pointer_names(inputs)
    rounding = ", ".join(pointers.get(name, "nullptr") for name in ("balance", "scale", "zero"))
    outputs, columns = int(scales.get_size()[0]), int(x.get_size()[1])
    weight = f"w, s, {pointers.get('bias', 'nullptr')}, {outputs}"
    call = f"precast::int8_gemm<{columns}>(y, x, {{x:0}}, {{{weight}}}, {{{rounding}}});"
    return KernelTemplate(inputs, [x.get_size()[0], outputs], call, ["simd.h", "int8_gemm.h"]).make_node()
