"""What the nodes of a graph write to."""

from __future__ import annotations

from torch import fx

__all__ = ["memory_of", "mutated_arguments"]


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = dict(zip((each.name for each in schema.arguments), node.args, strict=False), **node.kwargs)
    return [named[each.name] for each in schema.arguments if each.is_write and each.name in named]


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory a node is a view of, or itself."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.args[0]  # type: ignore[assignment]
    return node
