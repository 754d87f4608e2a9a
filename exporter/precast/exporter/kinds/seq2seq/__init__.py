"""Encoder-decoders: an encoder that runs once, and a decoder that attends to its output at every step."""

from __future__ import annotations

__all__: list[str] = []
