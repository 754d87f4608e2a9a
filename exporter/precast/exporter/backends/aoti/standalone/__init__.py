"""Libraries that stand alone: what compiled code calls of PyTorch and OpenMP, written anew (cpp/) and linked in."""

from __future__ import annotations

__all__: list[str] = []
