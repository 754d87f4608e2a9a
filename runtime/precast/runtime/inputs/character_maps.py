"""Maps of characters in a tokenizer.json, which the tokenizers library believes without a look."""

from __future__ import annotations

import binascii
from typing import Any

import msgspec

from ..errors import FormatError

__all__ = ["check_character_maps"]


class _File(msgspec.Struct):
    normalizer: Any = None


def check_character_maps(data: bytes, path: str) -> None:
    """Raise FormatError where a map of SentencePiece (a normalizer of the type Precompiled) says that it is larger than
    it is: the library reserves as much memory as its first four bytes say, and ends the process where there is less.

    What is no tokenizer.json for other reasons is left to the library.
    """
    try:
        normalizer = msgspec.json.decode(data, type=_File).normalizer
        maps = list(_maps_of(normalizer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for held in maps:
        try:
            decoded = binascii.a2b_base64(held)
        except ValueError:
            continue
        # "<trie size (4 bytes, little endian)><double array trie><normalized string>", of src/normalizer.cc.
        size = int.from_bytes(decoded[:4], "little")
        if size > len(decoded) - 4:
            raise FormatError(
                f"{path} cannot be read as a tokenizer: its precompiled_charsmap says that {size} bytes follow, and "
                f"{max(len(decoded) - 4, 0)} do."
            )


def _maps_of(normalizer: Any) -> list[str]:
    if not isinstance(normalizer, dict):
        return []
    found = [held] if isinstance(held := normalizer.get("precompiled_charsmap"), str) and held else []
    inner = normalizer.get("normalizers")
    return found + [each for one in (inner if isinstance(inner, list) else []) for each in _maps_of(one)]
