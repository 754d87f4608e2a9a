"""Several graphs over one set of weights and caches, each layer's weights spread over cores.

Every linear layer whose rows divide evenly gives each core its share of them, and the cores put their parts of the
output together. That is right for any model, whatever its heads: attention and caches are whole on every core. What is
spread is what a decode step reads most, the weights.
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
from .xla_program import Body, caches_of, example_of, found, given_of, place

__all__ = ["SHARDED", "SharedGraphs"]

SHARDED, WHOLE = "sharded.", "whole."
"""What the names of weights begin with: each core has its share of the rows, or all."""


class SharedGraphs(nn.Module):
    """All graphs of a model in one module: `forward` runs the one that was compiled for the shapes that it is given.

    Caches are buffers, and a new value is assigned, which is how NxD's tracer sees what stays on the device ("In-place
    buffer updates", model_builder_v2_api_reference.rst). Raises ExportError where there is nothing to spread.
    """

    def __init__(self, bodies: Sequence[Body], cores: int, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        _check_alike(bodies)
        spread = [_spread(body, cores, gather or _alone) for body in bodies]
        if cores > 1 and not any(name.startswith(SHARDED) for body in spread for name in body.weights):
            raise ExportError(
                f"No layer of this model can be spread over {cores} cores: none has a multiple of it in rows."
            )
        self._full = share({body.graph.name: body.weights for body in spread})
        for name, tensor in self._full.items():
            place(self, _path(name), _part(name, tensor, cores))
        self._caches = [f"cache_{index}" for index in range(len(caches_of(spread[0].graph)))]
        for name, value in zip(self._caches, example_of(caches_of(spread[0].graph)), strict=True):
            self.register_buffer(name, torch.zeros_like(value))
        self.bodies = nn.ModuleDict({body.graph.name: body.module for body in spread})
        self._names = {body.graph.name: [self._name(body.graph.name, each) for each in body.weights] for body in spread}
        self._inputs = [_identifier(spec.name) for spec in given_of(spread[0].graph)]
        self._by_shape = {_shapes(example_of(given_of(body.graph))): body.graph.name for body in spread}
        # The tracer reads the names of the inputs off the signature.
        self.forward = _named(self.run, self._inputs)

    def run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the graph for these shapes; the caches are changed."""
        key = self._by_shape[_shapes(given)]
        weights = [found(self, name) for name in self._names[key]]
        caches = [getattr(self, name) for name in self._caches]
        results = self.bodies[key](*weights, *caches, *given)
        count = len(results) - len(caches)
        for name, value in zip(self._caches, results[count:], strict=True):
            setattr(self, name, value)
        return tuple(results[:count])

    def kept(self) -> dict[str, Tensor]:
        """Weights, whole, and constants: what `state_dict` has without the caches."""
        full = {_path(name): tensor for name, tensor in self._full.items()}
        return {name: full.get(name, each) for name, each in self.state_dict().items() if name not in self._caches}

    def _name(self, graph: str, weight: str) -> str:
        own = f"{graph}:{weight}"
        return _path(own if own in self._full else weight)


def _check_alike(bodies: Sequence[Body]) -> None:
    """Raise ExportError where graphs take different inputs: the tracer gives all of them one signature."""
    kinds = {tuple(spec.name for spec in body.graph.inputs) for body in bodies}
    if len(kinds) > 1:
        names = ", ".join(body.graph.name for body in bodies)
        raise ExportError(
            f"--strategy model-builder compiles graphs that take the same inputs, and {names} of this model do not. "
            f"Give --strategy trace."
        )


def _alone(part: Tensor) -> Tensor:
    """What gathers where nobody runs the module, but asks it for its weights."""
    return part


def _named(run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], names: Sequence[str]) -> Callable[..., Any]:
    """A function of these arguments, given in order or by name."""

    def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return run([*args, *(kwargs[name] for name in names[len(args) :])])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return forward


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _path(name: str) -> str:
    """Where a weight lies in the module; one that differs from graph to graph is called `graph:name`."""
    graph, mark, weight = name.rpartition(":")
    kind, _, rest = weight.partition(".")
    return f"{kind}.of_{graph}.{rest}" if mark else name


def _part(name: str, tensor: Tensor, cores: int) -> Tensor:
    own = name.rpartition(":")[2]
    return tensor[: tensor.shape[0] // cores] if own.startswith(SHARDED) else tensor


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, tensor.shape)) for tensor in tensors)


def _spread(body: Body, cores: int, gather: Callable[[Tensor], Tensor]) -> Body:
    """The body with its linear layers spread; weights are renamed to say whether they are."""
    new = _Spreading(cores, gather)
    nodes = list(body.module.graph.nodes)
    weights: dict[str, Tensor] = {}
    for node, (name, tensor) in zip(nodes, body.weights.items(), strict=False):
        weights |= {f"{kind}{name}": tensor for kind in new.take(node, tensor)}
    for node in nodes[len(body.weights) :]:
        new.copy(node)
    new.graph.lint()
    return Body(body.graph, fx.GraphModule(body.module, new.graph), weights)


class _Spreading:
    """A copy of a graph, in which layers multiply with a part of their weight."""

    def __init__(self, cores: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.graph = fx.Graph()
        self._cores, self._gather = cores, gather
        self._made: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node, tensor: Tensor) -> list[str]:
        """A weight, as layers and as others use it: a tied embedding is both."""
        divides = self._cores > 1 and tensor.ndim == 2 and tensor.shape[0] % self._cores == 0
        layers = [user for user in node.users if divides and _multiplies(user, node)]
        if layers:
            self._parts[node] = self.graph.placeholder(f"{node.name}_part")
        if len(layers) < len(node.users):
            self._made[node] = self.graph.placeholder(node.name)
        return [*([SHARDED] if layers else []), *([WHOLE] if node in self._made else [])]

    def copy(self, node: fx.Node) -> None:
        if node.op == "call_function" and any(_multiplies(node, weight) for weight in self._parts):
            self._made[node] = self._layer(*node.args)
        else:
            self._made[node] = self.graph.node_copy(node, self._made.__getitem__)

    def _layer(self, x: Any, weight: Any, bias: Any = None) -> fx.Node:
        linear, add = torch.ops.aten.linear.default, torch.ops.aten.add.Tensor
        part = self.graph.call_function(linear, (self._made[x], self._parts[weight]))
        whole = self.graph.call_function(self._gather, (part,))
        return whole if bias is None else self.graph.call_function(add, (whole, self._made[bias]))


def _multiplies(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node is a layer whose weight this is, and takes it for nothing else."""
    return node.target is torch.ops.aten.linear.default and [each is weight for each in node.args[:2]] == [False, True]
