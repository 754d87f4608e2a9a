"""Tensor parallelism: several graphs over one set of weights and caches, with linear layers sharded over cores.

Every linear layer whose output rows divide evenly is sharded by rows, and its output is gathered. That is right for any
model, whatever its heads: attention and caches are whole on every core. The weights, which a decode step reads most,
are sharded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from precast.runtime.errors import ExportError

from ..aten.safetensors import share
from .xla_program import Body, cache_inputs, example_inputs, get_parameter, register_parameter, step_inputs

__all__ = ["SHARDED", "SharedGraphs"]

SHARDED, WHOLE = "sharded.", "whole."
"""Prefixes of weights' names: each core has its part of the rows, or all."""


class SharedGraphs(nn.Module):
    """All graphs of a model in one module: `forward` runs the graph that has the shapes of its inputs.

    Caches are buffers that are assigned to, by which NxD's tracer knows that they stay on the device ("In-place buffer
    updates", model_builder_v2_api_reference.rst). Raises ExportError where no layer can be sharded.
    """

    def __init__(self, bodies: Sequence[Body], cores: int, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        _check_same_inputs(bodies)
        sharded = [_shard_layers(body, cores, gather or _keep_part) for body in bodies]
        if cores > 1 and not any(name.startswith(SHARDED) for body in sharded for name in body.weights):
            raise ExportError(
                f"No layer of this model can be spread over {cores} cores: none has a multiple of it in rows."
            )
        self._full = share({body.graph.name: body.weights for body in sharded})
        for name, tensor in self._full.items():
            register_parameter(self, _module_path(name), _select_part(name, tensor, cores))
        self._caches = [f"cache_{index}" for index in range(len(cache_inputs(sharded[0].graph)))]
        for name, value in zip(self._caches, example_inputs(cache_inputs(sharded[0].graph)), strict=True):
            self.register_buffer(name, torch.zeros_like(value))
        self.bodies = nn.ModuleDict({body.graph.name: body.module for body in sharded})
        self._names = {
            body.graph.name: [self._name(body.graph.name, each) for each in body.weights] for body in sharded
        }
        self._inputs = [_identifier(spec.name) for spec in step_inputs(sharded[0].graph)]
        self._by_shape = {_shapes(example_inputs(step_inputs(body.graph))): body.graph.name for body in sharded}
        # The tracer reads the names of the inputs off the signature.
        self.forward = _with_signature(self.run, self._inputs)

    def run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the graph for these shapes; caches are updated."""
        key = self._by_shape[_shapes(given)]
        weights = [get_parameter(self, name) for name in self._names[key]]
        caches = [getattr(self, name) for name in self._caches]
        results = self.bodies[key](*weights, *caches, *given)
        count = len(results) - len(caches)
        for name, value in zip(self._caches, results[count:], strict=True):
            setattr(self, name, value)
        return tuple(results[:count])

    def named_weights(self) -> dict[str, Tensor]:
        """Weights, unsharded, and constants by name: `state_dict` without the caches."""
        full = {_module_path(name): tensor for name, tensor in self._full.items()}
        return {name: full.get(name, each) for name, each in self.state_dict().items() if name not in self._caches}

    def _name(self, graph: str, weight: str) -> str:
        own = f"{graph}:{weight}"
        return _module_path(own if own in self._full else weight)


def _check_same_inputs(bodies: Sequence[Body]) -> None:
    """Raise ExportError where graphs take different inputs: the tracer gives all of them one signature."""
    kinds = {tuple(spec.name for spec in body.graph.inputs) for body in bodies}
    if len(kinds) > 1:
        names = ", ".join(body.graph.name for body in bodies)
        raise ExportError(
            f"strategy='model-builder' compiles graphs that take the same inputs, and {names} of this model do not. "
            f"Give strategy='trace'."
        )


def _keep_part(part: Tensor) -> Tensor:
    """Stands for the gather where the module is asked for its weights only and never run."""
    return part


def _with_signature(run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], names: Sequence[str]) -> Callable[..., Any]:
    """Give a function named arguments, to be passed in order or by name."""

    def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return run([*args, *(kwargs[name] for name in names[len(args) :])])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return forward


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _module_path(name: str) -> str:
    """The path of a weight in the module; one that differs between graphs has the name `graph:name`."""
    graph, mark, weight = name.rpartition(":")
    kind, _, rest = weight.partition(".")
    return f"{kind}.of_{graph}.{rest}" if mark else name


def _select_part(name: str, tensor: Tensor, cores: int) -> Tensor:
    own = name.rpartition(":")[2]
    return tensor[: tensor.shape[0] // cores] if own.startswith(SHARDED) else tensor


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, tensor.shape)) for tensor in tensors)


def _shard_layers(body: Body, cores: int, gather: Callable[[Tensor], Tensor]) -> Body:
    """Shard the linear layers of a body; the prefixes of weights' names say which are sharded."""
    new = _Sharding(cores, gather)
    nodes = list(body.module.graph.nodes)
    weights: dict[str, Tensor] = {}
    for node, (name, tensor) in zip(nodes, body.weights.items(), strict=False):
        weights |= {f"{kind}{name}": tensor for kind in new.add_weight(node, tensor)}
    for node in nodes[len(body.weights) :]:
        new.copy_node(node)
    new.graph.lint()
    return Body(body.graph, fx.GraphModule(body.module, new.graph), weights)


class _Sharding:
    """Copies a graph so that layers multiply with their core's part of the weight and gather the result."""

    def __init__(self, cores: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.graph = fx.Graph()
        self._cores, self._gather = cores, gather
        self._made: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, fx.Node] = {}

    def add_weight(self, node: fx.Node, tensor: Tensor) -> list[str]:
        """Add a weight's inputs, sharded for layers and whole for other users (a tied embedding has both); returns
        their prefixes."""
        divides = self._cores > 1 and tensor.ndim == 2 and tensor.shape[0] % self._cores == 0
        layers = [user for user in node.users if divides and _is_layer_of(user, node)]
        if layers:
            self._parts[node] = self.graph.placeholder(f"{node.name}_part")
        if len(layers) < len(node.users):
            self._made[node] = self.graph.placeholder(node.name)
        return [*([SHARDED] if layers else []), *([WHOLE] if node in self._made else [])]

    def copy_node(self, node: fx.Node) -> None:
        if node.op == "call_function" and any(_is_layer_of(node, weight) for weight in self._parts):
            self._made[node] = self._add_layer(*node.args)
        else:
            self._made[node] = self.graph.node_copy(node, self._made.__getitem__)

    def _add_layer(self, x: Any, weight: Any, bias: Any = None) -> fx.Node:
        linear, add = torch.ops.aten.linear.default, torch.ops.aten.add.Tensor
        part = self.graph.call_function(linear, (self._made[x], self._parts[weight]))
        whole = self.graph.call_function(self._gather, (part,))
        return whole if bias is None else self.graph.call_function(add, (whole, self._made[bias]))


def _is_layer_of(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node is a linear layer that uses `weight` as its weight and as nothing else."""
    return node.target is torch.ops.aten.linear.default and [each is weight for each in node.args[:2]] == [False, True]
