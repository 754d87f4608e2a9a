"""Operators by what a lower precision does to them, and questions about nodes of a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

__all__ = [
    "CARRIERS",
    "FLOATS",
    "FLOAT32_OPERATORS",
    "MATMULS",
    "float_inputs",
    "is_float",
    "is_mutating",
    "is_quantized",
    "low_inputs",
    "operator_of",
]

aten: Any = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MATMULS = frozenset(
    {
        aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum,
        aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution,
        aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, aten.scaled_dot_product_attention,
    }
)  # fmt: skip
"""Matrix products and convolutions."""
CARRIERS = frozenset(
    {
        operator.getitem,
        aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
        aten.transpose, aten.permute, aten.t, aten.expand, aten.expand_as, aten.select, aten.slice, aten.narrow,
        aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.cat, aten.stack, aten.repeat,
        aten.repeat_interleave, aten.flip, aten.roll, aten.embedding, aten.gather, aten.index, aten.index_select,
        aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.constant_pad_nd, aten.pad,
    }
)  # fmt: skip
"""Operators that only move numbers, of any type."""
FLOAT32_OPERATORS = frozenset(
    {
        aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.logsumexp,
        aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.group_norm, aten.batch_norm, aten.instance_norm,
        aten.pow, aten.square, aten.mean, aten.var, aten.var_mean, aten.std, aten.rsqrt, aten.sum, aten.cumsum,
        aten.prod, aten.norm, aten.linalg_vector_norm, aten.exp, aten.log, aten.softplus,
    }
)  # fmt: skip
"""Norms, softmax and sums of many numbers."""


def operator_of(node: Node) -> Any:
    """The operator that a node calls, without its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_quantized(node: Node) -> bool:
    """Whether an operator's weights are codes; its scales are float32, and so it computes."""
    return str(operator_of(node)) in _OF_CODES


_OF_CODES = ("precast.quantized_linear", "precast.quantized_embedding", "precast.int8_linear")


def is_float(node: Any) -> bool:
    """Whether a node has a floating value, or one among several."""
    values = tree_leaves(node.meta.get("val")) if isinstance(node, Node) else []
    return any(isinstance(value, Tensor) and value.dtype in FLOATS for value in values)


def float_inputs(node: Node) -> list[Node]:
    """The inputs of a node that have floating values."""
    return [each for each in node.all_input_nodes if is_float(each)]


def low_inputs(node: Node) -> list[Node]:
    """The inputs that an operator of the cast type needs in it. Attention's scales, slopes and biases stay float32."""
    own = torch.ops.precast.cached_attention.default
    taken = node.args[:5] if node.target is own else None
    return [each for each in float_inputs(node) if taken is None or each in taken]


def is_mutating(node: Node) -> bool:
    """Whether an operator writes to its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
