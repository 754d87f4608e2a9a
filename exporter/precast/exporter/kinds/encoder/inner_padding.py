"""Padding within a row, for decoders that read a row at once: to them a row is its tokens, wherever padding lies.

transformers counts a decoder's positions over padding that is not told it, so that a hole in the mask moves what comes
behind it. Here tokens are moved together before the model reads them, and what it says of them is moved back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["closed", "is_causal", "opened", "places_of"]


def is_causal(model: nn.Module) -> bool:
    """Whether `model` reads from left to right: its code masks as decoders do, and no layer says that it does not."""
    config: Any = model.config
    if config.is_encoder_decoder or getattr(config.get_text_config(), "use_bidirectional_attention", False):
        return False
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    masks = any(hasattr(sys.modules[type(module).__module__], "create_causal_mask") for module in model.modules())
    return masks and (any(flags) or not flags)


def places_of(mask: Tensor) -> Tensor:
    """int64 [B, L]: where each token goes so that real ones come first, in their order, and padding after them."""
    count = mask.sum(-1, keepdim=True)
    return torch.where(mask == 1, mask.cumsum(-1) - 1, count + (1 - mask).cumsum(-1) - 1)


def closed(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, L] with every token in its place."""
    return torch.zeros_like(tensor).scatter(1, places, tensor)


def opened(output: Tensor, places: Tensor) -> Tensor:
    """An output [B, L, …] with every token where it came from."""
    index = places.reshape(*places.shape, *[1] * (output.ndim - 2)).expand(-1, -1, *output.shape[2:])
    return output.gather(1, index)
