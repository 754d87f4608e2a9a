"""BLOOM: attention with ALiBi, written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes, dropout_add

from .attention_interface import attend, own_slopes
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer."""
    return replace_method(model, BloomAttention, "forward", _make_attention)


def _make_attention(layer: Any) -> Any:
    # One rank of several has its part of the heads.
    slopes = _get_alibi_slopes(layer.hidden_size // layer.head_dim, torch.device("cpu"))

    def attention(
        hidden_states: Tensor, residual: Tensor, *, layer_past: Any, **_: Any
    ) -> tuple[Tensor, None]:  # fmt: skip
        query, key, value = layer._reshape(layer.query_key_value(hidden_states))
        key, value = layer_past.update(key, value, layer.layer_idx)
        own = own_slopes(slopes, layer.num_heads, layer.query_key_value, hidden_states)
        output = attend(query, key, value, scale=layer.inv_norm_factor, slopes=own)
        return dropout_add(layer.dense(output.transpose(1, 2).flatten(2)), residual, 0.0, False), None

    return attention
