"""Calls of layers that are compiled by themselves: the operator, and the function that Inductor writes for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

from .kernel_template import KernelTemplate, number_names, pointer_names, realize_contiguous

__all__ = ["can_be_given", "layer"]

MAX_DIMS = 8
"""Of a tensor that libraries are given, as in cpp/array.h."""

_DTYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
"""PyTorch's own numbers of dtypes (c10/core/ScalarType.h)."""


def can_be_given(value: Tensor) -> bool:
    """Whether libraries can be given tensors of this dtype with as many dimensions."""
    return value.dtype in _DTYPES and value.dim() <= MAX_DIMS


@torch.library.custom_op("precast::layer", mutates_args=())
def layer(inputs: Sequence[Tensor], name: str) -> Tensor:
    """What the layer called `name` makes of dense tensors, like the first of them. It may write to others, its caches,
    which nothing else reads: each call needs what the one before returned, and so comes after it."""
    raise NotImplementedError("in compiled code only")


@layer.register_fake
def _(inputs: Sequence[Tensor], name: str) -> Tensor:
    return torch.empty_like(inputs[0])


@register_lowering(torch.ops.precast.layer.default, type_promotion_kind=None)
def _lower(inputs: list[Any], name: str) -> Any:
    given = number_names(x=[realize_contiguous(node) for node in inputs])
    arrays = [_array(pointer, given[key], key) for key, pointer in pointer_names(given).items()]
    body = (
        f"const PrecastArray inputs[] = {{{', '.join(arrays)}}}, output = {_array('y', given['x0'], 'x0')};\n"
        f"{name}(inputs, {len(arrays)}, output);"
    )
    declaration = f'extern "C" void {name}(const PrecastArray*, size_t, const PrecastArray&);'
    first = given["x0"]
    return KernelTemplate(
        given, first.get_size(), body, ["array.h"], dtype=first.get_dtype(), declarations=declaration
    ).make_node()


def _array(pointer: str, node: Any, name: str) -> str:
    """The C++ text of an array like the input `name`."""
    sizes = ", ".join(f"{{{name}:{dimension}}}" for dimension in range(len(node.get_size())))
    return f"precast::dense({pointer}, {_DTYPES[node.get_dtype()]}, {{{sizes}}})"
