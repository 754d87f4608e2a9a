"""Linear layers that multiply weights of 8 bits with activations of 8 bits.

One operator with an eager meaning, as those of `linear.py`; a backend lowers it its own way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "DYNAMIC_STEPS",
    "LEAST_SCALE",
    "ActivationRange",
    "Int8Linear",
    "Int8Weight",
    "int8_linear",
    "multiply_int8",
    "round_activations",
]

DYNAMIC_STEPS = 127
"""The code of a token's largest activation, where each token has a scale of its own."""
LEAST_SCALE = 1e-30
"""A token of zeros alone has some scale."""
PAIR_SUM = 127
"""The largest sum of the codes of one sign in a pair of neighbours, before they are rounded. CPUs without instructions
for whole dot products multiply pairs, and saturate above 2**15 - 1: 255 * 128 is the most that a pair may come to."""


class ActivationRange(NamedTuple):
    """Activations as codes of 8 bits, x = scale * (code - zero): float32 [1] and uint8 [1]."""

    scale: Tensor
    zero: Tensor


class Int8Weight(NamedTuple):
    """A weight [N, K] as codes int8 [K, N] with a scale per output, float32 [N]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def round(cls, weight: Tensor) -> Int8Weight:
        """Round to nearest, with scales that keep pairs of codes within what every CPU multiplies."""
        pairs = nn.functional.pad(weight.float(), (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
        sums = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
        scales = sums.amax(1) / PAIR_SUM
        scales = torch.where(scales == 0, 1.0, scales)
        return cls((weight.float() / scales[:, None]).round().to(torch.int8).T.contiguous(), scales)

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return (self.codes.float() * self.scales).T


@torch.library.custom_op("precast::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    balance: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
) -> Tensor:
    """`(x * balance) @ w + bias` with w = codes * scales and x rounded to 8 bits.

    Args:
        x: float [..., K].
        codes: int8 [K, N].
        scales: float32 [N].
        bias: float [N] or None.
        balance: float32 [K], what undoes the channel scales of w, or None.
        x_scale, x_zero: see ActivationRange; None for a symmetric scale per token, by its largest number.

    Returns:
        float [..., N].
    """
    return multiply_int8(x, codes, scales, bias, balance, x_scale, x_zero)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[1])


def multiply_int8(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    balance: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
) -> Tensor:
    """`int8_linear` in PyTorch's own operators."""
    balanced = x.float() if balance is None else x.float() * balance
    integers, scale = round_activations(balanced, x_scale, x_zero)
    result = (integers @ codes.float()) * (scale * scales)
    return (result if bias is None else result + bias).to(x.dtype)


def round_activations(x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activations as integers less their zero point, held as floats, and their scale: one, or one per token."""
    if x_scale is None or x_zero is None:
        scale = (x.abs().amax(-1, keepdim=True) / DYNAMIC_STEPS).clamp(min=LEAST_SCALE)
        return (x / scale).round(), scale
    zero = x_zero.float()
    return ((x / x_scale).round() + zero).clamp(0, 255) - zero, x_scale


class Int8Linear(nn.Module):
    """`nn.Linear` with weights and activations of 8 bits; without a `found` range each token has a scale of its own."""

    codes: Tensor
    scales: Tensor
    balance: Tensor | None
    x_scale: Tensor | None
    x_zero: Tensor | None

    def __init__(
        self, weight: Int8Weight, bias: Tensor | None, balance: Tensor | None, found: ActivationRange | None
    ) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("balance", balance)
        self.register_buffer("x_scale", found.scale if found else None)
        self.register_buffer("x_zero", found.zero if found else None)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N]."""
        result: Tensor = int8_linear(x, self.codes, self.scales, self.bias, self.balance, self.x_scale, self.x_zero)
        return result

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], for modelling code that multiplies by it itself."""
        weight = (self.codes.float() * self.scales).T
        return weight if self.balance is None else weight * self.balance
