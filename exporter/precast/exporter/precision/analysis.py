"""Analysis of a program: the operators and weights that get the cast type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from precast.runtime.artifact.schema import Dtype

from ..kinds.trace import Program, functional
from .operators import (
    CARRIERS,
    FLOAT32_OPERATORS,
    MATMULS,
    float_inputs,
    is_float,
    is_mutating,
    is_quantized,
    low_inputs,
    operator_of,
)

__all__ = ["Analysis", "Cast", "Precision", "WeightKey", "weight_key"]

WeightKey: TypeAlias = tuple[Any, ...]
Precision: TypeAlias = Literal["low", "float32", "any"]
"""An operator's type: the cast type, float32, or that of its inputs."""


@dataclass(frozen=True)
class Cast:
    """A cast of programs to `dtype`. Its `scope`: "matmul", matrix products and convolutions only; "all", everything
    but norms, softmax and sums of many numbers; "weights", as "all", and every parameter is stored in it."""

    scope: Literal["matmul", "all", "weights"]
    dtype: torch.dtype

    @property
    def name(self) -> Dtype:
        found: Dtype = str(self.dtype).removeprefix("torch.")  # type: ignore[assignment]
        return found


class Analysis:
    """Finds, for one program, the operators that compute in the cast type and the weights that they read.

    `shared` are names of inputs and outputs that graphs pass to each other in the cast type.
    """

    def __init__(self, program: Program, cast: Cast, shared: frozenset[str]) -> None:
        exported = program.exported
        if any(is_mutating(node) for node in exported.graph.nodes):
            # A cast makes a copy, and a write to a copy would be lost.
            exported = functional(exported)
        self.exported, self.graph, self.cast, self.shared = exported, program.graph, cast, shared
        self.weights = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target}
        self.activations = self._find_activations()
        self._candidates = self._low_precision_candidates()

    def precision_of(self, node: Node) -> Precision:
        """The type that a node computes in."""
        if node.op != "call_function":
            return "float32"
        if operator_of(node) in CARRIERS:
            return "any"
        is_low = operator_of(node) in MATMULS if self.cast.scope == "matmul" else node in self._candidates
        return "low" if is_low and is_float(node) else "float32"

    def low_weights(self) -> Iterator[WeightKey]:
        """The keys of all weights that an operator of the cast type reads, directly or through carriers."""
        if self.cast.scope == "weights":
            yield from (weight_key(self.tensor(name)) for name in self.exported.graph_signature.inputs_to_parameters)
        for node in self.exported.graph.nodes:
            if self.precision_of(node) == "low":
                for weight in self._weights_behind(low_inputs(node)):
                    yield weight_key(self.tensor(weight.name))

    def tensor(self, name: str) -> Tensor:
        """The weight of a placeholder."""
        target = self.weights[name]
        found: Tensor | None = self.exported.state_dict.get(target)
        return self.exported.constants[target] if found is None else found

    def shared_inputs(self) -> set[str]:
        """The placeholders of shared inputs."""
        pairs = zip(self.exported.graph_signature.user_inputs, self.graph.inputs, strict=True)
        return {str(placeholder) for placeholder, spec in pairs if spec.name in self.shared}

    def _find_activations(self) -> set[Node]:
        """Values that depend on a parameter or on a floating input. All others (positions, angles, masks) are made of
        integers, which the cast types cannot represent exactly."""
        kinds = (InputKind.PARAMETER, InputKind.USER_INPUT)
        names = {each.arg.name for each in self.exported.graph_signature.input_specs if each.kind in kinds}
        found: set[Node] = set()
        for node in self.exported.graph.nodes:
            is_source = node.op == "placeholder" and node.name in names and is_float(node)
            if is_source or any(each in found and is_float(each) for each in node.all_input_nodes):
                found.add(node)
        return found

    def _low_precision_candidates(self) -> set[Node]:
        """For scopes beyond "matmul": values that depend on a parameter, a matrix product or a cache without float32 in
        between, so that what a model itself computes in float32 (a norm's variance, say) stays so to its end."""
        names = {*self.exported.graph_signature.inputs_to_parameters, *self.shared_inputs()}
        found: set[Node] = set()
        for node in self.exported.graph.nodes if self.cast.scope != "matmul" else ():
            if node.op == "placeholder":
                is_source = node.name in names
            else:
                is_source = operator_of(node) in MATMULS or (
                    any(each in found for each in float_inputs(node)) and not self._stays_float32(node)
                )
            if is_source and is_float(node):
                found.add(node)
        return found

    def _stays_float32(self, node: Node) -> bool:
        """Stays float32: its operator is on the float32 list, or it names float32 explicitly."""
        if is_quantized(node):
            return True
        if operator_of(node) is torch.ops.precast.cached_attention:
            return not is_float(node.args[3])
        is_explicit = any(each is torch.float32 for each in tree_leaves((node.args, node.kwargs)))
        return is_explicit or operator_of(node) in FLOAT32_OPERATORS

    def _weights_behind(self, nodes: Iterable[Node]) -> Iterator[Node]:
        for node in nodes:
            if node.op == "placeholder" and node in self.activations and node.name in self.weights:
                yield node
            elif self.precision_of(node) == "any":
                yield from self._weights_behind(float_inputs(node))


def weight_key(tensor: Tensor) -> WeightKey:
    """Identify a weight by its memory: tied weights have one key."""
    return tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
