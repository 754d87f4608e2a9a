"""The `aoti` backend: native code of AOTInductor, one library per graph, weights in one file beside them."""

from __future__ import annotations

__all__: list[str] = []
