"""Falcon with rotary positions: attention written out in each layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from precast.runtime.errors import ExportError

from ..decoder.hooks import attend
from .swap import replaced

__all__ = ["adapted"]


def adapted(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the attention of every layer. Raises ExportError for Falcon with ALiBi, of which transformers' own
    implementations give different answers: eager adds the bias twice."""
    if model.config.alibi:  # type: ignore[union-attr]
        raise ExportError(
            "Falcon with ALiBi (config.alibi) is not supported: transformers' own eager and sdpa attention give "
            "different answers for it. Falcon with rotary positions is."
        )
    return replaced(model, FalconAttention, "forward", _attention)


def _attention(layer: Any) -> Any:
    def attention(
        hidden_states: Tensor, *, layer_past: Any, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        fused = layer._split_heads(layer.query_key_value(hidden_states))
        query, key, value = (each.transpose(1, 2) for each in fused)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = layer_past.update(key, value, layer.layer_idx)
        output = attend(query, key, value, scale=layer.inv_norm_factor)
        return layer.dense(output.transpose(1, 2).flatten(2)), None

    return attention
