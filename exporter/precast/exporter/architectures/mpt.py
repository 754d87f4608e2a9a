"""MPT: attention with ALiBi, written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers.models.mpt.modeling_mpt import MptAttention

from .attention_interface import attend
from .cache_names import find_cache
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer."""
    return replace_method(model, MptAttention, "forward", _make_attention)


def _make_attention(layer: Any) -> Any:
    def attention(hidden_states: Tensor, position_bias: Tensor, **given: Any) -> tuple[Tensor, None]:
        mixed = layer.Wqkv(hidden_states)
        if layer.clip_qkv:
            mixed = mixed.clamp(-layer.clip_qkv, layer.clip_qkv)
        query, key, value = (
            each.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for each in mixed.chunk(3, dim=2)
        )
        key, value = find_cache(given).update(key, value, layer.layer_idx)
        # The bias of the last key is 0, of the one before it minus the slope.
        slopes = -position_bias[:, 0, -2]
        output = attend(query, key, value, scale=layer.softmax_scale, slopes=slopes)
        return layer.out_proj(output.transpose(1, 2).flatten(2)), None

    return attention
