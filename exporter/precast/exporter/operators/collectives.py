"""Collectives of tensor parallelism, as operators: the ranks of a group run one program over parts of its weights.

The eager code here is their meaning for the ranks of `as_rank`; each backend lowers the nodes its own way.

Every `copies` ranks that follow each other hold the same part where there are fewer parts than ranks (key/value heads,
degrees of single modules). They compute the same, so that one of each counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Exchange", "all_gather", "all_reduce", "as_rank", "rank_number"]


class Exchange(Protocol):
    """What one rank knows of the others."""

    rank: int

    def __call__(self, x: Tensor) -> list[Tensor]:
        """What every rank gives, in their order. All call it equally often."""
        ...


_EXCHANGE: ContextVar[Exchange | None] = ContextVar("precast_exchange", default=None)


@contextmanager
def as_rank(exchange: Exchange) -> Iterator[None]:
    """Within this block, this thread is one of several ranks. Elsewhere there is one, which gathers itself alone."""
    token = _EXCHANGE.set(exchange)
    try:
        yield
    finally:
        _EXCHANGE.reset(token)


@torch.library.custom_op("precast::all_reduce", mutates_args=())
def all_reduce(x: Tensor, ranks: int, copies: int) -> Tensor:
    """The sum of x over the parts, one after the other: float32 [...] -> [...], the same bits on every rank."""
    first, *others = _exchange(x, ranks)[::copies]
    total = first.clone()
    for other in others:
        total += other
    return total


@all_reduce.register_fake
def _(x: Tensor, ranks: int, copies: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("precast::all_gather", mutates_args=())
def all_gather(x: Tensor, ranks: int, copies: int) -> Tensor:
    """x of all parts side by side: float32 [..., n] -> [..., n * ranks / copies]."""
    return torch.cat(_exchange(x, ranks)[::copies], -1)


@all_gather.register_fake
def _(x: Tensor, ranks: int, copies: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * (ranks // copies))


@torch.library.custom_op("precast::rank_number", mutates_args=())
def rank_number(like: Tensor) -> Tensor:
    """The number of this rank, int64 [1], on the device of `like`."""
    exchange = _EXCHANGE.get()
    return torch.tensor([exchange.rank if exchange else 0], device=like.device)


@rank_number.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty(1, dtype=torch.int64)


def _exchange(x: Tensor, ranks: int) -> list[Tensor]:
    exchange = _EXCHANGE.get()
    return exchange(x) if exchange else [x, *([torch.zeros_like(x)] * (ranks - 1))]
