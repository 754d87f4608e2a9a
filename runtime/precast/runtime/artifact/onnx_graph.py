"""Find the other files that an ONNX graph opens, from its bytes, without the library.

ONNX is one protobuf message (onnx.proto). A tensor with external values has entries in its field `external_data`, one
of which has the key "location". So only messages that contain that word are parsed.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FormatError

__all__ = ["external_files"]

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


def _read_fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that hold bytes, texts or messages: (number, start, end)."""
    while at < end:
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _read_varint(data, at)
            if at + length > end:
                raise ValueError(f"a field at byte {at:,} is longer than what holds it")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _read_varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field at byte {at:,} is of the unknown kind {kind}")
    if at > end:
        raise ValueError("it is cut off")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
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
