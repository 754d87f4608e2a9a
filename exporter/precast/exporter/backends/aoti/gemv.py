"""GEMV kernels, weights times a few rows: the operator of cpp/gemv.h.

Inductor's loop for it is bound by the latency of additions: to have several in flight it reads several places of a
weight at once, which halves the memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import KernelTemplate, cpp_type, number_names, pointer_names, realize_contiguous

__all__ = ["gemv", "quantized_type"]


@torch.library.custom_op("precast::gemv", mutates_args=())
def gemv(
    xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], bits: int
) -> Tensor:
    """Multiply each x float32 [R, K] with its weight, to [R, N]; results are concatenated, float32 [R * sum of N].

    Weights are [N, K] of one floating dtype with `bits` 0, or codes uint8 [N, G, group * bits / 8] with scales float32
    [N, G] and either no zeros or uint8 [N, ceil(G * bits / 8)] for each.
    """
    raise NotImplementedError("in compiled code only")


@gemv.register_fake
def _(xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Any, zeros: Any, bits: int) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0] * sum(weight.shape[0] for weight in weights))


@register_lowering(torch.ops.precast.gemv.default, type_promotion_kind=None)
def _lower(xs: list[Any], weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> Any:
    xs, weights, scales, zeros = (
        [realize_contiguous(node) for node in nodes] for nodes in (xs, weights, scales, zeros)
    )
    inputs = number_names(x=xs, w=weights, s=scales, z=zeros)
    pointers = pointer_names(inputs)
    outputs = [int(weight.get_size()[0]) for weight in weights]
    columns = int(xs[0].get_size()[1])
    weight_type = f"precast::FloatWeight<{cpp_type(weights[0])}, {columns}>"
    if bits:
        weight_type = quantized_type("QuantizedDot", columns, int(scales[0].get_size()[1]), bits, has_zeros=bool(zeros))
    layers = [
        f"{{{pointers[f'x{i}']}, {_weight_members(i, count, bool(bits), bool(zeros))}}}"
        for i, count in enumerate(outputs)
    ]
    call = f"precast::gemv<{columns}, {weight_type}>(y, {{x0:0}}, {{{', '.join(layers)}}});"
    size = [xs[0].get_size()[0] * sum(outputs)]
    return KernelTemplate(inputs, size, call, ["simd.h", "gemv.h"]).make_node()


def quantized_type(name: str, columns: int, groups: int, bits: int, *, has_zeros: bool) -> str:
    """A type of cpp/gemv.h for a quantized weight."""
    return f"precast::{name}<{columns}, {columns // groups}, {bits}, {str(has_zeros).lower()}>"


def _weight_members(i: int, outputs: int, is_grid: bool, has_zeros: bool) -> str:
    if not is_grid:
        return f"{{w{i}, {outputs}}}"
    return f"{{{{w{i}, s{i}, {f'z{i}' if has_zeros else 'nullptr'}, {outputs}}}}}"
