"""Quantized layers as QuantizeLinear and DequantizeLinear of the ONNX standard, which other runtimes read, too.

ONNX Runtime makes operators of its own of them again: MatMulNBits of weights that a DequantizeLinear with groups along
the first dimension hands to MatMul, and MatMulIntegerToFloat of two DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from precast.runtime.errors import ExportError

from .initializers import add_initializer
from .pack_projections import PackProjections
from .passes import RemoveProvenance

__all__ = ["WriteDequantized", "write_qdq"]

Array = np.ndarray[Any, Any]


def write_qdq(model: ir.Model) -> None:
    """Rewrite `model` in place. Raises ExportError where an operator is left that is not of the standard."""
    for each in (
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        PackProjections(),
        WriteDequantized(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        RemoveProvenance(),
        common.NameFixPass(),
    ):
        each(model)
    if foreign := sorted({f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain}):
        raise ExportError(
            f"format='qdq' writes standard operators alone, and {', '.join(foreign)} is none: format='kernels' has it."
        )


class WriteDequantized(ir.passes.InPlacePass):  # type: ignore[misc]
    """Replace ONNX Runtime's operators on quantized numbers by standard ones. Only MatMulNBits' own rounding of
    activations is left to the runtime."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace MatMulNBits, GatherBlockQuantized and MatMulIntegerToFloat."""
        weights = _Weights(model.graph)
        kinds: dict[str, Callable[[ir.Node, _Weights], list[ir.Node]]] = {
            "MatMulNBits": _write_linear,
            "MatMulIntegerToFloat": _write_int8_linear,
            "GatherBlockQuantized": _write_embedding,
        }
        found = [node for node in model.graph if node.op_type in kinds]
        # Embeddings last: one whose table an output embedding has, too, is stored as that has it.
        for node in sorted(found, key=lambda node: list(kinds).index(node.op_type)):
            _replace(model.graph, node, kinds[node.op_type](node, weights))
        return ir.passes.PassResult(model, bool(found))


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put `nodes`, the last of which has the result, in the place of a node."""
    graph.insert_before(node, nodes)
    before, result = node.outputs[0], nodes[-1].outputs[0]
    result.dtype, result.shape, result.name, before.name = before.dtype, before.shape, before.name, None
    before.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Weights:
    """The tensors of a graph as DequantizeLinear takes them; what several nodes read is stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._columns: dict[ir.Value, list[ir.Value]] = {}

    def by_columns(self, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, bits: int) -> list[ir.Value]:
        """Codes [K, N] and scales [G, N] of a weight [N, K], and zero points [G, N] where there are any."""
        if codes not in self._columns:
            parts = _unpack_weight(codes, scales, zeros, bits)
            self._columns[codes] = self._store(codes, [each.T for each in parts], bits)
        return self._columns[codes]

    def by_rows(self, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, bits: int) -> list[ir.Value]:
        """Codes [V, K], scales and zero points [V, G] of a table, the codes of 4 bits as they lie in bytes."""
        parts = _unpack_weight(codes, scales, zeros, bits)
        if bits == 8:
            return self._store(codes, parts, bits)
        points = parts[2] if len(parts) > 2 else np.full_like(parts[1], _middle(bits), np.uint8)
        others = [ir.tensor(parts[1], name=f"{codes.name}_scales"), ir.tensor(points, name=f"{codes.name}_zeros")]
        return [codes, *(add_initializer(self._graph, each) for each in others)]

    def copy_columns(self, codes: ir.Value) -> list[ir.Value]:
        """What `by_columns` stored of the same codes for another node, under other names; nothing if it did not.

        ONNX Runtime leaves a DequantizeLinear as it is where something else reads its codes, and tensors of the same
        bytes are one in the file.
        """
        mine = _array(codes).ravel()
        for other, stored in self._columns.items():
            if other.const_value.size == mine.size and np.array_equal(_array(other).ravel(), mine):
                tensors = [ir.Tensor(_array(each), each.dtype, name=f"{each.name}_table") for each in stored]
                return [add_initializer(self._graph, tensor) for tensor in tensors]
        return []

    def scalar(self, value: ir.Value) -> ir.Value:
        """A constant of one element, without dimensions."""
        return self.constant(_array(value).reshape(()))

    def constant(self, array: Any) -> ir.Value:
        """A small tensor, one for all that ask for the same."""
        array = np.asarray(array)
        name = f"qdq_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return add_initializer(self._graph, ir.tensor(array, name=name))

    def _store(self, codes: ir.Value, parts: list[Array], bits: int) -> list[ir.Value]:
        """Register codes, scales and zero points, if any; without zero points codes are numbers with a sign."""
        has_zeros = len(parts) > 2
        kind = ir.DataType[f"{'UINT' if has_zeros else 'INT'}{bits}"]
        shift = 0 if has_zeros else _middle(bits)
        tensors = [_pack(parts[0] ^ np.uint8(shift), kind, f"{codes.name}_{kind}")]
        tensors.append(ir.tensor(np.ascontiguousarray(parts[1]), name=f"{codes.name}_scales"))
        tensors += [_pack(each, kind, f"{codes.name}_zeros") for each in parts[2:]]
        return [add_initializer(self._graph, tensor) for tensor in tensors]


def _write_linear(node: ir.Node, weights: _Weights) -> list[ir.Node]:
    """`MatMulNBits`: groups of K, in the layout that ONNX Runtime makes the same operator of."""
    x, codes, scales, zeros, _, bias = _inputs(node, 6)
    bits, group, columns = (node.attributes[name].as_int() for name in ("bits", "block_size", "K"))
    stored, missing, nodes = weights.by_columns(codes, scales, zeros, bits), -columns % group, []
    if missing:
        padding = [x, weights.constant([0, missing]), None, weights.constant([-1])]
        nodes.append(ir.node("Pad", padding, name=f"{node.name}_padded"))
        x = nodes[0].outputs[0]
    nodes.append(ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": group}, name=f"{node.name}_weight"))
    return [*nodes, *_multiply(node, x, nodes[-1].outputs[0], bias)]


def _write_int8_linear(node: ir.Node, weights: _Weights) -> list[ir.Node]:
    """`MatMulIntegerToFloat`: what QuantizeLinear made of activations, and codes [K, N] with a scale per column."""
    rounded, codes, x_scale, scales, x_zero, _, bias = _inputs(node, 7)
    params = [weights.scalar(x_scale), weights.scalar(x_zero)]
    for index, value in enumerate(params, 1):
        rounded.producer().replace_input_with(index, value)
    x = ir.node("DequantizeLinear", [rounded, *params], name=f"{node.name}_activations")
    weight = ir.node("DequantizeLinear", [codes, scales], {"axis": 1}, name=f"{node.name}_weight")
    return [x, weight, *_multiply(node, x.outputs[0], weight.outputs[0], bias)]


def _multiply(node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> list[ir.Node]:
    product = ir.node("MatMul", [x, weight], name=f"{node.name}_product")
    product.outputs[0].dtype, product.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
    return [product] if bias is None else [product, ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_sum")]


def _write_embedding(node: ir.Node, weights: _Weights) -> list[ir.Node]:
    """`GatherBlockQuantized`: rows of codes and of their scales are looked up and multiplied. A DequantizeLinear would
    compute the whole table at every call."""
    codes, ids, scales, zeros = _inputs(node, 4)
    bits, group = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    # Codes of 4 bits cannot be looked up, bytes can.
    columns = weights.copy_columns(codes) if bits == 8 else []
    parts = columns or weights.by_rows(codes, scales, zeros, bits)
    build = _Builder(node.name or "embedding")
    rows = [_look_up(build, each, ids, by_columns=bool(columns)) for each in parts]
    if bits == 4:
        rows[0] = _split_bytes(build, rows[0], weights)
    front = [0] * len(ids.shape)
    values = build("Reshape", build("Cast", rows[0], to=_FLOAT), weights.constant([*front, -1, group]))
    last = weights.constant([-1])
    for points in rows[2:]:
        values = build("Sub", values, build("Unsqueeze", build("Cast", points, to=_FLOAT), last))
    values = build("Mul", values, build("Unsqueeze", rows[1], last))
    build("Reshape", values, weights.constant([*front, -1]))
    return build.nodes


_FLOAT = ir.DataType.FLOAT


class _Builder:
    """Makes nodes in turn, with names that begin alike."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, list[ir.Node]()

    def __call__(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The result of a new node."""
        self.nodes.append(ir.node(kind, inputs, attributes, name=f"{self.name}_{len(self.nodes)}"))
        return self.nodes[-1].outputs[0]


def _look_up(build: _Builder, table: ir.Value, ids: ir.Value, *, by_columns: bool) -> ir.Value:
    """[..., X] of a table [V, X], or [X, V] by columns."""
    found = build("Gather", table, ids, axis=int(by_columns))
    return build("Transpose", found, perm=[*range(1, len(ids.shape) + 1), 0]) if by_columns else found


def _split_bytes(build: _Builder, packed: ir.Value, weights: _Weights) -> ir.Value:
    """Bytes [..., X] -> codes of 4 bits [..., X, 2], low bits first."""
    low = build("BitwiseAnd", packed, weights.constant(np.uint8(15)))
    high = build("BitShift", packed, weights.constant(np.uint8(4)), direction="RIGHT")
    last = weights.constant([-1])
    return build("Concat", build("Unsqueeze", low, last), build("Unsqueeze", high, last), axis=-1)


def _inputs(node: ir.Node, count: int) -> list[Any]:
    """The inputs of a node, None for those that it does not have."""
    return [*node.inputs, *[None] * (count - len(node.inputs))]


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None, f"{value.name} is a weight"
    return np.asarray(value.const_value.numpy())


def _unpack_weight(codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, bits: int) -> list[Array]:
    """Codes uint8 [N, K], padding included, and scales [N, G]; zero points uint8 [N, G] where there are any."""
    steps = _array(scales)
    rows = len(steps)
    parts = [_unpack(_array(codes).reshape(rows, -1), bits), steps.reshape(rows, -1)]
    if zeros is not None:
        parts.append(_unpack(_array(zeros).reshape(rows, -1), bits)[:, : parts[1].shape[1]])
    return parts


def _unpack(packed: Array, bits: int) -> Array:
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def _pack(codes: Array, kind: ir.DataType, name: str) -> Any:
    """A tensor of numbers of 8 or 4 bits, from bytes that hold one each."""
    if kind.bitwidth == 8:
        return ir.Tensor(np.ascontiguousarray(codes).view(kind.numpy()), kind, name=name)
    flat = codes.ravel()
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return ir.PackedTensor(flat[0::2] | flat[1::2] << 4, kind, shape=codes.shape, name=name)


def _middle(bits: int) -> int:
    """The code of 0 where there are no zero points; the bit by which codes with a sign differ from those without."""
    return int(2 ** (bits - 1))
