"""Products of few rows with weights, in C++ of our own (rows.h) within the library that inductor makes.

Inductor's sums wait for the processor: to have several at a time it must read several places of a weight at once, and
memory gives half as much then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import register_lowering

__all__ = ["rows"]

_HEADER = Path(__file__).with_name("rows.h")


@torch.library.custom_op("precast::rows", mutates_args=())
def rows(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], bits: int) -> Tensor:
    """The products of x float32 [R, K] with each weight, side by side: float32 [R, sum of N].

    Weights are numbers [N, K] of any floating dtype with `bits` 0, or codes uint8 [N, G, group * bits / 8] with scales
    float32 [N, G] and either no zeros or uint8 [N, ceil(G * bits / 8)] for each.
    """
    raise NotImplementedError("compiled code only")


@rows.register_fake
def _(x: Tensor, weights: Sequence[Tensor], scales: Any, zeros: Any, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


class _Products(CppTemplate):
    """One function, the same to the letter for weights of the same sizes."""

    def __init__(self, x: Any, weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> None:
        count, width = x.get_size()[0], sum(int(weight.get_size()[0]) for weight in weights)
        layout = ir.FixedLayout(x.get_device(), torch.float32, [count, width])
        super().__init__("rows", [x, *weights, *scales, *zeros], layout, num_threads=1)
        self.weights, self.scales, self.zeros, self.bits = weights, scales, zeros, bits

    def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
        x, y = self.input_nodes[0], template_buffer_node or self.output_node
        named = {f"{kind}{i}": node for kind, nodes in (("w", self.weights), ("s", self.scales), ("z", self.zeros))
                 for i, node in enumerate(nodes)}  # fmt: skip
        define = kernel.def_kernel(inputs={"x": x, **named}, outputs={"y": y})
        weights = ", ".join(self._weight(i) for i in range(len(self.weights)))
        width = int(self.layout.size[1])
        call = (
            f"precast::products<{self._columns}, {self._type}>(x, y, {kernel.size(x, 0)}, {width}, {{{weights}}});"
        )
        head = self.header().getvalue()
        return f'{head}\n{_HEADER.read_text()}\nextern "C" {define}\n{{\n{call}\n}}\n'

    @property
    def _columns(self) -> int:
        return int(self.input_nodes[0].get_size()[1])

    @property
    def _type(self) -> str:
        if not self.bits:
            return f"precast::Numbers<{DTYPE_TO_CPP[self.weights[0].get_dtype()]}, {self._columns}>"
        group = self._columns // int(self.scales[0].get_size()[1])
        return f"precast::Codes<{self._columns}, {group}, {self.bits}, {str(bool(self.zeros)).lower()}>"

    def _weight(self, i: int) -> str:
        outputs = int(self.weights[i].get_size()[0])
        if not self.bits:
            return f"{{w{i}, {outputs}}}"
        return f"{{{{w{i}, s{i}, {f'z{i}' if self.zeros else 'nullptr'}, {outputs}}}}}"


@register_lowering(torch.ops.precast.rows.default, type_promotion_kind=None)
def _lower(x: Any, weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> Any:
    whole = [[_whole(each) for each in nodes] for nodes in (weights, scales, zeros)]
    return _Products(_whole(x), *whole, bits).generate().output_node()


def _whole(node: Any) -> Any:
    """As a buffer of its own, laid out row by row."""
    found = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(node))
    is_inside = isinstance(found, ir.ReinterpretView) and found.layout.offset != 0
    return ir.ExternKernel.realize_input(ir.ExternKernel.copy_input(found)) if is_inside else found
