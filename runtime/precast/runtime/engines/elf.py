"""Check that a file is a complete shared library for this processor, before it is opened.

The dynamic linker maps what a library's header promises. Where the file is shorter, touching that memory kills the
process, which no error handling survives.
"""

from __future__ import annotations

import os
import platform
import struct
from pathlib import Path

from ..errors import FormatError, HostError

__all__ = ["check_library"]

_HEADER = struct.Struct("<4sBB10xHH4x8xQ8x4x2xHH")
_SEGMENT = struct.Struct("<I4xQ8x8xQ")
_LIBRARY, _LOADED = 3, 1
_MACHINES = {"x86_64": 62, "AMD64": 62, "aarch64": 183, "arm64": 183}


def check_library(path: Path, source: str | None = None) -> None:
    """Check the header of the library at `path`, read from `source` if that is given.

    Raises FormatError where it is no 64-bit ELF library or is cut off, HostError where it is for another processor, and
    OSError where it cannot be read.
    """
    with open(source or path, "rb") as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:6] != b"\x7fELF\2\1":
            raise FormatError(f"{path} is no shared library. Export or download the artifact again.")
        *_, kind, machine, start, width, count = _HEADER.unpack(header)
        if machine != _MACHINES.get(platform.machine(), machine):
            raise HostError(f"{path} was compiled for another processor than {platform.machine()}. Export it here.")
        file.seek(min(start, size))
        table = file.read(width * count)
    whole = kind == _LIBRARY and width >= _SEGMENT.size and count and len(table) == width * count
    segments = [_SEGMENT.unpack_from(table, width * index) for index in range(count)] if whole else []
    reach = max((offset + length for kind, offset, length in segments if kind == _LOADED), default=size + 1)
    if reach > size:
        raise FormatError(f"{path} is cut off or no shared library: {size:,} bytes. Export or download it again.")
