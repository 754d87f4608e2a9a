"""Falcon, with rotary positions or ALiBi: attention written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb, build_alibi_tensor

from .attention_interface import attend, cache_capacity
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer."""
    return replace_method(model, FalconAttention, "forward", _make_attention)


def _make_attention(layer: Any) -> Any:
    def attention(
        hidden_states: Tensor,
        *,
        layer_past: Any,
        alibi: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        fused = layer._split_heads(layer.query_key_value(hidden_states))
        query, key, value = (each.transpose(1, 2) for each in fused)
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = layer_past.update(key, value, layer.layer_idx)
        bias = None if alibi is None else _bias(layer, query.shape[2])
        output = attend(query, key, value, scale=layer.inv_norm_factor, bias=bias)
        return layer.dense(output.transpose(1, 2).flatten(2)), None

    return attention


def _bias(layer: Any, length: Any) -> Tensor:
    """ALiBi over the whole cache, [1, H, S, C]. Not slopes times distances: transformers multiplies positions from the
    first key in bfloat16, which cannot tell neighbours apart from position 256 on."""
    counted = torch.ones(1, cache_capacity(), dtype=torch.int64)
    alibi: Tensor = build_alibi_tensor(counted, layer.num_heads, torch.float32) * layer.inv_norm_factor
    return alibi[None].expand(-1, -1, length, -1)
