"""Weights of all graphs of a variant -> one safetensors file; `precast.runtime.engines.safetensors_map` reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.export.graph_signature import InputKind

from precast.runtime.artifact.schema import Graph
from precast.runtime.errors import ExportError

__all__ = ["save_tensors", "save_weights", "share"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""
IN_ONE_WRITE = 32 * 2**20
"""Bytes: files written in large pieces are cached in large pages, and are read faster."""

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class _Lowered(Protocol):
    @property
    def graph(self) -> Graph: ...

    @property
    def exported(self) -> torch.export.ExportedProgram: ...


def save_weights(programs: Sequence[_Lowered], path: Path) -> list[str]:
    """Write every weight and constant that a program uses into `path`, and return their names there.

    A tensor's name is its full name in the program, or `graph:name` where graphs hold different tensors under one
    name. Memory that several tensors share is stored once. The same weights give the same bytes.
    """
    return save_tensors(
        share({program.graph.name: dict(_used_tensors(program.exported)) for program in programs}), path
    )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> list[str]:
    """Write these tensors under their names, as `save_weights` does, and return the names."""
    regions = sorted(_regions(tensors), key=lambda region: region.sort_key)
    _write_file(regions, path)
    return sorted(tensors)


def share(held_by: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Merge the tensors of graphs: under its name alone where all graphs have the same tensor, else as `graph:name`."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    for graph, tensors in held_by.items():
        for name, tensor in tensors.items():
            held.setdefault(name, {})[graph] = tensor
    found: dict[str, torch.Tensor] = {}
    for name, by_graph in held.items():
        first, *others = by_graph.values()
        if all(_is_same(first, other) for other in others):
            found[name] = first
        else:
            found |= {f"{graph}:{name}": tensor for graph, tensor in by_graph.items()}
    return found


def _used_tensors(exported: torch.export.ExportedProgram) -> Iterator[tuple[str, torch.Tensor]]:
    users = {node.name: len(node.users) for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in _HELD and users[spec.arg.name]:
            name = str(spec.target)
            held: Any = exported.state_dict if name in exported.state_dict else exported.constants
            yield name, held[name].detach()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if _layout(one) != _layout(other):
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _layout(tensor: torch.Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.stride()


@dataclass(frozen=True)
class _Region:
    """A region of memory and the tensors in it: `flat` is stored, under the first tensor's name."""

    flat: torch.Tensor
    shape: tuple[int, ...]
    views: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return min(self.views)

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    @property
    def sort_key(self) -> Any:
        """Sort key: whole cache lines first, so that each begins a line; the rest from wide to narrow elements."""
        is_whole = self.nbytes % ALIGNMENT == 0
        return not is_whole, 0 if is_whole else -self.flat.element_size(), self.name


def _regions(tensors: Mapping[str, torch.Tensor]) -> Iterator[_Region]:
    """Group tensors by the memory that they use, overlapping ones together."""
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items())
    group: list[tuple[Any, int, int, str]] = []
    for memory, begin, end, name in spans:
        if group and (memory != group[0][0] or begin >= max(span[2] for span in group)):
            yield _make_region(group, tensors)
            group = []
        group.append((memory, begin, end, name))
    if group:
        yield _make_region(group, tensors)


def _span(tensor: torch.Tensor) -> tuple[Any, int, int]:
    """The memory of a tensor, and its first element and end in it."""
    if tensor.numel() == 0:
        return (str(tensor.dtype), id(tensor)), 0, 0
    begin = int(tensor.storage_offset())
    reach = sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.dtype), tensor.untyped_storage().data_ptr()), begin, begin + reach + 1


def _make_region(group: Iterable[tuple[Any, int, int, str]], tensors: Mapping[str, torch.Tensor]) -> _Region:
    group = sorted(group, key=lambda span: span[3])
    begin, end = min(span[1] for span in group), max(span[2] for span in group)
    views = {
        name: {
            "of": group[0][3],
            "shape": list(tensors[name].shape),
            "strides": list(tensors[name].stride()),
            "offset": start - begin,
        }
        for _, start, _, name in group
    }
    first = tensors[group[0][3]]
    is_whole = first.is_contiguous() and first.numel() == end - begin
    flat = torch.as_strided(first, (end - begin,), (1,), begin)
    return _Region(flat, tuple(first.shape) if is_whole else (end - begin,), views)


def _write_file(regions: Sequence[_Region], path: Path) -> None:
    header: dict[str, Any] = {}
    views: dict[str, Any] = {}
    offset = 0
    for region in regions:
        if region.flat.dtype not in _DTYPES:
            raise ExportError(f"The weight {region.name} is of {region.flat.dtype}, which safetensors does not hold.")
        where = [offset, offset + region.nbytes]
        header[region.name] = {
            "dtype": _DTYPES[region.flat.dtype], "shape": list(region.shape), "data_offsets": where,
        }  # fmt: skip
        views |= {name: view for name, view in region.views.items() if not _is_plain(name, view, region)}
        offset = where[1]
    if views:
        header["__metadata__"] = {"precast.views": json.dumps(views, sort_keys=True, separators=(",", ":"))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb", buffering=IN_ONE_WRITE) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for region in regions:
            file.write(region.flat.view(torch.uint8).numpy().data)


def _is_plain(name: str, view: dict[str, Any], region: _Region) -> bool:
    """Whether the stored tensor of this name is the tensor itself, so that no view has to be described."""
    shape = view["shape"]
    strides = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
    plain = all(
        size < 2 or given == stride for size, given, stride in zip(shape, view["strides"], strides, strict=True)
    )
    return name == region.name and tuple(shape) == region.shape and plain
