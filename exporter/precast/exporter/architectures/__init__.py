"""Adapters for architectures whose attention does not go through transformers' AttentionInterface.

Most need none. One that does gets a file here, named after its `model_type`, with a function
`adapted(model) -> context manager`, and one row in `ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from ..decoder.hooks import IMPLEMENTATION

__all__ = ["ADAPTERS", "adapted"]

ADAPTERS = {
    "gptj": "precast.exporter.architectures.gptj",
}


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Within this block the attention of `model` is `cached_attention`."""
    config: Any = model.config
    model_type = config.model_type
    if model_type in ADAPTERS:
        with import_module(ADAPTERS[model_type]).adapted(model):
            yield
        return
    before = config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
