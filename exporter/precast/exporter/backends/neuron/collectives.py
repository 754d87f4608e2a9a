"""Collectives between ranks, each of which is a NeuronCore, in terms of what NxD has: the sum and the concatenation
over all cores, and weights of which each core has its own value.

Groups of fewer cores are not needed: where several ranks hold the same part, one of each gives it and the others zeros,
or what the others give is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...operators import collectives  # noqa: F401  (registers the operators that are lowered here)

__all__ = ["COLLECTIVES", "add_collective", "call_collectives", "reads_rank"]

_ATEN: Any = torch.ops.aten
_REDUCE = torch.ops.precast.all_reduce.default
_GATHER = torch.ops.precast.all_gather.default
_NUMBER = torch.ops.precast.rank_number.default
COLLECTIVES = frozenset({_REDUCE, _GATHER, _NUMBER})


def reads_rank(node: fx.Node) -> bool:
    """Whether a node computes something else on every rank, by the rank's number."""
    return node.target is _NUMBER or (node.target is _REDUCE and _sizes(node)[1] > 1)


def _sizes(node: fx.Node) -> tuple[int, int]:
    """How many ranks take part in a collective, and how many of them have the same part."""
    ranks, copies = node.args[1:]
    return cast(int, ranks), cast(int, copies)


def add_collective(graph: fx.Graph, node: fx.Node, x: fx.Node, rank: fx.Node | None) -> fx.Node:
    """Add a collective of another graph, over all ranks. `x` is its argument here, and `rank`, int32 [1], the number of
    the rank, which those that `reads_rank` need."""
    if node.target is _NUMBER:
        return graph.call_function(_ATEN._to_copy.default, (rank,), {"dtype": torch.int64})
    ranks, copies = _sizes(node)
    if node.target is _REDUCE:
        if copies > 1:
            place = graph.call_function(_ATEN.remainder.Scalar, (rank, copies))
            counts = graph.call_function(_ATEN.eq.Scalar, (place, 0))
            x = graph.call_function(_ATEN.where.ScalarOther, (counts, x, 0))
        return graph.call_function(_REDUCE, (x, ranks, 1))
    gathered = graph.call_function(_GATHER, (x, ranks, 1))
    return gathered if copies == 1 else _select_different(graph, node, gathered)


def _select_different(graph: fx.Graph, node: fx.Node, gathered: fx.Node) -> fx.Node:
    """One of each part, of what all ranks gave, [..., n * ranks] -> [..., n * ranks / copies]."""
    ranks, copies = _sizes(node)
    *rows, width = node.meta["val"].shape
    parts = ranks // copies
    apart = graph.call_function(_ATEN.reshape.default, (gathered, [*rows, parts, copies, width // parts]))
    first = graph.call_function(_ATEN.select.int, (apart, -2, 0))
    return graph.call_function(_ATEN.reshape.default, (first, [*rows, width]))


def call_collectives(
    module: fx.GraphModule, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]
) -> fx.GraphModule:
    """The module with NxD's functions in the place of our operators."""
    functions: Mapping[Any, Callable[[Tensor], Tensor]] = {_REDUCE: reduce, _GATHER: gather}
    for node in module.graph.nodes:
        if node.target in functions:
            node.target, node.args = functions[node.target], node.args[:1]
    module.recompile()
    return module
