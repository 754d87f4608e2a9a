"""Check that a file is a complete shared library for this processor, before it is opened.

The dynamic linker maps what a library's header promises. Where the file is shorter, touching that memory kills the
process, which no error handling survives.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError, HostError

__all__ = ["check_imports", "check_library"]

_HEADER = struct.Struct("<4sBB10xHH4x8xQ8x4x2xHH")
_SEGMENT = struct.Struct("<I4xQQ8xQ")
_WIDTH = 56
_ENTRY = struct.Struct("<qQ")
_LIBRARY, _LOADED, _DYNAMIC = 3, 1, 2
_NEEDED, _STRINGS, _STRINGS_SIZE = 1, 5, 10
_LOADS_MORE = {15: "RPATH", 29: "RUNPATH", 0x6FFFFEFB: "DEPAUDIT", 0x6FFFFEFC: "AUDIT", 0x7FFFFFFD: "AUXILIARY",
               0x7FFFFFFF: "FILTER"}  # fmt: skip
_MAX_NAME, _MAX_TABLE = 256, 2**24
_MACHINES = {"x86_64": 62, "AMD64": 62, "aarch64": 183, "arm64": 183}


_SYSTEM = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
_SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
"""What is there wherever glibc is."""


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    length: int


def check_library(path: Path, source: str | None = None) -> None:
    """Check the header of the library at `path`, read from `source` if that is given.

    Raises FormatError where it is no 64-bit ELF library or is cut off, HostError where it is for another processor, and
    OSError where it cannot be read.
    """
    with open(source or path, "rb") as file:
        segments = _read_segments(file, path)
        size = os.fstat(file.fileno()).st_size
    reach = max((each.offset + each.length for each in segments if each.kind == _LOADED), default=size + 1)
    if reach > size:
        raise _cut_off(path, size)


def check_imports(path: Path, source: str | None = None) -> None:
    """Check that a complete library asks for nothing but the system's own.

    Raises FormatError where it names another library, or folders to look for libraries in: opening it would load code
    that no hash covers.
    """
    with open(source or path, "rb") as file:
        asked = _read_imports(file, path) - _SYSTEM
    if asked:
        raise FormatError(
            f"{path} asks for {', '.join(sorted(asked))[:200]}, which a library that stands alone may not: it may ask "
            f"for {', '.join(sorted(_SYSTEM))}. Export or download the artifact again."
        )


def _read_segments(file: BinaryIO, path: Path) -> list[_Segment]:
    size, header = os.fstat(file.fileno()).st_size, file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:6] != b"\x7fELF\2\1":
        raise FormatError(f"{path} is no shared library. Export or download the artifact again.")
    *_, kind, machine, start, width, count = _HEADER.unpack(header)
    if machine != _MACHINES.get(platform.machine(), machine):
        raise HostError(f"{path} was compiled for another processor than {platform.machine()}. Export it here.")
    file.seek(min(start, size))
    if kind != _LIBRARY or width != _WIDTH or not count:
        raise _cut_off(path, size)
    table = file.read(width * count)
    if len(table) != width * count:
        raise _cut_off(path, size)
    return [_Segment(*_SEGMENT.unpack_from(table, width * index)) for index in range(count)]


def _read_imports(file: BinaryIO, path: Path) -> set[str]:
    """The libraries that the dynamic section names, and the kinds of other entries by which more are loaded."""
    segments = _read_segments(file, path)
    loaded = [each for each in segments if each.kind == _LOADED]
    entries = [
        entry
        for each in segments
        if each.kind == _DYNAMIC
        for entry in _parse_entries(_read_memory(file, loaded, each.address, each.length))
    ]
    found = dict(entries)
    strings = _read_memory(file, loaded, found.get(_STRINGS, 0), found.get(_STRINGS_SIZE, 0))
    names = {strings[at : at + _MAX_NAME].partition(b"\0")[0] for tag, at in entries if tag == _NEEDED}
    more = {f"{_LOADS_MORE[tag]} of its own" for tag, _ in entries if tag in _LOADS_MORE}
    return {name.decode("utf-8", "replace") for name in names} | more


def _parse_entries(table: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in _ENTRY.iter_unpack(table[: len(table) // _ENTRY.size * _ENTRY.size]):
        if tag == 0:
            return
        yield tag, value


def _read_memory(file: BinaryIO, loaded: Sequence[_Segment], address: int, length: int) -> bytes:
    """What would lie at this address, once the segments are loaded: nothing beyond them."""
    for each in loaded:
        if each.address <= address < each.address + each.length:
            file.seek(each.offset + address - each.address)
            return file.read(min(length, each.address + each.length - address, _MAX_TABLE))
    return b""


def _cut_off(path: Path, size: int) -> FormatError:
    return FormatError(f"{path} is cut off or no shared library: {size:,} bytes. Export or download it again.")
