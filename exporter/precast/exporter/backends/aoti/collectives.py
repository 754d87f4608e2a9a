"""Collectives between ranks in native code: calls of standalone/cpp/ranks.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import register_lowering

from ...operators import collectives  # noqa: F401  (registers the operators that are lowered here)
from .kernel_template import KernelTemplate, realize_contiguous

__all__: list[str] = []

_REDUCE = 'extern "C" void ranks_all_reduce(const float*, float*, int64_t, int32_t, int32_t);'
_GATHER = 'extern "C" void ranks_all_gather(const float*, float*, int64_t, int64_t, int32_t, int32_t);'
_NUMBER = 'extern "C" int64_t ranks_own_number();'


@register_lowering(torch.ops.precast.all_reduce.default, type_promotion_kind=None)
def _all_reduce(x: Any, ranks: int, copies: int) -> Any:
    x = realize_contiguous(x)
    body = f"ranks_all_reduce(x, y, {_count(len(x.get_size()))}, {ranks}, {copies});"
    return KernelTemplate({"x": x}, x.get_size(), body, [], declarations=_REDUCE).make_node()


@register_lowering(torch.ops.precast.all_gather.default, type_promotion_kind=None)
def _all_gather(x: Any, ranks: int, copies: int) -> Any:
    x = realize_contiguous(x)
    *rows, width = x.get_size()
    body = f"ranks_all_gather(x, y, {_count(len(rows))}, {width}, {ranks}, {copies});"
    size = [*rows, width * (ranks // copies)]
    return KernelTemplate({"x": x}, size, body, [], declarations=_GATHER).make_node()


@register_lowering(torch.ops.precast.rank_number.default, type_promotion_kind=None)
def _rank_number(like: Any) -> Any:
    like = realize_contiguous(like)
    return KernelTemplate(
        {"x": like}, [1], "y[0] = ranks_own_number();", [], dtype=torch.int64, declarations=_NUMBER
    ).make_node()


def _count(dims: int) -> str:
    """The C++ text of the number of elements in the first dimensions of x."""
    return " * ".join(f"int64_t({{x:{dim}}})" for dim in range(dims))
