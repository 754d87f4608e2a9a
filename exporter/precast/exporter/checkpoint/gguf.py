"""GGUF files: parse one only once, and find one that is truncated."""

from __future__ import annotations

import mmap
import struct
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from precast.runtime.errors import CheckpointError

__all__ = ["SharedReader", "check_not_truncated"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of metadata, by type; strings and lists are the others."""
_STRING, _LIST = 8, 9
_MOST_DIMENSIONS = 4


class SharedReader:
    """Within this block `gguf.GGUFReader(path)` returns the reader that was first made for that path.

    transformers parses a file, in Python, for its configuration, its tokenizer and its weights: three times.
    """

    def __init__(self) -> None:
        import gguf

        self._own: Any = gguf.GGUFReader
        self._shared = cache(_with_plain_arrays(self._own))

    def __enter__(self) -> None:
        import gguf

        gguf.GGUFReader = self._shared

    def __exit__(self, *_: object) -> None:
        import gguf

        gguf.GGUFReader = self._own


def _with_plain_arrays(reader: Any) -> Any:
    """The reader with the mapped file as a plain array, of which each token and merge of the vocabulary is a view:
    views of `np.memmap` take twice the memory, and three times as long to make."""

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    return PlainReader


def check_not_truncated(path: Path) -> None:
    """Raise CheckpointError for a file that ends before the last tensor that its header names: a download that broke
    off. Reads no tensors, and accepts other faults of the header, about which the parser says more."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            needed = _Header(data).end_of_tensors()
        except (IndexError, struct.error):
            raise CheckpointError(f"{path} is truncated: it ends within its header. Download it again.") from None
        except ValueError:
            # Not a header that is known here, but perhaps complete.
            return
        if needed > len(data):
            raise CheckpointError(
                f"{path} is truncated: its tensors end at byte {needed:,}, and it has {len(data):,} bytes. Download it "
                f"again."
            )


class _Header:
    """Walks the header of a GGUF file, versions 2 and 3, from its first byte to the end of the tensors' table."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def end_of_tensors(self) -> int:
        """The byte at which the last tensor ends. Raises IndexError and struct.error where the file ends within its
        header, ValueError for an unknown header."""
        from gguf import GGML_QUANT_SIZES

        version = self._read_number("I")
        if version not in (2, 3):
            raise ValueError(version)
        tensors, entries = self._read_number("Q"), self._read_number("Q")
        alignment = 32
        for _ in range(entries):
            key, kind = self._read_string(), self._read_number("I")
            if key == b"general.alignment":
                alignment = self._read_number("I")
            else:
                self._skip_value(kind)
        end = 0
        for _ in range(tensors):
            self._read_string()
            dimensions = self._read_number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(dimensions)
            shape = [self._read_number("Q") for _ in range(dimensions)]
            kind, offset = self._read_number("I"), self._read_number("Q")
            block, size = GGML_QUANT_SIZES.get(kind, (1, 0))
            end = max(end, offset + prod(shape) // block * size)
        return -(-self._at // max(alignment, 1)) * max(alignment, 1) + end if tensors else 0

    def _read_number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(kind)
        return int(value)

    def _read_string(self) -> bytes:
        length = self._read_number("Q")
        self._at += length
        if self._at > len(self._data):
            raise IndexError(self._at)
        return self._data[self._at - length : self._at]

    def _skip_value(self, kind: int) -> None:
        """Skip a value of this type."""
        inner, count = (self._read_number("I"), self._read_number("Q")) if kind == _LIST else (kind, 1)
        if inner == _STRING:
            for _ in range(count):
                self._read_string()
        elif inner in _SIZES:
            self._at += count * _SIZES[inner]
        else:
            raise ValueError(inner)
