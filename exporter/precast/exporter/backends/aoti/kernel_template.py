"""Kernels of our own (cpp/*.h) within the library that inductor makes: functions that call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

__all__ = ["Calling", "named", "type_of", "whole"]

_SOURCES = Path(__file__).parent / "cpp"


class Calling(CppTemplate):
    """A function of `inputs` by name that fills a new tensor `y` of `size` by the C++ statement `call`.

    In it `{count}` stands for the size of a dimension that may be known at run time only, `count`: an input's name and
    the dimension. Functions of the same text are one.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        size: Sequence[Any],
        call: str,
        headers: Sequence[str],
        count: tuple[str, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        first = next(iter(inputs.values()))
        super().__init__("own", list(inputs.values()), ir.FixedLayout(first.get_device(), dtype, size), 1)
        self.inputs, self.call, self.headers, self.count = inputs, call, headers, count

    def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
        define = kernel.def_kernel(inputs=dict(self.inputs), outputs={"y": template_buffer_node or self.output_node})
        name, dimension = self.count
        call = self.call.replace("{count}", kernel.size(self.inputs[name], dimension))
        texts = [self.header().getvalue(), *((_SOURCES / each).read_text() for each in self.headers)]
        return "\n".join([*texts, f'extern "C" {define}\n{{\n{call}\n}}\n'])

    def output(self) -> Any:
        """What a lowering returns."""
        generate: Any = self.generate
        return generate().output_node()


def named(**kinds: Sequence[Any]) -> dict[str, Any]:
    """x=[a, b] as x0 and x1."""
    return {f"{kind}{i}": node for kind, nodes in kinds.items() for i, node in enumerate(nodes)}


def type_of(node: Any) -> str:
    """In C++."""
    return str(DTYPE_TO_CPP[node.get_dtype()])


def whole(node: Any) -> Any:
    """As a buffer of its own, laid out row by row."""
    found = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(node))
    is_inside = isinstance(found, ir.ReinterpretView) and found.layout.offset != 0
    return ir.ExternKernel.realize_input(ir.ExternKernel.copy_input(found)) if is_inside else found
