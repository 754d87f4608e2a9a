"""The `onnx` backend: graphs of ONNX Runtime's operators or of standard ones, weights in one memory-mapped file beside
them."""

from __future__ import annotations

__all__: list[str] = []
