"""Patches of torch.onnx and onnxscript, for what they do anew at every call and for what they keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from onnxscript.rewriter.pattern import SimplePatternMatcher
from torch.onnx._internal.exporter._registration import ONNXRegistry

__all__ = ["forget_matches", "keep_translations"]


@contextmanager
def forget_matches() -> Iterator[None]:
    """Within this block the rules of onnxscript forget what they matched last, of which they otherwise keep the whole
    graph, weights included, as long as the process lives."""
    original = SimplePatternMatcher.match

    def match(self: SimplePatternMatcher, *args: Any, **options: Any) -> Any:
        before = dict(vars(self))
        try:
            return original(self, *args, **options)
        finally:
            vars(self).clear()
            vars(self).update(before)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = original


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
