"""Attention that a model writes as two matrix products with a softmax in between, as one call of our kernel.

Encoders are traced with transformers' eager attention, which every type has. Their scores would be written to memory
and read three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .mutation import mutated_arguments

__all__ = ["fuse_attention"]

_ATEN = torch.ops.aten
_SOFTMAX = (_ATEN.softmax.int, _ATEN._softmax.default)
_SAME_VALUES = (
    _ATEN.to.dtype, _ATEN._to_copy.default, _ATEN.type_as.default, _ATEN.contiguous.default, _ATEN.clone.default,
)  # fmt: skip
_DROPOUT = _ATEN.dropout.default
MAX_WIDTH = 512
"""Of heads. Threads keep blocks of queries, keys and values of such widths."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Scores:
    """What a softmax is taken of: `query @ keys * scale`, and biases, each times a number. `product` is the node of the
    first of these."""

    product: fx.Node
    scale: float
    biases: list[tuple[fx.Node, float]] = field(default_factory=list)

    @property
    def query(self) -> fx.Node:
        return self.product.args[0]  # type: ignore[return-value]

    @property
    def keys(self) -> fx.Node:
        """[B, H, D, L]."""
        return self.product.args[1]  # type: ignore[return-value]


def fuse_attention(module: fx.GraphModule) -> None:
    """Replace attention of several heads in a graph of ATen's operators. Whatever is written otherwise, or is read by
    others, stays as it is."""
    for node in list(module.graph.nodes):
        if node.target is _ATEN.matmul.default and (softmax := _find_softmax(node.args[0])) is not None:
            scores = _read_scores(softmax.args[0])
            if scores is not None and _fits(scores, node) and not _is_written_between(scores.product, node):
                _replace(node, scores)
    module.recompile()


def _find_softmax(node: Any) -> fx.Node | None:
    """The softmax over the last dimension that a product's first factor is, and nobody else reads."""
    while isinstance(node, fx.Node) and len(_readers(node)) == 1:
        if node.target in _SOFTMAX:
            return node if node.args[1] in (-1, _value(node).ndim - 1) else None
        if not _keeps_values(node):
            return None
        node = node.args[0]
    return None


def _read_scores(node: Any, scale: float = 1.0) -> _Scores | None:
    """Read scores from their end to the product that they begin with; `scale` is of what comes after `node`."""
    if not isinstance(node, fx.Node) or len(_readers(node)) != 1:
        return None
    if node.target is _ATEN.matmul.default:
        return _Scores(node, scale)
    if _keeps_values(node):
        return _read_scores(node.args[0], scale)
    read = _READ.get(node.target)
    return read(*node.args, scale) if read and len(node.args) == 2 and not node.kwargs else None


def _read_sum(one: Any, other: Any, scale: float) -> _Scores | None:
    return _read_biased(one, other, scale) or _read_biased(other, one, scale)


def _read_biased(scores: Any, bias: Any, scale: float) -> _Scores | None:
    is_bias = isinstance(bias, fx.Node) and isinstance(_value(bias), Tensor) and _value(bias).dtype in _FLOATS
    found = _read_scores(scores, scale) if is_bias else None
    if found is not None:
        found.biases.append((bias, scale))
    return found


def _read_product(scores: Any, factor: Any, scale: float) -> _Scores | None:
    return _read_scores(scores, scale * factor) if isinstance(factor, int | float) else None


def _read_quotient(scores: Any, divisor: Any, scale: float) -> _Scores | None:
    return _read_scores(scores, scale / divisor) if isinstance(divisor, int | float) else None


_READ: dict[Any, Callable[..., _Scores | None]] = {
    _ATEN.add.Tensor: _read_sum,
    # Others may read what it writes to, unless that is the scores.
    _ATEN.add_.Tensor: _read_biased,
    _ATEN.mul.Tensor: _read_product,
    _ATEN.mul_.Tensor: _read_product,
    _ATEN.div.Tensor: _read_quotient,
    _ATEN.div_.Tensor: _read_quotient,
}


def _keeps_values(node: fx.Node) -> bool:
    """Whether a node's result is its first argument, but for the dtype."""
    if node.target is _DROPOUT:
        return node.args[2] is False
    return node.target in _SAME_VALUES and _value(node).dtype in _FLOATS


def _readers(node: fx.Node) -> list[fx.Node]:
    """Those who read more of a node than its dtype."""
    return [each for each in node.users if not (each.target is _ATEN.type_as.default and each.args[0] is not node)]


def _fits(scores: _Scores, node: fx.Node) -> bool:
    """Whether the kernel takes queries, keys and values [B, H, S or L, D], and biases are broadcast to scores."""
    query, keys, values = (_value(each) for each in (scores.query, scores.keys, node.args[1]))
    if any(each.ndim != 4 or each.dtype not in _FLOATS for each in (query, keys, values)) or keys.dtype != values.dtype:
        return False
    # These are constants of the kernel's code. One query is faster in loops than in a tile of which one row is used.
    fixed = (query.shape[1], query.shape[3], values.shape[3])
    if not all(isinstance(size, int) and size <= MAX_WIDTH for size in fixed) or _is_equal(query.shape[2], 1):
        return False
    shared = [(query.shape[0], each.shape[0]) for each in (keys, values)]
    shared += [(query.shape[1], each.shape[1]) for each in (keys, values)]
    return all(map(_is_equal, *zip(*shared, (keys.shape[3], values.shape[2]), strict=True))) and all(
        _is_broadcast(_value(bias), (*query.shape[:3], keys.shape[3])) for bias, _ in scores.biases
    )


def _is_written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether something but the scores is written to from one product to the other: it may be what these are computed
    from, which the kernel reads in the place of the other."""
    scores, node = {first}, first.next
    while node is not last:
        if scores.intersection(node.all_input_nodes):
            scores.add(node)
        if not scores.issuperset(mutated_arguments(node)):
            return True
        node = node.next
    return False


def _is_broadcast(bias: Tensor, full: tuple[Any, ...]) -> bool:
    """Whether a bias is broadcast to scores, along any dimension but the last."""
    if bias.ndim != len(full) or not _is_equal(bias.shape[-1], full[-1]):
        return False
    return all(_is_equal(size, 1) or _is_equal(size, most) for size, most in zip(bias.shape, full, strict=True))


def _is_equal(size: Any, other: Any) -> bool:
    return bool(statically_known_true(size == other))


def _replace(node: fx.Node, scores: _Scores) -> None:
    dtype = _value(node).dtype
    with node.graph.inserting_before(node):
        query = _make(_ATEN.mul.Tensor, _as_float32(scores.query), scores.scale)
        keys = _make(_ATEN.transpose.int, scores.keys, 2, 3)
        bias = (
            reduce(partial(_make, _ATEN.add.Tensor), map(_make_bias, reversed(scores.biases)))
            if scores.biases
            else None
        )
        product = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        found = _make(torch.ops.precast.attention.default, query, keys, node.args[1], bias, product)
        result = _make(_ATEN.to.dtype, _make(_ATEN.transpose.int, found, 1, 2), dtype)
        if any(each.target is _ATEN.view.default for each in node.users):
            result = _make(_ATEN.contiguous.default, result)
        node.replace_all_uses_with(result)
    _erase_unread(node)


def _erase_unread(node: fx.Node) -> None:
    """Erase what is read no more: torch.fx keeps what is random or writes to its argument, as dropout and `+=` do."""
    unread = {node}
    while unread:
        each = unread.pop()
        if not each.users and each.op == "call_function":
            unread.update(each.all_input_nodes)
            each.graph.erase_node(each)


def _value(node: Any) -> Any:
    return node.meta["val"]


def _make_bias(given: tuple[fx.Node, float]) -> fx.Node:
    bias, scale = given
    return _as_float32(bias) if scale == 1 else _make(_ATEN.mul.Tensor, _as_float32(bias), scale)


def _as_float32(node: fx.Node) -> fx.Node:
    return node if _value(node).dtype == torch.float32 else _make(_ATEN.to.dtype, node, torch.float32)


def _make(target: Any, *args: Any) -> fx.Node:
    """A new node, with what is known of its result."""
    graph = next(each for each in args if isinstance(each, fx.Node)).graph
    made = graph.call_function(target, args)
    made.meta["val"] = target(*fx.node.map_arg(args, _value))
    return made
