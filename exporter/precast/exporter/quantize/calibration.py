"""Hessians for calibrated methods: the mean of x xᵀ over a layer's inputs on calibration text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

__all__ = ["collect_hessians", "group_blocks"]


def group_blocks(names: Sequence[str]) -> Iterator[list[str]]:
    """Group layers by decoder block: `model.layers.3.mlp.up_proj` belongs to `model.layers.3`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(found[0] if found else name, []).append(name)
    yield from groups.values()


def collect_hessians(model: nn.Module, names: Sequence[str], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per layer [K, K]: the mean of x xᵀ over every token x that reaches it when `model` reads `rows` [S] of ids.

    Layers that are quantized already run quantized, so the inputs of later layers contain the errors of earlier ones.
    """
    sums: dict[str, Tensor] = {}
    for row in rows:
        seen: set[str] = set()
        with ExitStack() as hooks, torch.no_grad(), suppress(_AllCollectedError):
            for name in names:
                collector = _make_collector(sums, seen, name, len(names))
                hooks.callback(model.get_submodule(name).register_forward_pre_hook(collector).remove)
            model(input_ids=row[None], use_cache=False)
    tokens = sum(len(row) for row in rows)
    return {name: total / tokens for name, total in sums.items()}


class _AllCollectedError(Exception):
    """Stops a forward pass once every layer has had its inputs: the rest would be computed for nothing."""


def _make_collector(sums: dict[str, Tensor], seen: set[str], name: str, count: int) -> Callable[..., None]:
    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.T @ x
        seen.add(name)
        if len(seen) == count:
            raise _AllCollectedError

    return collect
