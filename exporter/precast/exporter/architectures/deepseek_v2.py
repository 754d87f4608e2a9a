"""DeepSeek-V2 rotates by products of complex numbers, which ONNX lacks; here a rotation is a cosine and a sine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling

from .patching import replaced

__all__ = ["traceable"]


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Replace the rotary embedding and what applies it, which is a function of transformers' module."""
    before = modeling.apply_rotary_emb
    modeling.apply_rotary_emb = _apply
    try:
        with replaced(model, modeling.DeepseekV2RotaryEmbedding, "forward", _angles):
            yield
    finally:
        modeling.apply_rotary_emb = before


def _angles(module: modeling.DeepseekV2RotaryEmbedding) -> Any:
    def forward(states: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S, D / 2, 2]: cosine and sine of each angle."""
        angles = position_ids[..., None].float() * module.inv_freq.float()
        turns: Tensor = torch.stack([angles.cos(), angles.sin()], dim=-1) * module.attention_scaling
        return turns

    return forward


def _apply(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(queries, angles), _rotated(keys, angles)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbours of `x` [B, heads, S, D] are one complex number."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[:, None].unbind(-1)
    turned: Tensor = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(3)
    return turned.to(x.dtype)
