"""Rewrites a program to the cast type: inserts casts, and casts weights, the example and the description."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from precast.runtime.artifact.schema import Graph

from ..kinds.trace import Program
from .analysis import Analysis, Precision, WeightKey, weight_key
from .operators import FLOATS, aten, float_inputs, low_inputs

__all__ = ["Rewrite"]


class Rewrite:
    """One program's rewrite. `stored` holds the cast weights of all programs, by the keys of the original ones."""

    def __init__(self, analysis: Analysis, low_weights: set[WeightKey], stored: dict[WeightKey, Tensor]) -> None:
        self._analysis, self._low_weights, self._stored = analysis, low_weights, stored
        self._exported, self._graph, self._cast = analysis.exported, analysis.graph, analysis.cast
        # Nodes whose floating values are of the cast type, and casts that were inserted.
        self._low: set[Node] = set()
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}

    def apply(self) -> Program:
        """Rewrite the graph, its weights, its example and its description."""
        graph, shared = self._exported.graph, self._analysis.shared_inputs()
        for node, precision in [(node, self._analysis.precision_of(node)) for node in graph.nodes]:
            if node.op == "placeholder":
                if node.name in shared or self._store_low(node):
                    self._mark_low(node)
            elif node.target is aten._assert_tensor_metadata.default:
                # It asserts the type that was traced.
                graph.erase_node(node)
            elif node.op != "output":
                self._rewrite_node(node, precision)
        self._rewrite_outputs()
        self._cast_example(shared)
        graph.lint()
        self._exported.graph_module.recompile()
        return Program(self._describe(), self._exported)

    def _store_low(self, node: Node) -> bool:
        """Store a placeholder's weight in the cast type if it is one of the low weights; returns whether it is."""
        target = self._analysis.weights.get(node.name)
        key = None if target is None else weight_key(self._analysis.tensor(node.name))
        if target is None or key is None or key not in self._low_weights:
            return False
        if key not in self._stored:
            cast_weight = self._analysis.tensor(node.name).detach().to(self._cast.dtype)
            self._stored[key] = torch.nn.Parameter(cast_weight, requires_grad=False)
        place: Any = self._exported.state_dict if target in self._exported.state_dict else self._exported.constants
        place[target] = self._stored[key]
        return True

    def _rewrite_node(self, node: Node, precision: Precision) -> None:
        inputs = float_inputs(node)
        if precision == "any":
            lows = [each for each in inputs if each in self._low]
            is_low = lows and (len(lows) == len(inputs) or self._cast.scope != "matmul")
            precision = "low" if is_low else "float32"
        if precision == "low":
            for each in low_inputs(node):
                node.replace_input_with(each, self._to_low(each, node))
            node.args, node.kwargs = tree_map(self._clamp_to_range, (node.args, node.kwargs))
            self._mark_low(node)
        else:
            for each in inputs:
                node.replace_input_with(each, self._to_float32(each, node))

    def _mark_low(self, node: Node) -> None:
        self._low.add(node)
        node.meta["val"] = tree_map(lambda value: _with_dtype(value, self._cast.dtype), node.meta["val"])

    def _to_low(self, node: Node, user: Node) -> Node:
        if node in self._low:
            return node
        if node in self._analysis.activations or (node, self._cast.dtype) in self._casts:
            return self._insert_cast(node, self._cast.dtype, user)
        bound = self._clamp_to_range(math.inf)
        with user.graph.inserting_before(user):
            clamped = user.graph.call_function(aten.clamp.default, (node, -bound, bound))
        clamped.meta["val"] = node.meta["val"]
        self._casts[node, self._cast.dtype] = found = self._insert_cast(clamped, self._cast.dtype, user)
        return found

    def _clamp_to_range(self, value: Any) -> Any:
        """Clamp to half the cast type's range: a mask's lowest float32 would become infinite, and sums of infinities
        NaN."""
        bound = torch.finfo(self._cast.dtype).max / 2
        return max(-bound, min(bound, value)) if isinstance(value, float) else value

    def _to_float32(self, node: Node, user: Node) -> Node:
        return self._insert_cast(node, torch.float32, user) if node in self._low else node

    def _insert_cast(self, node: Node, dtype: torch.dtype, user: Node) -> Node:
        if (node, dtype) not in self._casts:
            with user.graph.inserting_before(user):
                made = user.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
            made.meta["val"] = _with_dtype(node.meta["val"], dtype)
            self._casts[node, dtype] = made
        return self._casts[node, dtype]

    def _rewrite_outputs(self) -> None:
        """Return results in float32, shared values in the cast type."""
        output = self._exported.graph.output_node()
        specs = self._exported.graph_signature.output_specs
        results = [index for index, spec in enumerate(specs) if spec.kind == OutputKind.USER_OUTPUT]
        found = list(output.args[0])
        for index, spec in zip(results, self._graph.outputs, strict=True):
            convert = self._to_low if spec.name in self._analysis.shared else self._to_float32
            found[index] = convert(found[index], output)
            specs[index].arg = TensorArgument(name=found[index].name)
        output.args = (tuple(found),)

    def _cast_example(self, shared: set[str]) -> None:
        flat, spec = tree_flatten(self._exported.example_inputs)
        names = self._exported.graph_signature.user_inputs
        cast = [each.to(self._cast.dtype) if name in shared else each for name, each in zip(names, flat, strict=True)]
        self._exported.example_inputs = tree_unflatten(cast, spec)

    def _describe(self) -> Graph:
        changed: dict[str, list[Any]] = {
            "inputs": [self._with_low_dtype(each, each.name) for each in self._graph.inputs],
            "outputs": [self._with_low_dtype(each, each.name) for each in self._graph.outputs],
            "cache": [self._with_low_dtype(each, each.key_in) for each in self._graph.cache],
        }
        return msgspec.structs.replace(self._graph, **changed)

    def _with_low_dtype(self, spec: Any, name: str) -> Any:
        return msgspec.structs.replace(spec, dtype=self._cast.name) if name in self._analysis.shared else spec


def _with_dtype(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.to(dtype)
