"""Scales for caches in int8: how large keys and values get on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.cache_names import find_cache
from ..operators.attention import Scales

__all__ = ["cache_scales"]

LARGEST = 127


def cache_scales(model: nn.Module, rows: Sequence[Tensor], widths: Sequence[int]) -> Scales:
    """One scale per layer, head and channel, such that what `model` caches on `rows` [S] of ids just fits int8.

    `widths` are the head sizes that the caches are compiled with; channels beyond the model's own are zero.
    """
    tops: list[Tensor] = []
    for cached in (cached for row in rows for cached in _complete(model, row)):
        found = [_top(tensor) for tensor in cached]
        tops = [torch.maximum(*pair) for pair in zip(tops, found, strict=True)] if tops else found
    return [_scale(top, widths[index // 2]) for index, top in enumerate(tops)]


def _complete(model: nn.Module, row: Tensor) -> list[list[Tensor]]:
    """What the model caches of a row, which it reads in parts where a layer's sliding window would forget some."""
    cached = _cached(model, row)
    held = min(tensor.shape[2] for tensor in cached)
    return [cached] if held == len(row) else [_cached(model, part) for part in row.split(held)]


def _cached(model: nn.Module, row: Tensor) -> list[Tensor]:
    """Keys and values of each layer in turn, [1, H, S, D]."""
    with torch.no_grad():
        cache = find_cache(model(input_ids=row[None], use_cache=True, return_dict=True))
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _top(tensor: Tensor) -> Tensor:
    """[B, H, S, D] -> the largest absolute value per head and channel, [H, D]."""
    return tensor.float().abs().amax((0, 2))


def _scale(top: Tensor, width: int) -> Tensor:
    scale: Any = torch.where(top == 0, 1.0, top / LARGEST)
    return torch.nn.functional.pad(scale, (0, width - top.shape[1]), value=1.0)
