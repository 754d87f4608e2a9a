"""A lowered program as compilers for XLA devices take it: functional, with static shapes, and without devices.

A program traced on the CPU names it wherever it creates a tensor, and a CPU tensor cannot be combined with one of the
device. So everything that depends on no input and no weight is computed here and kept as a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from precast.runtime.artifact.ranks import OWN_NUMBER
from precast.runtime.artifact.schema import Graph, Input
from precast.runtime.errors import ExportError

from ..aten.lowered import Lowered, LoweringOptions
from .collectives import COLLECTIVES, add_collective, reads_rank

__all__ = ["NEURON_LOWERING", "Body", "OneGraph", "build_body", "cache_inputs", "example_inputs", "step_inputs"]

NEURON_LOWERING = LoweringOptions(static_cache_view=True)
"""How programs are lowered for Neuron."""

_LARGEST_CONSTANT = 2**28
"""Bytes: a larger constant is an error."""
_RESHAPES: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
"""A view depends on strides, which another device's kernels need not produce; a reshape does not."""
_ASSERTIONS = frozenset({torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default})


@dataclass(frozen=True)
class Body:
    """Attributes:
    graph: the contract.
    module: takes the weights, the caches and the inputs of a step, in this order, and returns a flat tuple of the
        outputs and the new caches; its own buffers are constants.
    weights: by name, in the order in which `module` takes them; of several ranks those of one, whose number, where
        the program asks for it, is the weight OWN_NUMBER, int32 [1], which is 0 here.
    """

    graph: Graph
    module: fx.GraphModule
    weights: dict[str, Tensor]


def build_body(lowered: Lowered) -> Body:
    """Lift weights and caches of a lowered program, fold constants, and name no device. Raises ExportError."""
    exported = lowered.exported
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    user = dict(zip(exported.graph_signature.user_inputs, lowered.graph.inputs, strict=True))
    caches = {spec.name for spec in cache_inputs(lowered.graph)}
    builder = _GraphBuilder(exported.graph_module)
    weights: dict[str, Tensor] = {}
    if any(map(reads_rank, exported.graph.nodes)):
        builder.add_rank()
        weights[OWN_NUMBER] = torch.zeros(1, dtype=torch.int32)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT and node.users:
            builder.add_input(node)
            weights[str(kinds[node.name].target)] = _get_tensor(exported, str(kinds[node.name].target))
    for wanted in (True, False):
        for name, spec in user.items():
            if (spec.name in caches) is wanted:
                builder.add_input(next(node for node in exported.graph.nodes if node.name == name))
    for node in exported.graph.nodes:
        if node.op == "call_function":
            builder.copy_node(node)
    return Body(lowered.graph, builder.finish(_result_nodes(lowered)), weights)


def cache_inputs(graph: Graph) -> list[Input]:
    """The inputs that stay on the device, in the order of their layers."""
    names = [name for layer in graph.cache for name in (layer.key_in, layer.value_in)]
    specs = {spec.name: spec for spec in graph.inputs}
    return [specs[name] for name in names]


def step_inputs(graph: Graph) -> list[Input]:
    """The inputs that a caller gives at each step."""
    caches = {spec.name for spec in cache_inputs(graph)}
    return [spec for spec in graph.inputs if spec.name not in caches]


def example_inputs(specs: Sequence[Input]) -> tuple[Tensor, ...]:
    """Inputs filled with their pad values; raises ExportError for one with a free dimension."""
    for spec in specs:
        if not all(isinstance(size, int) for size in spec.shape):
            raise ExportError(
                f"Neuron compiles fixed shapes only, and {spec.name} has the shape {spec.shape}. Fixed lengths may do "
                f"where a free one does not: prefill_lengths=64."
            )
    return tuple(torch.full(fixed_shape(spec), spec.pad, dtype=getattr(torch, spec.dtype)) for spec in specs)


def fixed_shape(spec: Input) -> list[int]:
    """The shape of an input, all of whose dimensions are fixed."""
    return [size for size in spec.shape if isinstance(size, int)]


def _get_tensor(exported: torch.export.ExportedProgram, name: str) -> Tensor:
    held: Mapping[str, Any] = exported.state_dict if name in exported.state_dict else exported.constants
    tensor: Tensor = held[name]
    return tensor.detach()


def _result_nodes(lowered: Lowered) -> list[fx.Node]:
    """The nodes of the outputs, then those of the new caches in the order of `cache_inputs`."""
    signature, outputs = lowered.exported.graph_signature, lowered.exported.graph.output_node().args[0]
    names = dict(zip(signature.user_inputs, (spec.name for spec in lowered.graph.inputs), strict=True))
    pairs = list(zip(signature.output_specs, outputs, strict=True))
    changed = {names[spec.target]: node for spec, node in pairs if spec.kind is OutputKind.USER_INPUT_MUTATION}
    if missing := [spec.name for spec in cache_inputs(lowered.graph) if spec.name not in changed]:
        raise ExportError(f"The graph {lowered.graph.name} never writes its cache {missing[0]}: please report it.")
    plain = [node for spec, node in pairs if spec.kind is OutputKind.USER_OUTPUT]
    return [*plain, *(changed[spec.name] for spec in cache_inputs(lowered.graph))]


class _GraphBuilder:
    """Copies a graph node by node, and folds nodes whose values are known into constants."""

    def __init__(self, source: fx.GraphModule) -> None:
        self._source, self._root, self._graph = source, nn.Module(), fx.Graph()
        self._made: dict[fx.Node, Any] = {}
        self._known: dict[fx.Node, Any] = {}
        self._rank: fx.Node | None = None

    def add_rank(self) -> None:
        """Add an argument for the number of the rank."""
        self._rank = self._graph.placeholder(OWN_NUMBER)

    def add_input(self, node: fx.Node) -> None:
        """Add an argument to the new graph."""
        self._made[node] = self._graph.placeholder(node.name)

    def copy_node(self, node: fx.Node) -> None:
        """Copy a node, or compute its value where it depends on known values only."""
        if node.target in _ASSERTIONS:
            return
        if node.target in COLLECTIVES:
            x = self._get_node(node.all_input_nodes[0])
            self._made[node] = add_collective(self._graph, node, x, self._rank)
            return
        if all(each in self._known for each in node.all_input_nodes):
            self._known[node] = self._compute(node)
            return
        kwargs = {name: value for name, value in node.kwargs.items() if name != "device"}
        args, kwargs = fx.map_arg((node.args, kwargs), self._get_node)
        self._made[node] = self._graph.call_function(_target(node), args, kwargs)

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """Make the module that returns `results`."""
        self._graph.output(tuple(self._get_node(node) for node in results))
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph)

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
        with torch.no_grad():
            value = _target(node)(*args, **kwargs)
        for each in tree_leaves(value):
            if isinstance(each, Tensor) and each.nbytes > _LARGEST_CONSTANT:
                raise ExportError(
                    f"This model makes a constant of {each.nbytes / 1e6:,.0f} MB, {list(each.shape)}, out of its fixed "
                    f"shapes, which would lie in the compiled graph. A smaller batch_size or sequence_length "
                    f"makes it smaller."
                )
        return value

    def _get_node(self, node: fx.Node) -> Any:
        if node in self._made:
            return self._made[node]
        value = self._known[node]
        if not isinstance(value, Tensor):
            return value
        self._made[node] = self._graph.get_attr(self._register_constant(value))
        return self._made[node]

    def _register_constant(self, value: Tensor) -> str:
        """Register a constant and return its name; equal ones, which every layer creates anew, are stored once."""
        held = dict(self._root.named_buffers())
        for name, other in held.items():
            if (other.dtype, other.shape) == (value.dtype, value.shape) and torch.equal(other, value):
                return name
        name = f"constant_{len(held)}"
        self._root.register_buffer(name, value.contiguous().clone())
        return name


def _target(node: fx.Node) -> Any:
    """The function that a node calls, an ATen operator or `getitem`. Raises ExportError for any other."""
    is_aten = getattr(node.target, "namespace", None) == "aten"
    if not is_aten and node.target is not operator.getitem and getattr(node.target, "__module__", "") != "_operator":
        raise ExportError(f"Neuron cannot compile the operator {node.target}: it is not one of PyTorch's own.")
    return _RESHAPES.get(node.target, node.target)


class OneGraph(nn.Module):
    """A body with weights and caches as parameters of its own: `forward(*given)` -> outputs and new caches."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body, self.weights = body.module, nn.Module()
        self._names = list(body.weights)
        for name, tensor in body.weights.items():
            register_parameter(self.weights, name, tensor)
        self.caches = nn.ParameterList(
            _frozen(torch.zeros_like(each)) for each in example_inputs(cache_inputs(body.graph))
        )

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        weights = [get_parameter(self.weights, name) for name in self._names]
        results: tuple[Tensor, ...] = self.body(*weights, *self.caches, *given)
        return results

    def aliases(self) -> dict[Tensor, int]:
        """The index of the output that is each cache's new value, as torch_neuronx.trace takes it."""
        first = len(self._results()) - len(self.caches)
        return {cache: first + index for index, cache in enumerate(self.caches)}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and constants by name: `state_dict` without the caches."""
        return ((name, each) for name, each in self.state_dict().items() if not name.startswith("caches."))

    def _results(self) -> Sequence[Any]:
        output: Any = self.body.graph.output_node().args[0]
        return list(output)


def register_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, _frozen(tensor))


def get_parameter(root: nn.Module, name: str) -> Tensor:
    """Get the parameter of a dotted name."""
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), last)
    return tensor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
