"""Encoders: all of the input at once, one forward pass."""

from __future__ import annotations

__all__: list[str] = []
