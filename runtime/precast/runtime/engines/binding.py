"""The arrays that a graph is bound to, checked against the contract: native code reads and writes them unchecked."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..artifact.schema import Dim, Graph, Input, Output
from ..errors import ArtifactError
from ..inputs.tensors import storage_dtype
from . import Arrays

__all__ = ["check_array", "order_arrays"]

_Array = np.ndarray[Any, Any]


def order_arrays(
    graph: Graph, inputs: Arrays, outputs: Arrays
) -> tuple[list[tuple[Input, _Array]], list[tuple[Output, _Array]]]:
    """The inputs and the outputs, in the graph's order, of one that updates its caches in place, which are therefore
    inputs only.

    Raises ArtifactError for an array of another shape, dtype or layout than the graph was compiled for: it would be
    read and written as if it had that.
    """
    into: dict[str, str] = {}
    for layer in graph.cache:
        into |= {layer.key_out: layer.key_in, layer.value_out: layer.value_in}
    for name_out, name_in in into.items():
        same = outputs[name_out].ctypes.data == inputs[name_in].ctypes.data
        assert same, f"{name_out} and {name_in} are to be one array: the cache is updated in place"
    given = [(spec, check_array(spec, inputs[spec.name])) for spec in graph.inputs]
    return given, [(spec, check_array(spec, outputs[spec.name])) for spec in graph.outputs if spec.name not in into]


def check_array(spec: Input | Output, array: _Array) -> _Array:
    """The array. Raises ArtifactError where it is not what `spec` says."""
    dtype = storage_dtype(spec.dtype)
    is_good = str(array.dtype) == dtype and array.ndim == len(spec.shape) and array.flags.c_contiguous
    if not is_good or not all(map(_fits_size, array.shape, spec.shape)):
        raise ArtifactError(
            f"{spec.name} is to be a contiguous array of {dtype} {spec.shape}, not {array.dtype} {list(array.shape)} "
            f"with strides {list(array.strides)}."
        )
    return array


def _fits_size(size: int, spec: int | Dim) -> bool:
    return size == spec if isinstance(spec, int) else spec.min <= size <= spec.max
