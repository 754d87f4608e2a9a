"""Fold rotary position embedding into GroupQueryAttention, which saves two operators and a split per layer."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.convenience import extract

from precast.runtime.artifact.schema import Dim, Graph

from .initializers import add_initializer

__all__ = ["FoldRotary"]

Array = np.ndarray[Any, Any]
Tables: TypeAlias = tuple[ir.Value, ir.Value]


class FoldRotary(ir.passes.InPlacePass):  # type: ignore[misc]
    """Let the operator rotate queries and keys itself, by constant tables over all positions.

    The tables are computed by the graph itself for every position up to the capacity, so they contain whatever
    frequencies, scaling or partial rotation the model has. Angles that depend on more than the position are not folded.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the rotation of every attention whose queries and keys have the same angles."""
        tables: dict[tuple[str, str], Tables | None] = {}
        modified = False
        for node in list(model.graph):
            rotated = _find_rotation(node) if node.op_type == "GroupQueryAttention" else None
            if rotated is None or _head_size(node) % ROTATED_MULTIPLE:
                continue
            cos, sin = (_name(value) for value in rotated.inputs[2:4])
            if (cos, sin) not in tables:
                tables[cos, sin] = self._tabulate(model, rotated)
            if (found := tables[cos, sin]) is not None:
                _fold(node, rotated, found)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _tabulate(self, model: ir.Model, node: ir.Node) -> Tables | None:
        """cos and sin [capacity, D / 2] as initializers, or None where they depend on more than the position."""
        angles = _Angles(model, node, self._graph)
        if not angles.is_bounded:
            return None
        table = angles.tabulate()
        if not angles.matches(table):
            return None
        values = [ir.tensor(np.ascontiguousarray(each), name=_name(node.inputs[2 + index]) + "_table")
                  for index, each in enumerate(table)]  # fmt: skip
        return add_initializer(model.graph, values[0]), add_initializer(model.graph, values[1])


class _Angles:
    """The subgraph that computes the angles, run by itself."""

    def __init__(self, model: ir.Model, node: ir.Node, graph: Graph) -> None:
        self._graph, self.length = graph, graph.capacity if isinstance(graph.length, Dim) else graph.length
        inputs = list(model.graph.inputs[:2])
        self._names = [_name(value) for value in inputs]
        try:
            part = extract(model.graph, inputs, [value for value in node.inputs[1:4] if value is not None])
        except ValueError:
            self.is_bounded = False
            return
        self.is_bounded = True
        whole = ir.Model(part, ir_version=model.ir_version)
        self._session = onnxruntime.InferenceSession(
            ir.to_proto(whole).SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def compute(self, past: int, length: int, other_past: int = 0) -> Array:
        """cos and sin of the first slot's tokens, [2, length, D / 2], where it has `past` tokens in its cache and the
        others `other_past`."""
        lengths = np.array([past] + [other_past] * (self._graph.slots - 1), np.int32)
        given = {self._names[0]: np.zeros((len(lengths), length), np.int64), self._names[1]: lengths}
        wanted = {spec.name for spec in self._session.get_inputs()}
        found = self._session.run(None, {name: array for name, array in given.items() if name in wanted})
        positions, cos, sin = found
        return np.stack([cos[positions[0]], sin[positions[0]]])

    def tabulate(self) -> Array:
        """cos and sin of all positions: [2, capacity, D / 2]."""
        capacity = self._graph.capacity
        parts = [self.compute(past, self.length) for past in range(0, capacity, self.length)]
        return np.concatenate(parts, axis=1)[:, :capacity]

    def matches(self, table: Array) -> bool:
        """Whether single tokens have the angles of `table` as well, at first, second and last position, beside slots
        with another past."""
        length = 1 if isinstance(self._graph.length, Dim) else self.length
        last = self._graph.capacity - length
        return all(
            np.allclose(self.compute(past, length, last), table[:, past : past + length], rtol=0, atol=SAME)
            for past in {0, min(1, last), last}
        )


SAME = 1e-6
"""Tolerance of a cosine: vector and scalar code may differ in the last bit."""


ROTATED_MULTIPLE = 16
"""GroupQueryAttention rotates head sizes in multiples of this only, though it attends with multiples of 8."""


def _head_size(node: ir.Node) -> int:
    """The head size of an attention, read off its caches [B, Hkv, C, D]."""
    shape = node.inputs[3].shape if node.inputs[3] is not None else None
    assert shape is not None, "caches are inputs of the graph, whose sizes are known"
    return int(shape[3])


def _find_rotation(node: ir.Node) -> ir.Node | None:
    """The RotaryEmbedding node of the queries, if the keys' has the same angles."""
    query, key = (value.producer() if value is not None else None for value in node.inputs[:2])
    if query is None or key is None or {query.op_type, key.op_type} != {"RotaryEmbedding"}:
        return None
    same = all(one is other for one, other in zip(query.inputs[1:4], key.inputs[1:4], strict=True))
    return query if same and _is_interleaved(query) == _is_interleaved(key) else None


def _is_interleaved(node: ir.Node) -> int:
    attribute = node.attributes.get("interleaved")
    return attribute.as_int() if attribute is not None else 0


def _fold(node: ir.Node, rotated: ir.Node, tables: Tables) -> None:
    query, key, value = (rotated.inputs[0], node.inputs[1].producer().inputs[0], node.inputs[2])
    split = query.producer() if query is not None else None
    if split is not None and split.op_type == "Split" and list(split.outputs) == [query, key, value]:
        query, key, value = split.inputs[0], None, None
    for index, each in enumerate((query, key, value)):
        node.replace_input_with(index, each)
    node.resize_inputs(max(9, len(node.inputs)))
    for index, table in enumerate(tables):
        node.replace_input_with(7 + index, table)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", _is_interleaved(rotated))


def _name(value: ir.Value | None) -> str:
    name = value.name if value is not None else None
    assert name is not None, "every value has a name"
    return str(name)
