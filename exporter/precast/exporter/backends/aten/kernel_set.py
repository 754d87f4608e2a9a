"""What a backend computes with kernels of its own rather than with ATen's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernels"]


@dataclass(frozen=True)
class Kernels:
    """Operators, whose meanings are with those of the `aoti` backend.

    Attributes:
        rows: products of few rows with weights.
        matrix: codes as a matrix, the last argument being its dtype.
        attend: attention of one token per row to caches.
        attend_prompt: attention of several tokens per row, the last argument being the dtype of its products.
    """

    rows: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int], Tensor]
    matrix: Callable[[Tensor, Tensor, Tensor | None, int, torch.dtype], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    attend_prompt: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, str, int, Tensor | None, float, torch.dtype], Tensor
    ]
