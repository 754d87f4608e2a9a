"""Several graphs over one set of weights and caches, in one module, as NxD's ModelBuilder takes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from precast.runtime.errors import ExportError
from precast.runtime.hosts.neuron_sdk import parameter_path

from ..aten.safetensors import share
from .xla_program import Body, cache_inputs, example_inputs, get_parameter, register_parameter, step_inputs

__all__ = ["SharedGraphs"]


class SharedGraphs(nn.Module):
    """All graphs of a model in one module: `forward` runs the graph that has the shapes of its inputs.

    Caches are buffers that are assigned to, by which NxD's tracer knows that they stay on the device ("In-place buffer
    updates", model_builder_v2_api_reference.rst).
    """

    def __init__(self, bodies: Sequence[Body]) -> None:
        super().__init__()
        _check_same_inputs(bodies)
        self._held = share({body.graph.name: body.weights for body in bodies})
        for name, tensor in self._held.items():
            register_parameter(self, parameter_path(name), tensor)
        self._caches = [f"cache_{index}" for index in range(len(cache_inputs(bodies[0].graph)))]
        for name, value in zip(self._caches, example_inputs(cache_inputs(bodies[0].graph)), strict=True):
            self.register_buffer(name, torch.zeros_like(value))
        self.bodies = nn.ModuleDict({body.graph.name: body.module for body in bodies})
        self._names = {body.graph.name: [self._name(body.graph.name, each) for each in body.weights] for body in bodies}
        self._inputs = [_identifier(spec.name) for spec in step_inputs(bodies[0].graph)]
        self._by_shape = {_shapes(example_inputs(step_inputs(body.graph))): body.graph.name for body in bodies}
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
        """Weights and constants by the names under which files hold them; `parameter_path` says those in the module."""
        constants = {f"bodies.{name}": each for name, each in self.bodies.state_dict().items()}
        return {**self._held, **constants}

    def _name(self, graph: str, weight: str) -> str:
        own = f"{graph}:{weight}"
        return parameter_path(own if own in self._held else weight)


def _check_same_inputs(bodies: Sequence[Body]) -> None:
    """Raise ExportError where graphs take different inputs: the tracer gives all of them one signature."""
    kinds = {tuple(spec.name for spec in body.graph.inputs) for body in bodies}
    if len(kinds) > 1:
        names = ", ".join(body.graph.name for body in bodies)
        raise ExportError(
            f"strategy='model-builder' compiles graphs that take the same inputs, and {names} of this model do not. "
            f"Give strategy='trace'."
        )


def _with_signature(run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], names: Sequence[str]) -> Callable[..., Any]:
    """Give a function named arguments, to be passed in order or by name."""

    def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        return run([*args, *(kwargs[name] for name in names[len(args) :])])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return forward


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, tensor.shape)) for tensor in tensors)
