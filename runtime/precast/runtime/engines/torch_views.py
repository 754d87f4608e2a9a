"""A session's arrays as torch tensors over the same memory, checked against the contract, for the native engines."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from ..artifact.schema import Dim, Graph, Input, Output
from ..errors import ArtifactError
from ..inputs.tensors import storage_dtype
from . import Arrays
from .fork import ForkGuard

__all__ = ["bind_tensor", "bind_tensors", "guard_threads"]

_HOME = os.getpid()


def guard_threads(count: int) -> ForkGuard:
    """A guard of PyTorch's threads. They are OpenMP's, which has one pool for the whole process: after a fork even a
    model that the child opened itself would wait for its parent's."""
    return ForkGuard.of_threads(count, _HOME)


def bind_tensors(graph: Graph, inputs: Arrays, outputs: Arrays) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
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
    given = [bind_tensor(spec, inputs[spec.name]) for spec in graph.inputs]
    return given, [bind_tensor(spec, outputs[spec.name]) for spec in graph.outputs if spec.name not in into]


def bind_tensor(spec: Input | Output, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The tensor over an array's memory. Raises ArtifactError where it is not what `spec` says."""
    dtype = storage_dtype(spec.dtype)
    is_good = str(array.dtype) == dtype and array.ndim == len(spec.shape) and array.flags.c_contiguous
    if not is_good or not all(map(_fits_size, array.shape, spec.shape)):
        raise ArtifactError(
            f"{spec.name} is to be a contiguous array of {dtype} {spec.shape}, not {array.dtype} {list(array.shape)} "
            f"with strides {list(array.strides)}."
        )
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


def _fits_size(size: int, spec: int | Dim) -> bool:
    return size == spec if isinstance(spec, int) else spec.min <= size <= spec.max
