"""A session's arrays, and a file's weights, as torch tensors over the same memory, for the engines that run torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..artifact.schema import Graph, Input, Output
from . import Arrays
from .binding import check_array, order_arrays
from .fork import ForkGuard
from .safetensors_map import Weight

__all__ = ["bind_tensor", "bind_tensors", "guard_threads", "view_weights"]

_HOME = os.getpid()


def guard_threads(count: int) -> ForkGuard:
    """A guard of PyTorch's threads. They are OpenMP's, which has one pool for the whole process: after a fork even a
    model that the child opened itself would wait for its parent's."""
    return ForkGuard.of_threads(count, _HOME)


def bind_tensors(graph: Graph, inputs: Arrays, outputs: Arrays) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs and the outputs of a graph that updates its caches in place, as `order_arrays` orders and checks
    them."""
    given, made = order_arrays(graph, inputs, outputs)
    return [_view(spec, array) for spec, array in given], [_view(spec, array) for spec, array in made]


def bind_tensor(spec: Input | Output, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The tensor over an array's memory. Raises ArtifactError where it is not what `spec` says."""
    return _view(spec, check_array(spec, array))


def _view(spec: Input | Output, array: np.ndarray[Any, Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


def view_weights(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """The weights as tensors; those that are views of one share its memory."""
    return {name: _view_weight(weight) for name, weight in weights.items()}


def _view_weight(weight: Weight) -> torch.Tensor:
    dtype = getattr(torch, weight.dtype)
    if not weight.held:
        return torch.zeros(weight.shape, dtype=dtype)
    flat = torch.frombuffer(weight.memory, dtype=dtype, count=weight.held, offset=weight.start)
    return flat.as_strided(weight.shape, weight.strides)
