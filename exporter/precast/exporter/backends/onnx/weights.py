"""Weights of all graphs in one file, each tensor once, and graphs that refer to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

__all__ = ["save_models"]

ALIGNMENT = 4096
"""Offsets are multiples of a memory page, so that tensors can be memory-mapped."""
INLINE_BYTES = 1024
"""Tensors up to this size (shapes, scalars) stay in the graph: runtimes fold them at load."""


def save_models(models: Sequence[ir.Model], paths: Sequence[Path], data: Path) -> list[str]:
    """Write each model to its path and their weights to `data`; returns the names of the weight files (none if
    everything was small enough to stay in the graphs). Raises OSError."""
    written: dict[str, ir.ExternalTensor] = {}
    with data.open("wb") as file:
        for model in models:
            for value in _large_weights(model):
                value.const_value = _store_once(value, written, file, data)
    for model, path in zip(models, paths, strict=True):
        ir.save(model, path)
    if not written:
        data.unlink()
    return [data.name] if written else []


def _large_weights(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for _, value in sorted(graph.initializers.items()):
            if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                yield value


def _store_once(
    value: ir.Value, written: dict[str, ir.ExternalTensor], file: BinaryIO, data: Path
) -> ir.ExternalTensor:
    tensor = value.const_value
    assert tensor is not None
    content = _bytes_of(tensor)
    # The shape is no part of the key: an embedding and an output embedding are one table in two shapes.
    key = f"{tensor.dtype} {hashlib.sha256(content).hexdigest()}"
    if key not in written:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        offset = file.tell()
        file.write(content)
        written[key] = ir.ExternalTensor(
            data.name, offset, len(content), tensor.dtype, shape=ir.Shape(tensor.shape), name=key, base_dir=data.parent
        )
    first = written[key]
    return ir.ExternalTensor(
        data.name, first.offset, first.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name or "",
        base_dir=data.parent,
    )  # fmt: skip


def _bytes_of(tensor: Any) -> memoryview:
    """What a file holds of a tensor, without a copy where it lies in memory as it is written: not packed in numbers of
    less than a byte, which numpy has one by one."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    # Once: a packed weight is made whenever it is read.
    array = tensor.numpy()
    return memoryview(array).cast("B") if array.flags.c_contiguous else memoryview(tensor.tobytes())
