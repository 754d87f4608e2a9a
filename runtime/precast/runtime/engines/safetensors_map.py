"""Weights of the native backends: safetensors files, mapped into memory and shared by all graphs and processes.

A file is read as its specification says, strictly: every byte belongs to exactly one tensor. Two things are added to
it. Tensors that lie in one piece of memory are stored once; the key `precast.views` of the file's metadata says what
further names stand for. And a tensor that differs from graph to graph is stored as `graph:name`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..artifact import strict_json
from ..artifact.weight_files import VIEWS
from ..errors import FormatError
from ..hosts.machine import memory_bytes

__all__ = ["Stored", "Weight", "item_size", "list_stored", "open_weights", "weight_of"]

_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Safetensors' names of dtypes: ours, and the bytes of an element."""

_ITEMSIZES = dict(_DTYPES.values())

_Memory = mmap.mmap | bytearray
_T = TypeVar("_T")


@dataclass(frozen=True)
class Weight:
    """A tensor in mapped memory: its first element is at byte `start` of `memory`; `strides` count elements.

    `held` are the elements from there to the end of the tensor that it is, or is a view of.
    """

    memory: _Memory
    start: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    held: int


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file, views left out: its dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def list_stored(path: Path, source: int | Path) -> list[Stored]:
    """The tensors of one file, by its header alone; `source` as for `open_weights`. Raises FormatError, OSError."""
    entries = _File(path, source).entries().values()
    return [Stored(entry.dtype, entry.shape, entry.end - entry.begin) for entry in entries]


def open_weights(paths: Sequence[Path], sources: Iterable[int | Path] | None = None) -> dict[str, Weight]:
    """Map every tensor of these files, by name, without reading them. `sources` are the descriptors of files that are
    open already; errors call them by the paths.

    The tensors are the files' memory: pages are read when they are first used, and shared with other processes. What
    writes into one changes a copy of its own. Raises FormatError where a file is not what safetensors allows, and
    OSError where it cannot be read.
    """
    found: dict[str, Weight] = {}
    for path, source in zip(paths, paths if sources is None else sources, strict=True):
        tensors = _File(path, source).tensors()
        if twice := found.keys() & tensors.keys():
            raise FormatError(f"{path} holds {min(twice)} which another file of the artifact holds too.")
        found |= tensors
    return found


def item_size(dtype: str) -> int:
    """The bytes of an element."""
    return _ITEMSIZES[dtype]


def _ask_for_large_pages(data: mmap.mmap) -> None:
    """Ask for pages of 2 MiB, from which weights are read faster. Not every kernel maps files so, and only the parts
    that its page cache holds in large pieces."""
    with suppress(AttributeError, OSError):
        data.madvise(mmap.MADV_HUGEPAGE)


def weight_of(weights: Mapping[str, _T], graph: str, name: str) -> _T | None:
    """The tensor that `graph` knows as `name`: its own, or the one that all graphs share."""
    own = weights.get(f"{graph}:{name}")
    return weights.get(name) if own is None else own


@dataclass(frozen=True)
class _Entry:
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    begin: int
    end: int


class _File:
    """One safetensors file, mapped."""

    def __init__(self, path: Path, source: int | Path) -> None:
        self._path = path
        with open(source, "rb", closefd=not isinstance(source, int)) as file:
            size = file.seek(0, 2)
            if size < 8:
                raise self._format_error(f"it has {size} bytes, fewer than a header takes")
            # Private and writable: torch has no tensors that are only read. Nothing is reserved for copies.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            self._data = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        _ask_for_large_pages(self._data)
        length = int.from_bytes(self._data[:8], "little")
        if length > min(size - 8, strict_json.MAX_BYTES):
            raise self._format_error(f"its header claims {length:,} bytes of {size:,}")
        self._header = strict_json.loads(self._data[8 : 8 + length], str(path))
        self._start = 8 + length

    def tensors(self) -> dict[str, Weight]:
        """By name, views included. Raises FormatError."""
        stored = {name: self._map_tensor(name, entry) for name, entry in self.entries().items()}
        return stored | self._make_views(self._header.get("__metadata__", {}), stored)

    def entries(self) -> dict[str, _Entry]:
        """Where each tensor lies, by name, without views. Raises FormatError."""
        named = {name: value for name, value in self._header.items() if name != "__metadata__"}
        entries = {name: self._parse_entry(name, value) for name, value in named.items()}
        self._check_layout(entries)
        return entries

    def _parse_entry(self, name: str, value: Any) -> _Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._format_error(f"{name[:80]!r} is not described by its dtype, shape and data_offsets")
        if not isinstance(value["dtype"], str) or value["dtype"] not in _DTYPES:
            raise self._format_error(f"{name[:80]!r} has the dtype {str(value['dtype'])[:20]!r}")
        shape, offsets = self._parse_shape(name, value["shape"]), self._parse_numbers(name, value["data_offsets"])
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._format_error(f"{name[:80]!r} lies between the offsets {offsets[:4]}")
        return _Entry(*_DTYPES[value["dtype"]], shape, *offsets)

    def _parse_numbers(self, name: str, values: Any) -> tuple[int, ...]:
        is_good = isinstance(values, list) and len(values) <= 64
        if not is_good or not all(type(value) is int and 0 <= value < 2**48 for value in values):
            raise self._format_error(f"{name[:80]!r} has sizes or offsets that are no sizes: {str(values)[:60]}")
        return tuple(values)

    def _parse_shape(self, name: str, values: Any) -> tuple[int, ...]:
        """A view may be of any size over a few bytes, and torch multiplies the sizes of a tensor of nothing, too."""
        shape = self._parse_numbers(name, values)
        elements = math.prod(max(1, size) for size in shape)
        if elements > memory_bytes():
            raise self._format_error(
                f"{name[:80]!r} has the shape {list(shape)[:8]}, more elements than there is memory"
            )
        return shape

    def _check_layout(self, entries: dict[str, _Entry]) -> None:
        """Every byte after the header belongs to exactly one tensor, which takes exactly those bytes."""
        reached = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != reached:
                raise self._format_error(
                    f"{name[:80]!r} begins at {entry.begin:,}, where the tensor before it ends at {reached:,}"
                )
            if entry.end - entry.begin != math.prod(entry.shape) * entry.itemsize:
                given = f"{entry.end - entry.begin:,} bytes"
                raise self._format_error(
                    f"{name[:80]!r} has {given} for the shape {list(entry.shape)[:8]} of {entry.dtype}"
                )
            reached = entry.end
        if reached != len(self._data) - self._start:
            raise self._format_error(f"its tensors take {reached:,} bytes of {len(self._data) - self._start:,}")

    def _map_tensor(self, name: str, entry: _Entry) -> Weight:
        begin, end = self._start + entry.begin, self._start + entry.end
        # Other values are undefined behaviour of the code that reads them.
        if entry.dtype == "bool" and max(self._data[begin:end], default=0) > 1:
            raise self._format_error(f"{name[:80]!r} has truth values that are neither 0 nor 1")
        is_aligned = begin % entry.itemsize == 0
        memory, start = (self._data, begin) if is_aligned else (bytearray(self._data[begin:end]), 0)
        strides = tuple(math.prod(entry.shape[d + 1 :]) for d in range(len(entry.shape)))
        return Weight(memory, start, entry.dtype, entry.shape, strides, math.prod(entry.shape))

    def _make_views(self, metadata: Any, stored: dict[str, Weight]) -> dict[str, Weight]:
        text = metadata.get(VIEWS, "{}") if isinstance(metadata, dict) else None
        if not isinstance(text, str):
            raise self._format_error("its metadata are not names with texts")
        views = strict_json.loads(text.encode("utf-8", "replace"), f"{VIEWS} of {self._path}")
        return {name: self._make_view(name, view, stored) for name, view in views.items()}

    def _make_view(self, name: str, view: Any, stored: dict[str, Weight]) -> Weight:
        keys = {"of", "shape", "strides", "offset"}
        if not isinstance(view, dict) or set(view) != keys or not isinstance(view["of"], str):
            raise self._format_error(f"the view {name[:80]!r} is not described by {', '.join(sorted(keys))}")
        shape, strides = self._parse_shape(name, view["shape"]), self._parse_numbers(name, view["strides"])
        (offset,) = self._parse_numbers(name, [view["offset"]])
        if view["of"] not in stored or len(shape) != len(strides):
            raise self._format_error(
                f"the view {name[:80]!r} is of {view['of'][:80]!r}, which is not there or of another rank"
            )
        base = stored[view["of"]]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 in shape or last >= base.held:
            raise self._format_error(f"the view {name[:80]!r} reaches element {last:,} of {base.held:,}")
        start = base.start + offset * _ITEMSIZES[base.dtype]
        return Weight(base.memory, start, base.dtype, shape, strides, base.held - offset)

    def _format_error(self, reason: str) -> FormatError:
        return FormatError(
            f"{self._path} is not a safetensors file as precast reads it: {reason}. Export or download the artifact "
            f"again."
        )
