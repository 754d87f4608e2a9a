"""The headers of the NEFFs in a Neuron graph's file, read without the SDK.

A NEFF (Neuron Executable File Format) is 1024 bytes of header and a tarball. Its layout is AWS's `neff_header_t`
("Work with NEFF Files" in the Neuron documentation, neuron-runtime/explore/work-with-neff-files.rst); numbers are
little-endian and lie as C lays them out, which leaves no gap. torch_neuronx.trace puts the NEFF into a TorchScript
archive whose inner layout is not documented, so it is looked for by what a header must say.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import IntegrityError

__all__ = ["HEADER", "HEADER_BYTES", "NeffHeader", "find_headers", "parse_header"]

HEADER_BYTES = 1024
HEADER = struct.Struct("<5Q128sI32s16s256sI64sQI468x")
"""pkg_version, header_size, data_size, neff_version_major, neff_version_minor, neff_build_version, num_tpb, hash, uuid,
name, requested_tpb_count, tpb_per_node, feature_bits, lnc_size, and padding."""

_SIZE_OFFSET = 8
_SIZE = struct.pack("<Q", HEADER_BYTES)
_LARGEST_NUMBER = 2**16
"""No version is that high: a header that claims one is other bytes."""
_GZIP, _TAR, _TAR_OFFSET = b"\x1f\x8b", b"ustar", 257


@dataclass(frozen=True)
class NeffHeader:
    """Attributes:
    major, minor: the version of the format, which decides whether a runtime takes it.
    build: the compiler's own version, as it wrote it.
    cores: NeuronCores that it needs (`num_tpb`).
    lnc_size: physical cores to a logical one: 2 on trn2 unless told otherwise, 1 or 0 (not said) elsewhere.
    feature_bits: what a runtime must know; AWS does not publish which bit is what.
    data_bytes: of the tarball behind it.
    name, uuid: as the compiler wrote them; `uuid` in hexadecimal.
    """

    major: int
    minor: int
    build: str
    cores: int
    lnc_size: int
    feature_bits: int
    data_bytes: int
    name: str
    uuid: str

    @property
    def version(self) -> str:
        """`major.minor`."""
        return f"{self.major}.{self.minor}"


def parse_header(data: bytes) -> NeffHeader | None:
    """Parse the first 1024 bytes of `data` as a header; None where they are none."""
    if len(data) < HEADER_BYTES:
        return None
    package, size, count, major, minor, build, cores, _, uuid, name, _, _, features, lnc = HEADER.unpack_from(data)
    if size != HEADER_BYTES or not count or max(package, major, minor, cores, lnc) >= _LARGEST_NUMBER:
        return None
    return NeffHeader(major, minor, _decode_text(build), cores, lnc, features, count, _decode_text(name), uuid.hex())


def find_headers(path: Path) -> list[NeffHeader]:
    """The headers of all NEFFs that the file at `path` holds, in their order; none where it holds none.

    Only headers are looked at: nothing is unpacked. Raises IntegrityError where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < HEADER_BYTES:
                return []
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return list(_scan_headers(content))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}.") from None


def _scan_headers(content: mmap.mmap) -> Iterator[NeffHeader]:
    position = 0
    while (found := content.find(_SIZE, position + _SIZE_OFFSET)) >= 0:
        start = found - _SIZE_OFFSET
        header = parse_header(content[start : start + HEADER_BYTES])
        if header is not None and _is_tarball(content, start + HEADER_BYTES, header.data_bytes):
            yield header
            position = start + HEADER_BYTES + header.data_bytes
        else:
            position = start + 1


def _is_tarball(content: mmap.mmap, start: int, count: int) -> bool:
    """Whether a tarball of so many bytes, compressed or not, lies at `start`."""
    mark = start + _TAR_OFFSET
    is_tar = content[start : start + 2] == _GZIP or content[mark : mark + len(_TAR)] == _TAR
    return start + count <= len(content) and is_tar


def _decode_text(field: bytes) -> str:
    return field.split(b"\0", maxsplit=1)[0].decode("utf-8", "replace")
