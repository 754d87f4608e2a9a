"""transformers parses a GGUF file, in Python, for its configuration, tokenizer and weights; here, once for all."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["ParsedOnce"]


class ParsedOnce:
    """While it is entered, `gguf.GGUFReader(path)` is the one that was made first for that path.

    transformers looks that name up whenever it reads, and readers do not change.
    """

    def __init__(self) -> None:
        import gguf

        self._own: Any = gguf.GGUFReader
        self._shared = cache(self._own)

    def __enter__(self) -> None:
        import gguf

        gguf.GGUFReader = self._shared

    def __exit__(self, *_: object) -> None:
        import gguf

        gguf.GGUFReader = self._own
