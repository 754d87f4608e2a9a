"""The way of most architectures: transformers' own AttentionInterface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .attention_interface import IMPLEMENTATION

__all__ = ["through_interface"]


@contextmanager
def through_interface(model: Any) -> Iterator[None]:
    """Within this block `model` calls our attention function."""
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
