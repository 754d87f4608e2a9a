"""GPT-J: its attention is a method `_attn` of each layer, called right after the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import GPTJAttention

from ..decoder.hooks import attend

__all__ = ["adapted"]


@contextmanager
def adapted(model: nn.Module) -> Iterator[None]:
    """Replace `_attn` of every layer; GPT-J attends causally and has no window."""
    layers = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    for layer in layers:
        layer._attn = _attention(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._attn


def _attention(layer: GPTJAttention) -> Any:
    def attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
        return attend(query, key, value, scale=1 / layer.scale_attn), None

    return attention
