"""Products of few rows with weights: the operator that cpp/rows.h computes.

Inductor's sums wait for the processor: to have several at a time it must read several places of a weight at once, and
memory gives half as much then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import Calling, named, type_of, whole

__all__ = ["codes_kind", "rows"]


@torch.library.custom_op("precast::rows", mutates_args=())
def rows(
    xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], bits: int
) -> Tensor:
    """The products of each x float32 [R, K] with its weight, [R, N], one behind the other: float32 [R * sum of N].

    Weights are numbers [N, K] of one floating dtype with `bits` 0, or codes uint8 [N, G, group * bits / 8] with scales
    float32 [N, G] and either no zeros or uint8 [N, ceil(G * bits / 8)] for each.
    """
    raise NotImplementedError("in compiled code only")


@rows.register_fake
def _(xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Any, zeros: Any, bits: int) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0] * sum(weight.shape[0] for weight in weights))


@register_lowering(torch.ops.precast.rows.default, type_promotion_kind=None)
def _lower(xs: list[Any], weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> Any:
    xs, weights, scales, zeros = ([whole(node) for node in nodes] for nodes in (xs, weights, scales, zeros))
    names = list(dict.fromkeys(x.get_name() for x in xs))
    distinct = {x.get_name(): x for x in xs}
    outputs = [int(weight.get_size()[0]) for weight in weights]
    columns = int(xs[0].get_size()[1])
    kind = f"precast::Numbers<{type_of(weights[0])}, {columns}>"
    if bits:
        kind = codes_kind("Codes", columns, int(scales[0].get_size()[1]), bits, has_zeros=bool(zeros))
    layers = [
        f"{{x{names.index(x.get_name())}, {_weight(i, count, bool(bits), bool(zeros))}}}"
        for i, (x, count) in enumerate(zip(xs, outputs, strict=True))
    ]
    call = f"precast::products<{columns}, {kind}>(y, {{count}}, {{{', '.join(layers)}}});"
    inputs = named(x=list(distinct.values()), w=weights, s=scales, z=zeros)
    size = [xs[0].get_size()[0] * sum(outputs)]
    return Calling(inputs, size, call, ["dot.h", "rows.h"], count=("x0", 0)).output()


def codes_kind(name: str, columns: int, groups: int, bits: int, *, has_zeros: bool) -> str:
    """A type of cpp/rows.h for rows of codes."""
    return f"precast::{name}<{columns}, {columns // groups}, {bits}, {str(has_zeros).lower()}>"


def _weight(i: int, outputs: int, is_grid: bool, has_zeros: bool) -> str:
    if not is_grid:
        return f"{{w{i}, {outputs}}}"
    return f"{{{{w{i}, s{i}, {f'z{i}' if has_zeros else 'nullptr'}, {outputs}}}}}"
