"""A lowered program as a compiler for XLA devices takes it: functional, every size fixed, no device named.

What was traced on the CPU names it wherever it makes a tensor, and a tensor of the CPU cannot meet one of the device.
So everything that depends on no input and no weight is computed here, and kept as a constant.
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

from precast.runtime.artifact.schema import Graph, Input
from precast.runtime.errors import ExportError

from ..aten.lowering import Forms, Lowered

__all__ = ["NEURON_FORMS", "Body", "OneGraph", "body_of", "caches_of", "example_of", "given_of"]

NEURON_FORMS = Forms(whole=True)
"""How programs are lowered for Neuron."""

_LARGEST_CONSTANT = 2**28
"""Bytes: a constant that is larger was not meant to be kept."""
_SHAPED: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
"""A view asks for strides that another machine's kernels need not give; a shape is all that is meant."""
_NOTES = frozenset({torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default})


@dataclass(frozen=True)
class Body:
    """Attributes:
    graph: the contract.
    module: takes the weights, the caches and what callers give, in this order, and returns a flat tuple of the outputs
        and the new caches; its own buffers are constants.
    weights: by name, in the order in which `module` takes them.
    """

    graph: Graph
    module: fx.GraphModule
    weights: dict[str, Tensor]


def body_of(lowered: Lowered) -> Body:
    """Lift weights and caches of a lowered program, fold constants, and name no device. Raises ExportError."""
    exported = lowered.exported
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    user = dict(zip(exported.graph_signature.user_inputs, lowered.graph.inputs, strict=True))
    caches = {spec.name for spec in caches_of(lowered.graph)}
    build = _Build(exported.graph_module)
    weights: dict[str, Tensor] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT and node.users:
            build.take(node)
            weights[str(kinds[node.name].target)] = _held(exported, str(kinds[node.name].target))
    for wanted in (True, False):
        for name, spec in user.items():
            if (spec.name in caches) is wanted:
                build.take(next(node for node in exported.graph.nodes if node.name == name))
    for node in exported.graph.nodes:
        if node.op == "call_function":
            build.call(node)
    return Body(lowered.graph, build.finish(_results(lowered)), weights)


def caches_of(graph: Graph) -> list[Input]:
    """The inputs that stay on the device, in the order of their layers."""
    names = [name for layer in graph.cache for name in (layer.key_in, layer.value_in)]
    specs = {spec.name: spec for spec in graph.inputs}
    return [specs[name] for name in names]


def given_of(graph: Graph) -> list[Input]:
    """The inputs that a caller gives at each step."""
    caches = {spec.name for spec in caches_of(graph)}
    return [spec for spec in graph.inputs if spec.name not in caches]


def example_of(specs: Sequence[Input]) -> tuple[Tensor, ...]:
    """Each as it is where nobody gives anything; raises ExportError for one with a free dimension."""
    for spec in specs:
        if not all(isinstance(size, int) for size in spec.shape):
            raise ExportError(
                f"Neuron compiles fixed shapes only, and {spec.name} has the shape {spec.shape}. Fixed lengths may do "
                f"where a free one does not: --prefill-lengths 64."
            )
    return tuple(torch.full(sizes_of(spec), spec.pad, dtype=getattr(torch, spec.dtype)) for spec in specs)


def sizes_of(spec: Input) -> list[int]:
    """Its shape, where all of it is fixed."""
    return [size for size in spec.shape if isinstance(size, int)]


def _held(exported: torch.export.ExportedProgram, name: str) -> Tensor:
    held: Mapping[str, Any] = exported.state_dict if name in exported.state_dict else exported.constants
    tensor: Tensor = held[name]
    return tensor.detach()


def _results(lowered: Lowered) -> list[fx.Node]:
    """The nodes of the outputs, then those of the new caches in the order of `caches_of`."""
    signature, outputs = lowered.exported.graph_signature, lowered.exported.graph.output_node().args[0]
    names = dict(zip(signature.user_inputs, (spec.name for spec in lowered.graph.inputs), strict=True))
    pairs = list(zip(signature.output_specs, outputs, strict=True))
    changed = {names[spec.target]: node for spec, node in pairs if spec.kind is OutputKind.USER_INPUT_MUTATION}
    if missing := [spec.name for spec in caches_of(lowered.graph) if spec.name not in changed]:
        raise ExportError(f"The graph {lowered.graph.name} never writes its cache {missing[0]}: please report it.")
    plain = [node for spec, node in pairs if spec.kind is OutputKind.USER_OUTPUT]
    return [*plain, *(changed[spec.name] for spec in caches_of(lowered.graph))]


class _Build:
    """A graph that grows by the nodes of another, those left out whose values are known already."""

    def __init__(self, source: fx.GraphModule) -> None:
        self._source, self._root, self._graph = source, nn.Module(), fx.Graph()
        self._made: dict[fx.Node, Any] = {}
        self._known: dict[fx.Node, Any] = {}

    def take(self, node: fx.Node) -> None:
        """An argument of the new graph."""
        self._made[node] = self._graph.placeholder(node.name)

    def call(self, node: fx.Node) -> None:
        """The node once more, or its value."""
        if node.target in _NOTES:
            return
        if all(each in self._known for each in node.all_input_nodes):
            self._known[node] = self._compute(node)
            return
        kwargs = {name: value for name, value in node.kwargs.items() if name != "device"}
        args, kwargs = fx.map_arg((node.args, kwargs), self._new)
        self._made[node] = self._graph.call_function(_target(node), args, kwargs)

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """The module that returns `results`."""
        self._graph.output(tuple(self._new(node) for node in results))
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
                    f"shapes, which would lie in the compiled graph. A smaller --batch-size or --sequence-length "
                    f"makes it smaller."
                )
        return value

    def _new(self, node: fx.Node) -> Any:
        if node in self._made:
            return self._made[node]
        value = self._known[node]
        if not isinstance(value, Tensor):
            return value
        self._made[node] = self._graph.get_attr(self._kept(value))
        return self._made[node]

    def _kept(self, value: Tensor) -> str:
        """The name of the constant, of which there is one for equal values: every layer makes its own."""
        held = dict(self._root.named_buffers())
        for name, other in held.items():
            if (other.dtype, other.shape) == (value.dtype, value.shape) and torch.equal(other, value):
                return name
        name = f"constant_{len(held)}"
        self._root.register_buffer(name, value.contiguous().clone())
        return name


def _target(node: fx.Node) -> Any:
    """What a node calls: an ATen operator or `getitem`. Raises ExportError for others, which no device knows."""
    is_aten = getattr(node.target, "namespace", None) == "aten"
    if not is_aten and node.target is not operator.getitem and getattr(node.target, "__module__", "") != "_operator":
        raise ExportError(f"Neuron cannot compile the operator {node.target}: it is not one of PyTorch's own.")
    return _SHAPED.get(node.target, node.target)


class OneGraph(nn.Module):
    """A body with weights and caches as parameters of its own: `forward(*given)` -> outputs and new caches."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body, self.weights = body.module, nn.Module()
        self._names = list(body.weights)
        for name, tensor in body.weights.items():
            place(self.weights, name, tensor)
        self.caches = nn.ParameterList(_frozen(torch.zeros_like(each)) for each in example_of(caches_of(body.graph)))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        weights = [found(self.weights, name) for name in self._names]
        results: tuple[Tensor, ...] = self.body(*weights, *self.caches, *given)
        return results

    def aliases(self) -> dict[Tensor, int]:
        """Which output is the new value of which cache, as torch_neuronx.trace takes it."""
        first = len(self._results()) - len(self.caches)
        return {cache: first + index for index, cache in enumerate(self.caches)}

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and constants by name: what `state_dict` has without the caches."""
        return ((name, each) for name, each in self.state_dict().items() if not name.startswith("caches."))

    def _results(self) -> Sequence[Any]:
        output: Any = self.body.graph.output_node().args[0]
        return list(output)


def place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, _frozen(tensor))


def found(root: nn.Module, name: str) -> Tensor:
    """The parameter of a dotted name."""
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), last)
    return tensor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
