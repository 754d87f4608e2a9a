"""Decoders: tokens one after the other, with caches of what came before."""

from __future__ import annotations

__all__: list[str] = []
