"""LoRA adapters beside a linear layer, as one operator.

Each row of a batch has the adapter of one slot (Hu et al. 2021), or none. The eager code here defines its meaning; each
backend lowers the node its own way, and skips what no row asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_adapters", "lora"]


@torch.library.custom_op("precast::lora", mutates_args=())
def lora(y: Tensor, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """`y + (x @ Aᵀ) @ Bᵀ`, by the A and B of each row's slot.

    Args:
        y: what the layer itself makes of x, float32 [B, S, N].
        x: the layer's input, float32 [B, S, K].
        weights: float32 [slots + 1, R, K + N]: of each slot the rows of A, each followed by one of the transposed and
            scaled B. Slot 0 holds zeros.
        slots: int64 [B].

    Returns:
        float32 [B, S, N]; of rows with slot 0 exactly y.
    """
    return add_adapters(y, x, weights, slots)


@lora.register_fake
def _(y: Tensor, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def add_adapters(y: Tensor, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """`lora` in PyTorch's own operators."""
    inputs, outputs = x.shape[-1], y.shape[-1]
    a, b = weights.index_select(0, slots).split([inputs, outputs], -1)
    added: Tensor = (x @ a.transpose(1, 2)) @ b
    return y + added
