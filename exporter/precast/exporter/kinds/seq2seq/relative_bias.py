"""T5's relative position bias, in a decoder whose rows differ in length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["use_relative_bias"]


@contextmanager
def use_relative_bias(model: Any, past_lengths: Tensor, capacity: int) -> Iterator[None]:
    """Within this block the decoder of `model` computes its bias for rows with `past_lengths` [B] cached tokens."""
    with ExitStack() as stack:
        for module in model.get_decoder().modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = partial(_bias, module.compute_bias, past_lengths, capacity)
                stack.callback(delattr, module, "compute_bias")
        yield


def _bias(
    compute: Callable[..., Tensor], past_lengths: Tensor, capacity: int, query_length: int, *_: Any, **__: Any
) -> Tensor:
    """The bias over the whole cache, [B, H, S, C]. `compute` is the layer's own method: for one query at the end of the
    cache it gives the bias of every distance."""
    by_distance = compute(1, capacity, past_seen_tokens=capacity - 1)[0, :, 0]
    position = past_lengths[:, None, None].long() + torch.arange(query_length)[None, :, None]
    column = (torch.arange(capacity) - position + capacity - 1).clamp(0, capacity - 1)
    return by_distance[:, column].transpose(0, 1)
