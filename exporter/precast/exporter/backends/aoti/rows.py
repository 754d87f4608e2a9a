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
def rows(
    xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor], bits: int
) -> Tensor:
    """The products of each x float32 [R, K] with its weight, [R, N], one behind the other: float32 [R * sum of N].

    Weights are numbers [N, K] of one floating dtype with `bits` 0, or codes uint8 [N, G, group * bits / 8] with scales
    float32 [N, G] and either no zeros or uint8 [N, ceil(G * bits / 8)] for each.
    """
    raise NotImplementedError("compiled code only")


@rows.register_fake
def _(xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Any, zeros: Any, bits: int) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0] * sum(weight.shape[0] for weight in weights))


class _Products(CppTemplate):
    """One function, the same to the letter for weights of the same sizes."""

    def __init__(self, xs: list[Any], weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> None:
        size = xs[0].get_size()[0] * sum(int(weight.get_size()[0]) for weight in weights)
        layout = ir.FixedLayout(xs[0].get_device(), torch.float32, [size])
        super().__init__("rows", [*_once(xs), *weights, *scales, *zeros], layout, num_threads=1)
        self.xs, self.weights, self.scales, self.zeros, self.bits = xs, weights, scales, zeros, bits

    def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
        kinds = {"x": _once(self.xs), "w": self.weights, "s": self.scales, "z": self.zeros}
        inputs = {f"{kind}{i}": node for kind, nodes in kinds.items() for i, node in enumerate(nodes)}
        define = kernel.def_kernel(inputs=inputs, outputs={"y": template_buffer_node or self.output_node})
        layers = ", ".join(self._layer(i) for i in range(len(self.weights)))
        count = kernel.size(self.xs[0], 0)
        call = f"precast::products<{self._columns}, {self._type}>(y, {count}, {{{layers}}});"
        return f'{self.header().getvalue()}\n{_HEADER.read_text()}\nextern "C" {define}\n{{\n{call}\n}}\n'

    @property
    def _columns(self) -> int:
        return int(self.xs[0].get_size()[1])

    @property
    def _type(self) -> str:
        if not self.bits:
            return f"precast::Numbers<{DTYPE_TO_CPP[self.weights[0].get_dtype()]}, {self._columns}>"
        group = self._columns // int(self.scales[0].get_size()[1])
        return f"precast::Codes<{self._columns}, {group}, {self.bits}, {str(bool(self.zeros)).lower()}>"

    def _layer(self, i: int) -> str:
        x, outputs = f"x{_names(_once(self.xs)).index(self.xs[i].get_name())}", int(self.weights[i].get_size()[0])
        if not self.bits:
            return f"{{{x}, {{w{i}, {outputs}}}}}"
        return f"{{{x}, {{{{w{i}, s{i}, {f'z{i}' if self.zeros else 'nullptr'}, {outputs}}}}}}}"


def _names(nodes: list[Any]) -> list[str]:
    return [node.get_name() for node in nodes]


def _once(nodes: list[Any]) -> list[Any]:
    """Without those that came before."""
    return list({node.get_name(): node for node in nodes}.values())


@register_lowering(torch.ops.precast.rows.default, type_promotion_kind=None)
def _lower(xs: list[Any], weights: list[Any], scales: list[Any], zeros: list[Any], bits: int) -> Any:
    whole = [[_whole(each) for each in nodes] for nodes in (xs, weights, scales, zeros)]
    return _Products(*whole, bits).generate().output_node()


def _whole(node: Any) -> Any:
    """As a buffer of its own, laid out row by row."""
    found = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(node))
    is_inside = isinstance(found, ir.ReinterpretView) and found.layout.offset != 0
    return ir.ExternKernel.realize_input(ir.ExternKernel.copy_input(found)) if is_inside else found
