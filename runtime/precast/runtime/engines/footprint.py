"""How much memory the tensors of a compiled model take, counted from the heads of its files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..artifact import Artifact
from ..artifact.integrity import open_regular
from ..artifact.onnx_graph import find_tensors
from ..artifact.schema import Variant
from ..artifact.stages import compiled_graphs
from ..errors import IntegrityError
from .safetensors_map import list_stored

__all__ = ["Footprint", "measure_footprint"]

_CODES = ("int8", "uint8")
_GROUP = 32
"""Weights that share a scale of 4 bytes, as the default is."""


@dataclass(frozen=True)
class Footprint:
    """The bytes of a variant's tensors, each counted once however many graphs or names use it.

    Attributes:
        parameters: those of floating-point numbers, and of quantized weights: codes, scales and zero points.
        buffers: those of other numbers and truth values, such as positions.
        matrices: of the parameters those that are floating-point matrices, which quantization would round.
        matrix_elements: how many numbers they hold.
    """

    parameters: int
    buffers: int
    matrices: int
    matrix_elements: int

    def quantized(self, bits: int) -> int:
        """About how many bytes all would take with codes of so many bits for every matrix, and their scales."""
        codes = self.matrix_elements * bits // 8 + self.matrix_elements // _GROUP * 4
        return self.parameters + self.buffers - self.matrices + codes


def measure_footprint(artifact: Artifact, variant: Variant) -> Footprint:
    """Count the tensors of a variant; no weights are read.

    A graph of Neuron's that holds its weights within counts as its file. Raises ArtifactError.
    """
    files = list(dict.fromkeys(graph.file for graph in compiled_graphs(variant)))
    if variant.backend == "onnx":
        tensors = list(_onnx_tensors(artifact, files))
    elif variant.weights:
        tensors = list(_stored_tensors(artifact, variant.weights))
    else:
        return Footprint(sum(artifact.contract.files[name].size for name in files), 0, 0, 0)
    matrices = [(size, prod(shape)) for kind, shape, size in tensors if kind == "float" and len(shape) > 1]
    return Footprint(
        sum(size for kind, _, size in tensors if kind != "whole"),
        sum(size for kind, _, size in tensors if kind == "whole"),
        sum(size for size, _ in matrices),
        sum(count for _, count in matrices),
    )


_Counted = tuple[str, tuple[int, ...], int]
"""The kind, shape and bytes of a tensor."""


def _onnx_tensors(artifact: Artifact, files: list[str]) -> Iterator[_Counted]:
    seen: set[tuple[str, str, int]] = set()
    for name in files:
        descriptor = _open(artifact, name)
        try:
            with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
                tensors = find_tensors(data, str(artifact.path / name))
        finally:
            os.close(descriptor)
        for tensor in tensors:
            # Files are named from the graph's own folder, of which stages have one each.
            place = tensor.place and (os.path.dirname(name), *tensor.place)
            if place is None or place not in seen:
                yield tensor.kind, tensor.shape, tensor.size
            if place is not None:
                seen.add(place)


def _stored_tensors(artifact: Artifact, files: list[str]) -> Iterator[_Counted]:
    for name in files:
        descriptor = _open(artifact, name)
        try:
            found = list_stored(artifact.path / name, descriptor)
        finally:
            os.close(descriptor)
        for tensor in found:
            kind = "code" if tensor.dtype in _CODES else "float" if "float" in tensor.dtype else "whole"
            yield kind, tensor.shape, tensor.size


def _open(artifact: Artifact, name: str) -> int:
    try:
        return open_regular(artifact.path, name)
    except OSError as error:
        raise IntegrityError(f"{artifact.path / name} cannot be read: {error.strerror}.") from None
