"""DeepSeek-V2 rotates by complex products, which ONNX lacks; here they are written with cosines and sines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling

from .patching import replace_method

__all__ = ["make_traceable"]


@contextmanager
def make_traceable(model: nn.Module) -> Iterator[None]:
    """Replace the rotary embedding, and the function of transformers' module that applies it."""
    before = modeling.apply_rotary_emb
    modeling.apply_rotary_emb = _apply_rotary
    try:
        with replace_method(model, modeling.DeepseekV2RotaryEmbedding, "forward", _make_angles):
            yield
    finally:
        modeling.apply_rotary_emb = before


def _make_angles(module: modeling.DeepseekV2RotaryEmbedding) -> Any:
    def forward(states: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S, D / 2, 2]: cosine and sine of each angle."""
        angles = position_ids[..., None].float() * module.inv_freq.float()
        turns: Tensor = torch.stack([angles.cos(), angles.sin()], dim=-1) * module.attention_scaling
        return turns

    return forward


def _apply_rotary(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(queries, angles), _rotate(keys, angles)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate `x` [B, heads, S, D], whose neighbours are real and imaginary parts."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[:, None].unbind(-1)
    turned: Tensor = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(3)
    return turned.to(x.dtype)
