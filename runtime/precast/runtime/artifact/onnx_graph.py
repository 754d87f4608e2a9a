"""Find the tensors of an ONNX graph, and the other files that it opens, from its bytes, without the library.

ONNX is one protobuf message (onnx.proto). A tensor with external values has entries in its field `external_data`, one
of which has the key "location". So only messages that contain that word are parsed for these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from mmap import mmap

from ..errors import FormatError

__all__ = ["Tensor", "external_files", "find_tensors"]

_LOCATION, _CONTEXT = b"location", b"EPContext"
_ENTRY, _NODE = "entry", "node"
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: _NODE, 11: "attribute"},
    "graph": {1: _NODE, 5: "tensor", 15: "sparse"},
    _NODE: {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: _ENTRY},
    _ENTRY: {},
}
"""Message -> the fields that can lead to external data, and the message that each holds."""
_DEEPEST = 100
"""Limit for graphs within graphs, protobuf's own."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_OPERATOR = 4
_KEY, _VALUE = 1, 2
_DIMS, _DATA_TYPE, _EXTERNAL = 1, 2, 13
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""A tensor's data_type -> the bits of an element."""
_FLOATS = (1, 10, 11, 16)
_CODES = (2, 3, 21, 22)


@dataclass(frozen=True)
class Tensor:
    """A tensor that a graph holds, or that lies in another file.

    Attributes:
        shape: its dimensions.
        bits: of one element.
        kind: "float", "code" (of 4 or 8 bits), or "whole" for other numbers and truth values.
        place: the file and the byte where it begins, of one in another file; tensors of the same place are one.
    """

    shape: tuple[int, ...]
    bits: int
    kind: str
    place: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return -(-prod(self.shape) * self.bits // 8)


def external_files(data: bytes, name: str) -> set[str]:
    """The locations of the external data of the ONNX file `name`, as it spells them.

    Raises FormatError where it is no protobuf message, or holds a node that opens a file by another way.
    """
    try:
        return {location.decode() for location in _find_locations(data, 0, len(data), "model", name, 0)}
    except (ValueError, IndexError) as error:
        raise FormatError(f"{name} is not an ONNX graph: {error}. Export or download the artifact again.") from None


def _find_locations(data: bytes, start: int, end: int, kind: str, name: str, depth: int) -> Iterator[bytes]:
    if depth > _DEEPEST:
        raise ValueError(f"it nests more than {_DEEPEST} levels deep")
    inner = _FIELDS[kind]
    keys: list[bytes] = []
    values: list[bytes] = []
    for field, first, last in _read_fields(data, start, end):
        if kind == _ENTRY:
            {_KEY: keys, _VALUE: values}.get(field, []).append(data[first:last])
        elif kind == _NODE and field == _OPERATOR and data[first:last] == _CONTEXT:
            raise FormatError(f"{name} is refused: a node {_CONTEXT.decode()} opens compiled code of its own.")
        elif field in inner and any(data.find(word, first, last) >= 0 for word in (_LOCATION, _CONTEXT)):
            yield from _find_locations(data, first, last, inner[field], name, depth + 1)
    if _LOCATION in keys:
        yield from values or [b""]


def find_tensors(data: bytes | mmap, name: str) -> list[Tensor]:
    """The tensors of the ONNX file `name`, those in nested graphs and attributes among them, without their values.

    Raises FormatError where it is no protobuf message.
    """
    try:
        return list(_walk_tensors(data, 0, len(data), "model", 0))
    except (ValueError, IndexError) as error:
        raise FormatError(f"{name} is not an ONNX graph: {error}. Export or download the artifact again.") from None


def _walk_tensors(data: bytes | mmap, start: int, end: int, kind: str, depth: int) -> Iterator[Tensor]:
    if kind == "tensor":
        yield _read_tensor(data, start, end)
        return
    if depth > _DEEPEST:
        raise ValueError(f"it nests more than {_DEEPEST} levels deep")
    for field, first, last in _read_fields(data, start, end):
        if field in _FIELDS[kind]:
            yield from _walk_tensors(data, first, last, _FIELDS[kind][field], depth + 1)


def _read_tensor(data: bytes | mmap, start: int, end: int) -> Tensor:
    numbers: dict[int, list[int]] = {_DIMS: [], _DATA_TYPE: []}
    external: dict[bytes, bytes] = {}
    for field, kind, first, last in _read_all_fields(data, start, end):
        if field in numbers and kind == _VARINT:
            numbers[field].append(_read_varint(data, first)[0])
        elif field == _DIMS and kind == _BYTES:
            numbers[field] += _read_varints(data, first, last)
        elif field == _EXTERNAL and kind == _BYTES:
            key, value = (dict(_read_texts(data, first, last)).get(each, b"") for each in (_KEY, _VALUE))
            external[key] = value
    number = (numbers[_DATA_TYPE] or [0])[-1]
    what = "float" if number in _FLOATS else "code" if number in _CODES else "whole"
    place = (external[_LOCATION].decode(), int(external.get(b"offset", b"0"))) if _LOCATION in external else None
    return Tensor(tuple(numbers[_DIMS]), _BITS.get(number, 0), what, place)


def _read_texts(data: bytes | mmap, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    return ((field, data[first:last]) for field, first, last in _read_fields(data, start, end))


def _read_varints(data: bytes | mmap, at: int, end: int) -> Iterator[int]:
    while at < end:
        value, at = _read_varint(data, at)
        yield value


def _read_fields(data: bytes | mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes, texts or messages: (number, start, end)."""
    return ((field, first, last) for field, kind, first, last in _read_all_fields(data, at, end) if kind == _BYTES)


def _read_all_fields(data: bytes | mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message that hold bytes or whole numbers: (number, kind, start, end)."""
    while at < end:
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _read_varint(data, at)
            if at + length > end:
                raise ValueError(f"a field at byte {at:,} is longer than what holds it")
            yield tag >> 3, kind, at, at + length
            at += length
        elif kind == _VARINT:
            start = at
            _, at = _read_varint(data, at)
            yield tag >> 3, kind, start, at
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field at byte {at:,} is of the unknown kind {kind}")
    if at > end:
        raise ValueError("it is cut off")


def _read_varint(data: bytes | mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number before byte {at:,} does not end")
