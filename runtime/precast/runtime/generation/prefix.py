"""The prefix of an artifact: keys and values that every row of its caches begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import Artifact
from ..artifact.schema import Graph
from ..engines.safetensors_map import Weight, open_weights
from ..errors import FormatError

__all__ = ["Prefix", "as_dtype", "read_prefix"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first `length` positions, float32 [heads, length, width], by the names of the caches.

    `sha256` is the hash of the file of one that is not the artifact's own, and `given` where that was said to be.
    """

    length: int
    tensors: dict[str, Array]
    sha256: str | None = None
    given: str | None = None


def read_prefix(artifact: Artifact, graph: Graph) -> Prefix | None:
    """The prefix for the caches of `graph`; None where the artifact has none.

    Raises IntegrityError where the file was replaced, FormatError where it does not fit the caches.
    """
    told = artifact.contract.prefix
    if told is None:
        return None
    path = artifact.path / told.file
    with artifact.contents.open(told.file) as sources:
        read = {name: _copy_values(weight) for name, weight in open_weights([path], sources).items()}
    expected = {
        name: (layer.heads, told.length, layer.head_dim)
        for layer in graph.cache
        for name in (layer.key_in, layer.value_in)
    }
    wrong = sorted(name for name in read.keys() | expected.keys() if not _fits(read.get(name), expected.get(name)))
    if wrong:
        raise FormatError(
            f"{path} does not hold the keys and values of a prefix of {told.length} positions for this model's caches: "
            f"{wrong[0]} is missing, unknown or of another size. Export or download the artifact again."
        )
    return Prefix(told.length, {name: values for name, values in read.items() if values is not None})


def as_dtype(values: Array, dtype: str) -> Array:
    """Values in float32 rounded to a cache's dtype, in the form in which arrays hold that."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    # Half of the bits, rounded to the nearest, to an even one between two.
    bits = values.view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _copy_values(weight: Weight) -> Array | None:
    """A tensor's values; None where it is none of numbers in float32."""
    if weight.dtype != "float32":
        return None
    strides = [4 * step for step in weight.strides]
    mapped: Array = np.ndarray(weight.shape, np.float32, weight.memory, weight.start, strides)
    return mapped.copy()


def _fits(values: Array | None, expected: tuple[int, int, int] | None) -> bool:
    if values is None or expected is None or values.ndim != 3:
        return False
    heads, length, width = values.shape
    return bool(heads <= expected[0] and length == expected[1] and width <= expected[2])
