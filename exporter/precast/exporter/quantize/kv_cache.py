"""Scales for int8 caches, from the largest keys and values on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.cache_names import find_cache
from ..operators.attention import Scales

__all__ = ["cache_scales"]

LARGEST = 127
"""The largest int8 code."""


def cache_scales(model: nn.Module, rows: Sequence[Tensor], widths: Sequence[int]) -> Scales:
    """One scale per layer, head and channel, such that what `model` caches on `rows` [S] of ids just fits int8.

    `widths` are the head sizes that the caches are compiled with; channels beyond the model's own are zero.
    """
    largest: list[Tensor] = []
    for caches in (caches for row in rows for caches in _run_row(model, row)):
        found = [_channel_maxima(tensor) for tensor in caches]
        largest = [torch.maximum(*pair) for pair in zip(largest, found, strict=True)] if largest else found
    return [_scale_for(each, widths[index // 2]) for index, each in enumerate(largest)]


def _run_row(model: nn.Module, row: Tensor) -> list[list[Tensor]]:
    """The caches of a row of ids [S], in several parts where a layer's sliding window would drop some positions."""
    caches = _run_model(model, row)
    held = min(tensor.shape[2] for tensor in caches)
    return [caches] if held == len(row) else [_run_model(model, part) for part in row.split(held)]


def _run_model(model: nn.Module, row: Tensor) -> list[Tensor]:
    """Keys and values of each layer in turn, [1, H, S, D]."""
    with torch.no_grad():
        cache = find_cache(model(input_ids=row[None], use_cache=True, return_dict=True))
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _channel_maxima(tensor: Tensor) -> Tensor:
    """[B, H, S, D] -> the largest absolute value per head and channel, [H, D]."""
    return tensor.float().abs().amax((0, 2))


def _scale_for(largest: Tensor, width: int) -> Tensor:
    """[H, D] -> scales [H, width]; 1 where nothing was cached."""
    scale: Any = torch.where(largest == 0, 1.0, largest / LARGEST)
    return torch.nn.functional.pad(scale, (0, width - largest.shape[1]), value=1.0)
