"""MPT: attention with ALiBi, written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from .attention_interface import attend, own_slopes
from .cache_names import find_cache
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer."""
    return replace_method(model, MptAttention, "forward", _make_attention)


def _make_attention(layer: Any) -> Any:
    # One rank of several has its part of the heads. The bias of the last key is 0, of the one before minus the slope.
    slopes = -build_mpt_alibi_tensor(layer.hidden_size // layer.head_dim, 2)[:, 0, 0]

    def attention(hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        mixed = layer.Wqkv(hidden_states)
        if layer.clip_qkv:
            mixed = mixed.clamp(-layer.clip_qkv, layer.clip_qkv)
        query, key, value = (
            each.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for each in mixed.chunk(3, dim=2)
        )
        key, value = find_cache(given).update(key, value, layer.layer_idx)
        own = own_slopes(slopes, layer.n_heads, layer.Wqkv, hidden_states)
        output = attend(query, key, value, scale=layer.softmax_scale, slopes=own)
        return layer.out_proj(output.transpose(1, 2).flatten(2)), None

    return attention
