"""Kernels of our own (cpp/*.h) within the library that Inductor writes: functions that call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# First: torch's modules import each other in a circle that opens from here only.
import torch._inductor.lowering
from torch._inductor import ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

__all__ = ["KernelTemplate", "cpp_type", "number_names", "pointer_names", "realize_contiguous"]

_SOURCES = Path(__file__).parent / "cpp"
_SIZE = re.compile(r"\{(\w+):(\d)\}")


class KernelTemplate(CppTemplate):
    """A C++ function of named `inputs` that fills a new tensor `y` of `size` by the statements `body`.

    `{x:0}` in them stands for the size of the input `x` in its first dimension, which may be known at run time only.
    Functions with the same text are merged.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        size: Sequence[Any],
        body: str,
        headers: Sequence[str],
        dtype: torch.dtype = torch.float32,
        declarations: str = "",
    ) -> None:
        first = next(iter(inputs.values()))
        super().__init__("own", list(inputs.values()), ir.FixedLayout(first.get_device(), dtype, size), 1)
        self.inputs, self.body, self.headers, self.declarations = inputs, body, headers, declarations

    def render(self, kernel: Any, template_buffer_node: Any = None, **_: Any) -> str:  # type: ignore[override]
        pointers = pointer_names(self.inputs)
        given = {name: node for name, node in self.inputs.items() if pointers[name] == name}
        define = kernel.def_kernel(inputs=given, outputs={"y": template_buffer_node or self.output_node})
        body = _SIZE.sub(lambda found: kernel.size(self.inputs[found[1]], int(found[2])), self.body)
        texts = [self.header().getvalue(), *((_SOURCES / each).read_text() for each in self.headers), self.declarations]
        return "\n".join([*texts, f'extern "C" {define}\n{{\n{body}\n}}\n'])

    def make_node(self) -> Any:
        """The node of the call, for a lowering to return."""
        generate: Any = self.generate
        return generate().output_node()


def pointer_names(inputs: Mapping[str, Any]) -> dict[str, str]:
    """The parameter of the function for each input: the first one's for all that are views of one buffer."""
    first: dict[str, str] = {}
    return {name: first.setdefault(node.get_name(), name) for name, node in inputs.items()}


def number_names(**kinds: Sequence[Any]) -> dict[str, Any]:
    """x=[a, b] -> {"x0": a, "x1": b}."""
    return {f"{kind}{i}": node for kind, nodes in kinds.items() for i, node in enumerate(nodes)}


def cpp_type(node: Any) -> str:
    """The C++ name of a node's dtype."""
    return str(DTYPE_TO_CPP[node.get_dtype()])


def realize_contiguous(node: Any) -> Any:
    """Compute a node into a contiguous buffer that begins at its own first element."""
    found = ir.ExternKernel.realize_input(ir.ExternKernel.require_contiguous(node))
    is_inside = isinstance(found, ir.ReinterpretView) and found.layout.offset != 0
    return ir.ExternKernel.realize_input(ir.ExternKernel.copy_input(found)) if is_inside else found
