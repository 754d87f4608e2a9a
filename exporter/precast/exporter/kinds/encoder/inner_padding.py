"""Padding anywhere in a row, for decoders used as encoders: tokens are moved to the front, and outputs moved back.

Without `position_ids` transformers counts a decoder's positions over padding too, so padding on the left or between
tokens would shift the positions of the tokens behind it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compact", "compaction_index", "is_causal", "restore"]


def is_causal(model: nn.Module) -> bool:
    """Whether `model` attends causally: its code builds causal masks, and no layer has `is_causal` False."""
    config: Any = model.config
    if config.is_encoder_decoder or getattr(config.get_text_config(), "use_bidirectional_attention", False):
        return False
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    masks = any(hasattr(sys.modules[type(module).__module__], "create_causal_mask") for module in model.modules())
    return masks and (any(flags) or not flags)


def compaction_index(mask: Tensor) -> Tensor:
    """The target position of each token, int64 [B, L] or [B, choices, L]: real tokens in their order, then padding."""
    count = mask.sum(-1, keepdim=True)
    return torch.where(mask == 1, mask.cumsum(-1) - 1, count + (1 - mask).cumsum(-1) - 1)


def compact(tensor: Tensor, index: Tensor) -> Tensor:
    """Move the tokens of `tensor`, of the shape of `index`, to their positions in it."""
    return torch.zeros_like(tensor).scatter(-1, index, tensor)


def restore(output: Tensor, index: Tensor) -> Tensor:
    """Move an output [B, L, …] back to where its tokens were before `compact`."""
    spread = index.reshape(*index.shape, *[1] * (output.ndim - 2)).expand(-1, -1, *output.shape[2:])
    return output.gather(1, spread)
