"""Encoders: models that answer in one forward pass over the whole input."""

from __future__ import annotations

__all__: list[str] = []
