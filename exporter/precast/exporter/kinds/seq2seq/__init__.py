"""Encoder-decoders: an encoder that runs once, a decoder that looks at what it made, step by step."""

from __future__ import annotations

__all__: list[str] = []
