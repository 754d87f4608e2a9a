"""XGLM: attention written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers.models.xglm.modeling_xglm import XGLMAttention

from .attention_interface import attend
from .cache_names import find_cache
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer."""
    return replace_method(model, XGLMAttention, "forward", _make_attention)


def _make_attention(layer: Any) -> Any:
    def attention(hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (layer.num_heads, layer.head_dim)).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        key, value = find_cache(given).update(key, value, layer.layer_idx)
        output = attend(query, key, value, scale=layer.scaling)
        return layer.out_proj(output.transpose(1, 2).flatten(2)), None

    return attention
