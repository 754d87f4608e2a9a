"""Identity that makes Inductor materialize its argument instead of recomputing it in every consumer.

Inductor inlines cheap expressions into every loop that reads them. A normalization, or the sines of a rotation, would
be computed anew for each row of the matrix that they are multiplied with, which takes longer than reading the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering

__all__ = ["materialize"]


@torch.library.custom_op("precast::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """x itself, of any shape and dtype."""
    return x.clone()


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_lowering(torch.ops.precast.materialize.default, type_promotion_kind=None)
def _lower(x: Any) -> Any:
    x.realize()
    return x
