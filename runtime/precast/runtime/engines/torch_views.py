"""Arrays of a session as torch tensors over the same memory, checked against the contract: for the native engines."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from ..artifact.schema import Dim, Graph, Input, Output
from ..errors import ArtifactError
from ..inputs.tensors import storage
from . import Arrays
from .fork import Process

__all__ = ["bound_tensor", "bound_tensors", "threads_of"]

_HOME = os.getpid()


def threads_of(count: int) -> Process:
    """Where so many threads of PyTorch's are. They are OpenMP's, which has one set of them for the whole process: after
    a fork even a model that the child opened itself would wait for its parent's."""
    return Process.of_threads(count, _HOME)


def bound_tensors(graph: Graph, inputs: Arrays, outputs: Arrays) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs and the outputs of a graph that updates its caches in place, which are therefore inputs only.

    Raises ArtifactError for an array of another shape, dtype or layout than the graph was compiled for: it would be
    read and written as if it had that.
    """
    into: dict[str, str] = {}
    for layer in graph.cache:
        into |= {layer.key_out: layer.key_in, layer.value_out: layer.value_in}
    for name_out, name_in in into.items():
        same = outputs[name_out].ctypes.data == inputs[name_in].ctypes.data
        assert same, f"{name_out} and {name_in} are to be one array: the cache is updated in place"
    given = [bound_tensor(spec, inputs[spec.name]) for spec in graph.inputs]
    return given, [bound_tensor(spec, outputs[spec.name]) for spec in graph.outputs if spec.name not in into]


def bound_tensor(spec: Input | Output, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The tensor of an array. Raises ArtifactError where it is not what `spec` says."""
    dtype = storage(spec.dtype)
    is_good = str(array.dtype) == dtype and array.ndim == len(spec.shape) and array.flags.c_contiguous
    if not is_good or not all(map(_fits, array.shape, spec.shape)):
        raise ArtifactError(
            f"{spec.name} is to be a contiguous array of {dtype} {spec.shape}, not {array.dtype} {list(array.shape)} "
            f"with strides {list(array.strides)}."
        )
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


def _fits(size: int, spec: int | Dim) -> bool:
    return size == spec if isinstance(spec, int) else spec.min <= size <= spec.max
