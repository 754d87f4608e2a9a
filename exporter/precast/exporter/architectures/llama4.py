"""Llama 4 rotates with complex numbers and counts positions by the length of the cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding

from .attention_interface import Mask, attend, new_positions, use_attention_interface
from .cache_names import find_cache
from .patching import replace_method

__all__ = ["use_cached_attention"]


def use_cached_attention(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the rotary angles and the attention of every layer."""
    stack = ExitStack()
    stack.enter_context(use_attention_interface(model))
    stack.enter_context(replace_method(model, Llama4TextRotaryEmbedding, "forward", _make_angles))
    stack.enter_context(replace_method(model, Llama4TextAttention, "forward", _make_attention))
    return stack


def _make_angles(module: Llama4TextRotaryEmbedding) -> Any:
    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, 1, D / 2]."""
        angles = (position_ids[..., None].float() * module.inv_freq.float())[:, :, None]
        return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling

    return forward


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x` [B, S, heads, D], whose neighbours are real and imaginary parts."""
    cosines, sines = angles
    real, imaginary = x[..., 0::2], x[..., 1::2]
    turned = [real * cosines - imaginary * sines, real * sines + imaginary * cosines]
    return torch.stack(turned, -1).flatten(3)


def _make_attention(layer: Llama4TextAttention) -> Any:
    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Mask,
        **given: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, layer.head_dim))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if layer.use_rope:
            query, key = _rotate(query, position_embeddings), _rotate(key, position_embeddings)
        if hasattr(layer, "qk_norm"):
            query, key = layer.qk_norm(query), layer.qk_norm(key)
        if layer.attn_temperature_tuning and not layer.use_rope:
            query = query * _temperature(layer, hidden_states.shape[1])
        key, value = find_cache(given).update(key.transpose(1, 2), value.transpose(1, 2), layer.layer_idx)
        output = attend(query.transpose(1, 2), key, value, scale=layer.scaling, mask=attention_mask)
        return layer.o_proj(output.transpose(1, 2).flatten(2)), None

    return forward


def _temperature(layer: Llama4TextAttention, length: int) -> Tensor:
    """The scale of queries, [B, S, 1, 1], as in "Scalable-Softmax Is Superior for Attention" (Nakanishi 2025)."""
    known = new_positions(length)
    assert known is not None, "attention is replace_method for tracing only"
    places = torch.floor((known.float() + 1.0) / layer.floor_scale)
    factors: Tensor = torch.log1p(places) * layer.attn_scale + 1.0
    return factors[:, :, None, None]
