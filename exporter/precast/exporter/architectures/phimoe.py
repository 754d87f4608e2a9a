"""PhiMoE scales its rotary embedding by the length of the sequence; here it is that of short ones (see
`scaled_rotary.longrope_limit`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from .patching import replace_method

__all__ = ["make_traceable"]


def make_traceable(model: nn.Module) -> AbstractContextManager[Any]:
    """Replace the rotary angles by those of short sequences."""
    return replace_method(model, PhimoeRotaryEmbedding, "forward", _make_angles)


def _make_angles(module: PhimoeRotaryEmbedding) -> Any:
    frequencies, scale = module.rope_init_fn(module.config)
    scale = module.config.rope_parameters.get("short_mscale", scale)

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * frequencies.to(x.device).float()
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)

    return forward
