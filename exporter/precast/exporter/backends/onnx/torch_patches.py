"""Patches of torch.onnx, for what it does anew at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

__all__ = ["keep_translations"]


@contextmanager
def keep_translations() -> Iterator[None]:
    """Within this block, `torch.onnx.export` looks its 500 translations of operators up once per process.

    It does so for each graph, which takes half a second, as long as tracing a small one; an artifact may have ten.
    """
    original = ONNXRegistry.__dict__["from_torchlib"]

    def from_torchlib(cls: Any, opset_version: int | None = None) -> Any:
        kept = _translations(original.__func__, cls, opset_version)
        # A copy, since translations of the caller's own are added to it.
        copied = cls()
        copied.__dict__.update(kept.__dict__, functions={name: list(held) for name, held in kept.functions.items()})
        return copied

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


@cache
def _translations(make: Any, cls: Any, opset_version: int | None) -> Any:
    return make(cls) if opset_version is None else make(cls, opset_version)
