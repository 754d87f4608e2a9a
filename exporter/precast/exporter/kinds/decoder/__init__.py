"""Decoders: models that generate token by token, with caches of keys, values and states."""

from __future__ import annotations

__all__: list[str] = []
