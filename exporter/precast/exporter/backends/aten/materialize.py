"""An operator that means nothing, and tells inductor to compute its argument once.

Inductor inlines whatever is cheap into every loop that reads it. A normalisation, or a rotation's sines, would so be
computed anew for each row of the matrix that they are multiplied with, and that takes longer than reading the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

__all__ = ["materialized"]


@torch.library.custom_op("precast::materialized", mutates_args=())
def materialized(x: Tensor) -> Tensor:
    """x itself, of any shape and dtype."""
    return x.clone()


@materialized.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_lowering(torch.ops.precast.materialized.default, type_promotion_kind=None)
def _materialize(x: Any) -> Any:
    x.realize()
    return x
